"""Annotator and vendor quality: the odd one is flagged with its counts, the others are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf.data.quality import quality_report
from rlhf.data.records import STRENGTHS

Row = dict[str, Any]


def judged(
    name: str,
    n: int,
    *,
    seed: int,
    longer: float = 0.55,
    ties: float = 0.05,
    agrees: float = 0.7,
    only: str | None = None,
    axis: str = "helpfulness",
    source: str = "vendor",
    scored: bool = True,
) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        sizes = sorted(rng.choice(np.arange(5, 90), size=2, replace=False).tolist())
        if rng.random() < longer:
            sizes.reverse()
        gap = 1.0 if rng.random() < agrees else -1.0
        rows.append(
            {
                **{"annotator": name, "source": source, "axis": axis},
                **{"strength": only or str(rng.choice(STRENGTHS)), "tie": rng.random() < ties},
                "prompt": f"{name if i % 2 else 'shared'}-{seed}-{i // 3}",
                **{"chosen_tokens": sizes[0], "rejected_tokens": sizes[1]},
                **{"chosen_score": gap if scored else None, "rejected_score": 0.0},
            }
        )
    return rows


def crowd(**odd: Any) -> list[Row]:
    rows = [row for i in range(5) for row in judged(f"person-{i}", 300, seed=i)]
    return rows + judged("odd", 240, seed=99, **odd)


def by_name(report: dict[str, Any]) -> dict[str, Row]:
    return {row["name"]: row for row in report["rows"]}


def test_a_row_of_the_report_by_hand() -> None:
    common = {"annotator": "a", "source": "s", "axis": "safety", "tie": False}
    rows = [
        {**common, "prompt": "p", "strength": "better", "chosen_tokens": 5, "rejected_tokens": 2},
        {**common, "prompt": "p", "strength": None, "chosen_tokens": 2, "rejected_tokens": 2},
        {**common, "prompt": "q", "strength": "better", "chosen_tokens": 1, "rejected_tokens": 2},
        {
            **{**common, "tie": True, "prompt": "q", "strength": "negligibly_better"},
            **{"chosen_tokens": 9, "rejected_tokens": 2},
        },
    ]
    rows[0] |= {"chosen_score": 1.0, "rejected_score": -1.0}
    rows[1] |= {"chosen_score": 0.5, "rejected_score": 0.5}
    rows[3] |= {"chosen_score": 9.0, "rejected_score": 0.0}
    (found,) = quality_report([*rows, {**rows[0], "annotator": None}], by="annotator")["rows"]
    assert (found["name"], found["n"], found["prompts"]) == ("a", 4, 2)
    assert found["strengths"] == {
        **{"significantly_better": 0, "better": 2, "slightly_better": 0},
        **{"negligibly_better": 1, "ungraded": 1},
    }
    assert (found["ties"]["mean"], found["ties"]["n"]) == (0.25, 4)
    assert (found["longer_preferred"]["mean"], found["longer_preferred"]["n"]) == (0.5, 3)
    assert (found["agreement"]["mean"], found["agreement"]["n"]) == (0.75, 2)
    assert found["agreement"]["low"] < 0.75 < found["agreement"]["high"]
    assert found["flags"] == []


def test_people_who_judge_alike_get_no_flags() -> None:
    flagged = 0
    for seed in range(20):
        rows = [row for i in range(6) for row in judged(f"p{i}", 120, seed=100 * seed + i)]
        flagged += any(row["flags"] for row in quality_report(rows)["rows"])
    assert flagged <= 1


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"longer": 0.92}, "prefers the longer response in"),
        ({"ties": 0.5}, "a tie, others"),
        ({"agrees": 0.45}, "agrees with the reward models in"),
        ({"only": "slightly_better"}, "says slightly_better in 100 % of 240, others in 2"),
    ],
)
def test_the_odd_one_is_flagged_and_nobody_else(odd: dict[str, Any], words: str) -> None:
    found = by_name(quality_report(crowd(**odd)))
    (flag,) = found.pop("odd")["flags"]
    assert words in flag
    assert all(row["flags"] == [] for row in found.values())


def test_a_flag_has_the_counts() -> None:
    found = by_name(quality_report(crowd(longer=0.92)))["odd"]
    share, n = found["longer_preferred"]["mean"], found["longer_preferred"]["n"]
    others = f"others in {100 * 0.55:.0f}"
    assert found["flags"][0].startswith(
        f"prefers the longer response in {100 * share:.0f} % of {n}, others in 5"
    ), others


def test_a_busy_odd_one_does_not_make_the_others_look_odd() -> None:
    rows = [row for i in range(4) for row in judged(f"person-{i}", 150, seed=i)]
    rows += judged("odd", 3000, seed=9, longer=0.95)
    found = by_name(quality_report(rows))
    assert found.pop("odd")["flags"]
    assert all(row["flags"] == [] for row in found.values())


def test_agreeing_more_is_no_flag() -> None:
    assert by_name(quality_report(crowd(agrees=0.98)))["odd"]["flags"] == []


def test_of_two_that_differ_both_are_named() -> None:
    rows = judged("a", 300, seed=1) + judged("b", 300, seed=2, longer=0.9)
    assert all(row["flags"] for row in quality_report(rows)["rows"])


def test_a_few_rows_get_no_flag() -> None:
    rows = [row for i in range(5) for row in judged(f"person-{i}", 300, seed=i)]
    rows += judged("odd", 25, seed=9, longer=1.0, ties=0.0)
    assert by_name(quality_report(rows))["odd"]["flags"] == []


def test_people_are_compared_on_the_same_kinds_of_comparison() -> None:
    # Longer responses win on helpfulness and lose on safety, whoever judges.
    rows = [
        row
        for i in range(4)
        for axis, longer, n in (("helpfulness", 0.8, 250), ("safety", 0.3, 60))
        for row in judged(f"person-{i}", n, seed=10 * i + n, longer=longer, axis=axis)
    ]
    rows += judged("safety-expert", 300, seed=77, longer=0.3, axis="safety")
    assert by_name(quality_report(rows))["safety-expert"]["flags"] == []


def test_sources_are_compared_too() -> None:
    rows = [row for i in range(3) for row in judged("x", 300, seed=i, source=f"vendor-{i}")]
    rows += judged("x", 300, seed=9, source="odd", ties=0.6)
    report = quality_report(rows, by="source")
    assert report["by"] == "source"
    assert [row["name"] for row in report["rows"] if row["flags"]] == ["odd"]


def test_without_scores_there_is_no_agreement() -> None:
    (found,) = quality_report(judged("a", 40, seed=1, scored=False))["rows"]
    assert found["agreement"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert quality_report([]) == {"by": "annotator", "rows": []}
