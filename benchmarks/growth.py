"""How cost grows with the size of the work: a fit of log seconds against log size.

The exponent of the FLOPs over the same sizes stands beside it: attention makes it more than 1 in
the prompt's length, reading a prompt once for all its samples less than 1 in K.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.play import Stage
from benchmarks.rounds import Attempt, interleave
from benchmarks.workload import Work
from rlhf.algo.flops import TRAIN_FACTOR, Lengths, ModelSize, fine_tune, sample, total_flops

SLACK = 0.1
"""By so much an exponent may exceed the one of the FLOPs, or 1 where that is less."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One size that is varied while the others stay."""

    name: str
    suite: str
    """Suite whose contender does the work."""
    key: str
    """What the request calls it."""
    values: tuple[int, ...]


def grow(stages: Mapping[str, Stage]) -> list[dict[str, Any]]:
    """Measure all axes with our contenders of the stages `growth` and `sft`."""
    found = []
    with ExitStack() as stack:
        for stage in stages.values():
            entry = stage.entries[0]
            if stage.open(stack, entry) is None:
                raise SystemExit(f"no growth: {stage.problems[entry.name]}")
        rows = stages["sft"].sizes["steps"] * stages["sft"].sizes["batch_size"]
        longest = stages["growth"].settings.max_length // 4
        for axis in axes(min(16, rows), longest=longest):
            stage = stages[axis.suite]
            outcomes = interleave(
                [str(value) for value in axis.values],
                rounds=stage.settings.rounds,
                repeats=stage.settings.quiet.repeats,
                attempt=partial(_attempt, stage, axis),
            )
            seconds = [
                statistics.median(a.seconds for a in outcomes[str(value)].counted())
                for value in axis.values
            ]
            counts = [
                flops(axis, value, stage.material.size, stage.material.work, stage.sizes)
                for value in axis.values
            ]
            attempts = {name: outcome.to_json() for name, outcome in outcomes.items()}
            found.append({**judge(axis, axis.values, seconds, counts), "attempts": attempts})
    return found


def _attempt(stage: Stage, axis: Axis, value: str, number: int) -> Attempt:
    """Do the work once at one value of an axis."""
    request = {axis.key: int(value), "steps": 1} if axis.suite == "sft" else {axis.key: int(value)}
    return stage.attempt(stage.entries[0].name, number, request=request)


def axes(largest: int, *, longest: int) -> tuple[Axis, ...]:
    """Return the axes: `largest` bounds K, prompts and rows, `longest` is a length in tokens."""
    counts = tuple(2**power for power in range(largest.bit_length()) if 2**power <= largest)
    lengths = tuple(longest // part for part in (8, 4, 2, 1))
    return (
        Axis("samples per prompt (K)", "growth", "samples", counts),
        Axis("prompts", "growth", "prompts", counts),
        Axis("prompt tokens", "growth", "prompt_tokens", lengths),
        Axis("response tokens", "growth", "new_tokens", lengths),
        Axis("rows of a training step", "sft", "batch_size", counts),
    )


def flops(axis: Axis, value: int, size: ModelSize, work: Work, sizes: Mapping[str, Any]) -> float:
    """Return the FLOPs of the work at one value of an axis."""
    if axis.suite == "sft":
        rows = work.chats[:value]
        tokens = sum(len(row["input_ids"]) for row in rows) / len(rows)
        done = fine_tune(len(rows), Lengths(tokens / 2, tokens / 2), epochs=1, factor=TRAIN_FACTOR)
        return total_flops(size, [done])
    asked = {**sizes, axis.key: value}
    ids = work.prompt_ids[: asked["prompts"]]
    prompt = asked.get("prompt_tokens", sum(map(len, ids)) / len(ids))
    lengths = Lengths(prompt, asked["new_tokens"])
    return total_flops(size, [sample(asked["prompts"], lengths, num_samples=asked["samples"])])


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the exponent of the least-squares fit cost = c * size ** exponent."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def judge(
    axis: Axis, values: Sequence[int], seconds: Sequence[float], flop_counts: Sequence[float]
) -> dict[str, Any]:
    """Return exponents of time and FLOPs, over all sizes and over the two largest."""
    found, expected = slope(values, seconds), slope(values, flop_counts)
    last, last_expected = slope(values[-2:], seconds[-2:]), slope(values[-2:], flop_counts[-2:])
    return {
        "axis": axis.name,
        "values": list(values),
        "seconds": list(seconds),
        "exponent": found,
        "flops_exponent": expected,
        "last_exponent": last,
        "last_flops_exponent": last_expected,
        "within": found <= max(1.0, expected) + SLACK and last <= max(1.0, last_expected) + SLACK,
    }
