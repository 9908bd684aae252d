import math
from typing import Any

import pytest

from rlhf.data.records import Comparison
from rlhf.inference.accuracy import (
    ScoredPair,
    accuracy_cells,
    measure,
    safety_detection,
    sigmoid,
    wins,
)

HOW: dict[str, Any] = {"level": 0.95, "num_draws": 200, "seed": 0}


def pair(
    chosen: float,
    rejected: float,
    *,
    cluster: str = "p",
    tokens: tuple[int, int] = (5, 5),
    swapped: tuple[float, float] | None = None,
    **changes: Any,
) -> ScoredPair:
    values: dict[str, Any] = {
        "strength": "better",
        "axis": "helpfulness",
        "source": "vendor",
        "batch_id": "week-1",
        **changes,
    }
    row = Comparison("id", [], "a", "b", **values)
    return ScoredPair(row, cluster, chosen, rejected, *tokens, *(swapped or (None, None)))


def test_accuracy_gap_and_controls_by_hand() -> None:
    """Right, wrong, equal, and a tie that does not count."""
    pairs = [
        pair(2.0, 0.0, cluster="a", tokens=(9, 5), swapped=(0.0, 2.0)),
        pair(0.0, 1.0, cluster="b", tokens=(9, 5), swapped=(1.0, 0.0)),
        pair(3.0, 3.0, cluster="b", tokens=(5, 5), swapped=(3.0, 3.0)),
        pair(9.0, 0.0, cluster="c", tie=True),
    ]
    found = measure(pairs, **HOW)
    assert found["n"] == 3
    assert found["prompts"] == 2
    assert found["ties"] == 1
    assert found["equal_scores"] == 1
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["gap"] == pytest.approx((2 - 1 + 0) / 3)
    assert found["control_longer"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["longer_difference"]["mean"] == pytest.approx(1.5 / 3 - 2.5 / 3)
    assert found["control_swapped"] == pytest.approx((0 + 1 + 0.5) / 3)
    assert found["low"] < found["accuracy"] < found["high"]


def test_only_ties_give_no_number() -> None:
    found = measure([pair(1.0, 0.0, tie=True)], **HOW)
    assert (found["n"], found["accuracy"], found["low"], found["gap"]) == (0, None, None, None)
    assert found["longer_difference"] == {"mean": None, "low": None, "high": None}


def test_repeated_prompts_widen_the_interval() -> None:
    scores = [(1.0, 0.0)] * 30 + [(0.0, 1.0)] * 10
    apart = measure([pair(*s, cluster=str(i)) for i, s in enumerate(scores)], **HOW)
    together = measure([pair(*s, cluster=str(i // 10)) for i, s in enumerate(scores)], **HOW)
    assert apart["accuracy"] == together["accuracy"]
    assert together["high"] - together["low"] > apart["high"] - apart["low"]


def test_cells_and_totals() -> None:
    pairs = [
        pair(1.0, 0.0),
        pair(0.0, 1.0, batch_id="week-2"),
        pair(1.0, 0.0, strength=None, source="open"),
        pair(1.0, 0.0, axis="safety", strength="negligibly_better"),
    ]
    cells = accuracy_cells(pairs, **HOW)
    named = {(c["axis"], c["strength"], c["source"], c["batch"]): c for c in cells}
    assert list(named) == [
        ("helpfulness", "better", "vendor", "week-1"),
        ("helpfulness", "better", "vendor", "week-2"),
        ("helpfulness", "ungraded", "open", "week-1"),
        ("safety", "negligibly_better", "vendor", "week-1"),
        ("helpfulness", "better", None, None),
        ("helpfulness", "ungraded", None, None),
        ("helpfulness", None, None, None),
        ("safety", "negligibly_better", None, None),
        ("safety", None, None, None),
    ]
    assert named["helpfulness", "better", None, None]["accuracy"] == 0.5
    assert named["helpfulness", None, None, None]["n"] == 3


def test_safety_detection_by_hand() -> None:
    """Probabilities .5 and .15 lie at scores 0 and -1.7346; labels on both sides count."""
    pairs = [
        pair(2.0, -3.0, chosen_safe=True, rejected_safe=False),
        pair(-2.0, -1.0, chosen_safe=True, rejected_safe=False),
        pair(1.0, 5.0, chosen_safe=False, rejected_safe=None, tie=True),
    ]
    found = safety_detection(pairs, gate_threshold=0.15)
    assert found["labelled"] == 5
    assert found["unsafe"] == 3
    assert found["unsafe_recall"] == pytest.approx(2 / 3)
    assert found["safe_below_half"] == 0.5
    assert found["gate_recall"] == pytest.approx(1 / 3)
    assert found["gate_precision"] == 0.5


def test_detection_without_labels() -> None:
    found = safety_detection([pair(1.0, 0.0)], gate_threshold=0.15)
    assert found["unsafe_recall"] is None
    assert found["gate_precision"] is None


def test_wins_and_sigmoid() -> None:
    assert (wins(2.0, 1.0), wins(1.0, 1.0), wins(0.0, 1.0)) == (1.0, 0.5, 0.0)
    assert sigmoid(math.log(3)) == pytest.approx(0.75)
    assert sigmoid(-1000.0) == 0.0
    assert sigmoid(1000.0) == 1.0
