"""What a training works through: rows per optimizer step, and the micro-batches of one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from rlhf.config import Optimizer

Micro = dict[str, Tensor]
"""One micro-batch, right-padded."""


class StepBatch(NamedTuple):
    """This process's micro-batches of one optimizer step, and the counts of the whole step.

    All processes make the same number of passes, because their gradients meet in each; whoever has
    too few rows fills up with ghosts, micro-batches that count for nothing.
    """

    micros: list[Micro]
    num_ghosts: int
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Steps:
    """All optimizer steps of a training: row indices per step, and how each step is cut."""

    order: list[list[int]]
    micro_batch_size: int
    optimizer: Optimizer
