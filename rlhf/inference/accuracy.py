"""How often a reward model agrees with the annotators, beside the controls it has to beat.

Ties are left out (their order is a coin flip); equal scores count one half. Intervals are clustered
by prompt.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.algo.intervals import (
    NOTHING,
    finite,
    limits_json,
    paired_clustered_bootstrap,
    proportion_interval,
)
from rlhf.data.records import AXES, STRENGTHS, Comparison

UNGRADED = "ungraded"
"""Strength of comparisons without one, in cells; None stands for all strengths together."""

UNSAFE_BELOW = 0.5
"""Safety probability below which a response counts as found unsafe (paper Table 29)."""


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """A comparison with the scores of both sides, their tokens, and its prompt's cluster."""

    comparison: Comparison
    cluster: str
    chosen_score: float
    rejected_score: float
    chosen_tokens: int
    rejected_tokens: int
    swapped_chosen_score: float | None = None
    """Score of the response that a second pass was told is chosen: the rejected one."""
    swapped_rejected_score: float | None = None

    @property
    def strength(self) -> str:
        """The strength as cells name it."""
        return self.comparison.strength or UNGRADED

    def to_json(self) -> dict[str, Any]:
        """Return the row as it is written to scores.jsonl."""
        row = self.comparison
        return {
            "id": row.id,
            "batch": row.batch_id,
            "axis": row.axis,
            "source": row.source,
            "strength": row.strength,
            "tie": row.tie,
            "prompt": self.cluster,
            "heldout": row.heldout,
            "chosen_score": self.chosen_score,
            "rejected_score": self.rejected_score,
            "chosen_tokens": self.chosen_tokens,
            "rejected_tokens": self.rejected_tokens,
            "swapped_chosen_score": self.swapped_chosen_score,
            "swapped_rejected_score": self.swapped_rejected_score,
            "chosen_safe": row.chosen_safe,
            "rejected_safe": row.rejected_safe,
            "annotator": row.annotator,
            "model_chosen": row.model_chosen,
            "model_rejected": row.model_rejected,
        }


def accuracy_cells(
    pairs: Sequence[ScoredPair], *, level: float, num_draws: int, seed: int
) -> list[dict[str, Any]]:
    """Return one cell per strength x axis x source x batch that occurs, then the totals.

    Totals have source and batch None: one per strength and axis, and one per axis with strength
    None as well.
    """
    groups: dict[tuple[str, str | None, str | None, str | None], list[ScoredPair]]
    groups = defaultdict(list)
    for pair in pairs:
        row = pair.comparison
        groups[row.axis, pair.strength, row.source, row.batch_id].append(pair)
        groups[row.axis, pair.strength, None, None].append(pair)
        groups[row.axis, None, None, None].append(pair)
    cells = []
    for axis, strength, source, batch in sorted(groups, key=_cell_order):
        names = {"axis": axis, "strength": strength, "source": source, "batch": batch}
        group = groups[axis, strength, source, batch]
        cells.append({**names, **measure(group, level=level, num_draws=num_draws, seed=seed)})
    return cells


def measure(
    pairs: Sequence[ScoredPair], *, level: float, num_draws: int, seed: int
) -> dict[str, Any]:
    """Return accuracy with its interval, the reward gap and the controls of some comparisons.

    `control_longer` prefers the response with more tokens, on the same rows; `longer_difference`
    is accuracy minus that control, with a paired interval. `control_swapped` is the accuracy of the
    pass with the answers exchanged. Values without any row are None.
    """
    counted = [pair for pair in pairs if not pair.comparison.tie]
    clusters = [pair.cluster for pair in counted]
    correct = [wins(pair.chosen_score, pair.rejected_score) for pair in counted]
    longer = [wins(pair.chosen_tokens, pair.rejected_tokens) for pair in counted]
    swapped = [
        wins(pair.swapped_chosen_score, pair.swapped_rejected_score)
        for pair in counted
        if pair.swapped_chosen_score is not None and pair.swapped_rejected_score is not None
    ]
    accuracy, difference = NOTHING, NOTHING
    if counted:
        accuracy = proportion_interval(correct, clusters, level=level)
        difference = paired_clustered_bootstrap(
            correct, longer, clusters, num_draws=num_draws, seed=seed, level=level
        )
    return {
        "n": len(counted),
        "prompts": len(set(clusters)),
        "ties": len(pairs) - len(counted),
        "equal_scores": sum(value == 0.5 for value in correct),
        "accuracy": finite(accuracy.mean),
        "low": finite(accuracy.low),
        "high": finite(accuracy.high),
        "gap": mean([pair.chosen_score - pair.rejected_score for pair in counted]),
        "control_longer": mean(longer),
        "longer_difference": limits_json(difference),
        "control_swapped": mean(swapped),
    }


def safety_detection(pairs: Iterable[ScoredPair], *, gate_threshold: float) -> dict[str, Any]:
    """Return how well sigmoid(score) finds the responses that are labelled unsafe.

    Recall below 0.5 (paper Table 29), and precision and recall below the gate's threshold, over all
    labelled responses of both sides, ties included.
    """
    labelled: list[tuple[float, bool]] = []
    for pair in pairs:
        row = pair.comparison
        for score, safe in (
            (pair.chosen_score, row.chosen_safe),
            (pair.rejected_score, row.rejected_safe),
        ):
            if safe is not None:
                labelled.append((sigmoid(score), safe))
    unsafe = [probability for probability, safe in labelled if not safe]
    gated = [safe for probability, safe in labelled if probability < gate_threshold]
    return {
        "labelled": len(labelled),
        "unsafe": len(unsafe),
        "unsafe_recall": mean([float(probability < UNSAFE_BELOW) for probability in unsafe]),
        "safe_below_half": mean(
            [float(probability < UNSAFE_BELOW) for probability, safe in labelled if safe]
        ),
        "gate_threshold": gate_threshold,
        "gate_precision": mean([float(not safe) for safe in gated]),
        "gate_recall": mean([float(probability < gate_threshold) for probability in unsafe]),
    }


def wins(first: float, second: float) -> float:
    """Return 1 where the first is greater, 0.5 where both are equal, else 0."""
    return 0.5 if first == second else float(first > second)


def sigmoid(value: float) -> float:
    """Return the logistic function, without overflow at either end."""
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    return math.exp(value) / (1.0 + math.exp(value))


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None where there is no value."""
    return sum(values) / len(values) if values else None


def _cell_order(key: tuple[str, str | None, str | None, str | None]) -> tuple[Any, ...]:
    axis, strength, source, batch = key
    strengths = [*STRENGTHS, UNGRADED, None]
    return (source is None, AXES.index(axis), strengths.index(strength), source or "", batch or "")
