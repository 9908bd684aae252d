"""On-arrival accuracy: do the reward models agree with a batch that they were not trained on?

A batch with more `negligibly_better` is harder for any model. What is expected of the new batch is
therefore the model's held-out accuracy on earlier batches, strength by strength, weighed by the
strengths of the new batch: only what is left is disagreement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf.algo.intervals import Interval, effective_size
from rlhf.algo.twosample import f_tail

MIN_COMPARISONS = 30
"""Comparisons that both sides need before the line is judged."""
MIN_CELL = 5
"""Held-out comparisons of a strength below which all strengths together stand in for it."""

Cell = Mapping[str, Any]


class AccuracyThresholds(NamedTuple):
    """Smallest differences of accuracy of the two verdicts."""

    look: float = 0.05
    stop: float = 0.15


@dataclass(frozen=True, slots=True)
class Arrival:
    """What one reward model said: `on_arrival` is its accuracy_before.json on the new batch,
    `heldout` its accuracy.json on held-out comparisons of earlier ones, as they are in a node."""

    axis: str
    on_arrival: Mapping[str, Any]
    heldout: Mapping[str, Any]
    level: float
    """Confidence level of the limits in both files."""


def arrival_line(arrival: Arrival) -> dict[str, Any]:
    """Return the line of one axis, not judged yet; a better accuracy never means stop."""
    line: dict[str, Any] = {
        "measure": f"accuracy_{arrival.axis}",
        "title": f"accuracy of the {arrival.axis} model on arrival",
        **dict.fromkeys(("value", "before", "statistic", "p_value", "effect", "thresholds")),
    }
    now, earlier = (_cells(tree, arrival.axis) for tree in (arrival.on_arrival, arrival.heldout))
    sizes = [cells[None]["n"] if None in cells else 0 for cells in (now, earlier)]
    if min(sizes) < MIN_COMPARISONS:
        line["text"] = f"{line['title']}: {min(sizes)} comparisons are too few to tell"
        return line
    accuracy, variance = now[None]["accuracy"], 0.0
    expected = 0.0
    for strength, cell in now.items():
        if strength is None or cell["n"] == 0:
            continue
        held = earlier.get(strength, earlier[None])
        held = held if held["n"] >= MIN_CELL else earlier[None]
        share = cell["n"] / now[None]["n"]
        expected += share * held["accuracy"]
        variance += share**2 * _variance(held, arrival.level)
    variance += _variance(now[None], arrival.level)
    difference = accuracy - expected
    statistic = difference**2 / variance
    thresholds = AccuracyThresholds()
    line |= {
        "value": accuracy,
        "before": expected,
        "statistic": statistic,
        "p_value": f_tail(statistic, 1.0, max(1.0, min(_prompts(now), _prompts(earlier)) - 1.0)),
        "effect": abs(difference),
        "thresholds": thresholds if difference < 0 else thresholds._replace(stop=math.inf),
    }
    line["text"] = (
        f"{line['title']}: {100 * accuracy:.0f} % of {now[None]['n']}, where its held-out accuracy "
        f"on earlier batches, at the same strengths, is {100 * expected:.0f} %"
    )
    return line


def _cells(tree: Mapping[str, Any], axis: str) -> dict[str | None, Cell]:
    """Return strength to cell over all sources and batches; None is all strengths together."""
    return {
        cell["strength"]: cell
        for cell in tree["cells"]
        if cell["axis"] == axis and cell["source"] is None and cell["batch"] is None
    }


def _variance(cell: Cell, level: float) -> float:
    """Return the variance of a cell's accuracy, from the width of its clustered interval.

    p (1 - p) / n_effective, with p drawn towards one half as in Wilson's interval, so that a cell
    without a mistake has a variance too.
    """
    interval = Interval(cell["accuracy"], cell["low"], cell["high"])
    size = effective_size(interval, level=level)
    drawn = (interval.mean * size + 1.0) / (size + 2.0)
    return drawn * (1.0 - drawn) / size


def _prompts(cells: Mapping[str | None, Cell]) -> float:
    return float(cells[None]["prompts"])
