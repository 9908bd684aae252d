"""Calibration against hand-worked tables and a slow second implementation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from rlhf.algo.calibration import (
    histogram,
    precision_recall,
    preference_confidence,
    reliability,
)


def test_reliability_by_hand() -> None:
    """Six rows in three bins of two.

    .1 .2 with outcomes 0 0: confidence .15, accuracy 0.   |gap| .15
    .5 .7 with outcomes 1 0: confidence .60, accuracy .5.  |gap| .10
    .8 .9 with outcomes 1 1: confidence .85, accuracy 1.   |gap| .15
    ECE = (.15 + .10 + .15) * 2 / 6 = .4 / 3
    """
    # Not in order: rows keep their outcomes while they are sorted.
    found = reliability([0.9, 0.1, 0.7, 0.2, 0.8, 0.5], [1, 0, 0, 0, 1, 1], num_bins=3)
    assert [(row["low"], row["high"], row["n"]) for row in found["bins"]] == [
        (0.1, 0.2, 2),
        (0.5, 0.7, 2),
        (0.8, 0.9, 2),
    ]
    assert [row["confidence"] for row in found["bins"]] == pytest.approx([0.15, 0.6, 0.85])
    assert [row["accuracy"] for row in found["bins"]] == [0.0, 0.5, 1.0]
    assert found["ece"] == pytest.approx(0.4 / 3)


def test_equal_probabilities_stay_together() -> None:
    """Four of five rows at .5: cut in the middle, the order of the rows would decide the ECE."""
    found = reliability([0.5, 0.5, 0.5, 0.5, 0.9], [1, 0, 1, 0, 1], num_bins=5)
    assert [(row["n"], row["accuracy"]) for row in found["bins"]] == [(4, 0.5), (1, 1.0)]
    assert found["ece"] == pytest.approx(0.1 / 5)
    assert reliability([0.5, 0.9, 0.5, 0.5, 0.5], [0, 1, 1, 0, 1], num_bins=5) == found


def slow_ece(probabilities: list[float], outcomes: list[float], num_bins: int) -> float:
    """Walk through the sorted rows, opening a bin when the first row of a value belongs there."""
    rows = sorted(zip(probabilities, outcomes, strict=True), key=lambda row: row[0])
    groups: dict[int, list[tuple[float, float]]] = {}
    number = 0
    for index, row in enumerate(rows):
        if index == 0 or row[0] != rows[index - 1][0]:
            number = math.floor(index * num_bins / len(rows))
        groups.setdefault(number, []).append(row)
    total = 0.0
    for group in groups.values():
        confidence = sum(p for p, _ in group) / len(group)
        accuracy = sum(y for _, y in group) / len(group)
        total += len(group) * abs(accuracy - confidence)
    return total / len(rows)


@pytest.mark.parametrize("seed", range(20))
def test_ece_equals_the_slow_one(seed: int) -> None:
    draw = random.Random(seed)
    # Rounded, so that there are ties.
    size = draw.randint(1, 60)
    probabilities = [round(draw.random(), draw.choice((1, 3))) for _ in range(size)]
    outcomes = [float(draw.random() < p) for p in probabilities]
    num_bins = draw.randint(1, 15)
    found = reliability(probabilities, outcomes, num_bins=num_bins)
    assert found["ece"] == pytest.approx(slow_ece(probabilities, outcomes, num_bins), abs=1e-12)
    assert sum(row["n"] for row in found["bins"]) == size
    assert len(found["bins"]) <= num_bins


def test_a_calibrated_model_has_the_ece_of_noise_and_a_bold_one_has_more() -> None:
    """20,000 rows in 10 bins: noise is below 0.01; logits times 3 are off by about 0.14."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=20_000)
    outcomes = rng.random(20_000) < 1 / (1 + np.exp(-logits))
    honest = reliability(1 / (1 + np.exp(-logits)), outcomes, num_bins=10)["ece"]
    bold = reliability(1 / (1 + np.exp(-3 * logits)), outcomes, num_bins=10)["ece"]
    assert honest < 0.01
    assert bold > 0.1


def test_no_rows_give_no_value() -> None:
    assert reliability([], [], num_bins=10) == {"bins": [], "ece": None}


@pytest.mark.parametrize(("p", "y"), [([1.2], [1]), ([math.nan], [1]), ([0.5, 0.5], [1])])
def test_impossible_input_is_refused(p: list[float], y: list[float]) -> None:
    with pytest.raises(AssertionError):
        reliability(p, y, num_bins=2)


def test_a_preference_is_folded_to_the_side_the_model_prefers() -> None:
    """Gaps log 3, -log 3, 0: it is sure to 3/4 each time, then not at all."""
    confidence, agrees = preference_confidence([math.log(3), 0, 1], [0, math.log(3), 1])
    assert confidence.tolist() == pytest.approx([0.75, 0.75, 0.5])
    assert agrees.tolist() == [1.0, 0.0, 0.5]


def test_precision_and_recall_by_hand() -> None:
    """Safe probabilities .1 .3 .4 .6, of which the first and third are unsafe.

    Below .35: .1 and .3; one of two is unsafe, one of two unsafe is found. Below .1: nothing,
    because .1 is not below .1. Below 1: all four, both found.
    """
    rows = precision_recall(
        [0.1, 0.3, 0.4, 0.6], [True, False, True, False], thresholds=[0.1, 0.35, 1.0]
    )
    assert [(row["flagged"], row["found"]) for row in rows] == [(0, 0), (2, 1), (4, 2)]
    assert [row["precision"] for row in rows] == [None, 0.5, 0.5]
    assert [row["recall"] for row in rows] == [0.0, 0.5, 1.0]
    assert {(row["n"], row["unsafe"]) for row in rows} == {(4, 2)}


def test_recall_without_unsafe_rows_is_unknown() -> None:
    [row] = precision_recall([0.1, 0.9], [False, False], thresholds=[0.5])
    assert (row["precision"], row["recall"]) == (0.0, None)


def test_histogram_loses_no_value() -> None:
    """Edges 0 1 2: 1 belongs to the second bin, 2 closes it; -5 and 9 count at the ends."""
    assert histogram([0.0, 0.5, 1.0, 2.0, -5.0, 9.0], [0, 1, 2]) == [3, 3]
    assert histogram([], [0, 1, 2]) == [0, 0]
    with pytest.raises(AssertionError, match="must rise"):
        histogram([1.0], [0, 0, 1])
