"""Who can read a training's checkpoint: anybody, or the same processes with the same strategy.

Weights are always whole. An optimizer's state is whole too, and plain AdamW's, for replicas, ZeRO-0
and FSDP, so that such a training goes on with another strategy of the three, or with another number
of processes. ZeRO-1 to 3 leave it in the parts that each process holds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from rlhf.artifacts import NodeDir, Saved
from rlhf.config import Config, Strategy
from rlhf.errors import ArtifactError
from rlhf.processes import Processes

log = logging.getLogger(__name__)

ZERO_STAGES = {Strategy.zero0: 0, Strategy.zero1: 1, Strategy.zero2: 2, Strategy.zero3: 3}


def is_shared(config: Config, processes: Processes) -> bool:
    """Tell whether a training needs an engine: a single process always trains plainly."""
    return processes.size > 1 and config.distributed.strategy.shares


def conditions(config: Config, processes: Processes) -> dict[str, Any]:
    """Return what a checkpoint notes about the processes that write it."""
    strategy = config.distributed.strategy.name if processes.size > 1 else "none"
    return {
        "num_threads": torch.get_num_threads(),
        "num_processes": processes.size,
        "strategy": strategy,
    }


def check_conditions(saved: Saved, now: Mapping[str, Any], directory: NodeDir) -> None:
    """Warn where a checkpoint was written under other conditions than those of `now`.

    Raises ArtifactError when its optimizer state lies in parts that this start cannot read.
    """
    before = {name: saved.state[name] for name in now}
    if _layout(before) != _layout(now):
        raise ArtifactError(
            f"{saved.path} cannot be read with distributed.strategy={now['strategy']} on "
            f"{now['num_processes']} processes: its optimizer state is "
            f"{_layout(before) or 'whole'}; go on with distributed.strategy={before['strategy']} "
            f"and {before['num_processes']} processes (resources.*.processes), or delete "
            f"{directory.checkpoints} to start the node over"
        )
    for name, value in now.items():
        if before[name] != value:
            log.warning(
                "%s was %s and is now %s: the last digits may differ from an uninterrupted run",
                name,
                before[name],
                value,
            )


def _layout(state: Mapping[str, Any]) -> str:
    """Say how the optimizer state is cut; empty where it is whole."""
    strategy, size = state["strategy"], state["num_processes"]
    if strategy in ("zero1", "zero2", "zero3"):
        return f"cut into {size} parts by {strategy}"
    return ""
