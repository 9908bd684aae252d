"""FLOPs of a round, and the shortest time that the machine's measured limits allow for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.workload import Work
from rlhf.algo.flops import (
    TRAIN_FACTOR,
    Lengths,
    ModelSize,
    fine_tune,
    ppo_iteration,
    rank,
    sample,
    total_flops,
)
from rlhf.data.chat import IGNORED

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Roof:
    """What the machine reached in the same run."""

    gemm_flops: float
    """Floating-point operations per second in products of the model's shapes."""
    read_bytes: float
    """Bytes per second from memory."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a round needs at least."""

    flops: float
    weight_bytes: float
    """Bytes of weights that must be read one after the other, token by token."""

    def seconds(self, roof: Roof) -> float:
        """Return the shortest time: products at the peak, or weights at full bandwidth."""
        return max(self.flops / roof.gemm_flops, self.weight_bytes / roof.read_bytes)


def demand(
    suite: str,
    size: ModelSize,
    work: Work,
    *,
    sizes: Mapping[str, Any],
    precision: str,
    facts: Mapping[str, Any],
    units: float,
) -> Demand | None:
    """Return what a round of a suite needs; None for those that are no computation alone."""
    if suite == "generation":
        return _generation(size, work, sizes=sizes, precision=precision, units=units)
    if suite == "sft":
        rows = work.chats[: int(sizes["steps"] * sizes["batch_size"])]
        labelled = sum(label != IGNORED for row in rows for label in row["labels"][1:])
        whole = sum(len(row["input_ids"]) for row in rows)
        lengths = Lengths((whole - labelled) / len(rows), labelled / len(rows))
        done = fine_tune(len(rows), lengths, epochs=1, factor=TRAIN_FACTOR)
        return Demand(total_flops(size, [done]), 0.0)
    if suite == "reward":
        rows = work.pairs[: int(sizes["steps"] * sizes["batch_size"])]
        whole = sum(len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids"))
        lengths = Lengths(whole / len(rows) / 2, 0.0)
        done = rank(len(rows), lengths, epochs=1, factor=TRAIN_FACTOR)
        return Demand(total_flops(size, [done]), 0.0)
    if suite == "ppo":
        ids = work.prompt_ids[: int(sizes["prompts"])]
        response = facts.get("response_length", sizes["new_tokens"])
        lengths = Lengths(sum(map(len, ids)) / len(ids), response)
        works = ppo_iteration(len(ids), lengths, epochs=sizes["epochs"], factor=TRAIN_FACTOR)
        return Demand(total_flops(size, works), 0.0)
    return None


def _generation(
    size: ModelSize, work: Work, *, sizes: Mapping[str, Any], precision: str, units: float
) -> Demand:
    ids = work.prompt_ids[: int(sizes["prompts"])]
    mean_prompt = sum(map(len, ids)) / len(ids)
    lengths = Lengths(mean_prompt, units / len(ids) / sizes["samples"])
    done = sample(len(ids), lengths, num_samples=sizes["samples"])
    # Some response of so many nearly always reaches the bound.
    weights = (size.trunk + size.head) * BYTES[precision] * sizes["new_tokens"]
    return Demand(total_flops(size, [done]), weights)
