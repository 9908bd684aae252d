"""Drift reports: silent under chance, loud where something changed, honest where nobody can say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drift_world import Recipe, batches, draw, profile_of

from rlhf.algo.intervals import proportion_interval
from rlhf.data.arrival import Arrival
from rlhf.data.drift import drift_report, headline

Rows = list[dict[str, Any]]
RECIPE = Recipe(rows_per_prompt=4)


@pytest.fixture(scope="module")
def population() -> Rows:
    return draw(RECIPE, 6000, seed=1)


def line(report: dict[str, Any], measure: str) -> dict[str, Any]:
    return next(item for item in report["lines"] if item["measure"] == measure)


def alarms(reports: list[dict[str, Any]]) -> float:
    return float(np.mean([report["verdict"] != "as expected" for report in reports]))


@pytest.mark.parametrize(
    ("new", "earlier", "number"), [(25, 25, 30), (60, 1200, 30), (300, 300, 40), (1500, 3000, 6)]
)
def test_chance_stays_quiet(population: Rows, new: int, earlier: int, number: int) -> None:
    reports = []
    for seed in range(number):
        first, second = batches(population, (new, earlier), seed=seed)
        reports.append(drift_report(profile_of(first), [profile_of(second)]))
    assert alarms(reports) <= 0.05


def test_without_the_clusters_chance_would_be_loud(population: Rows) -> None:
    reports = []
    for seed in range(20):
        first, second = (
            profile_of(rows, clustered=False) for rows in batches(population, (300, 300), seed=seed)
        )
        reports.append(drift_report(first, [second]))
    assert alarms(reports) >= 0.3


def test_random_halves_of_a_batch_stay_quiet(population: Rows) -> None:
    reports = []
    for seed in range(30):
        (rows,) = batches(population, (400,), seed=seed)
        mixed = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
        reports.append(drift_report(profile_of(mixed[:200]), [profile_of(mixed[200:])]))
    assert alarms(reports) <= 0.05


def test_the_same_rows_in_another_order_have_no_effect_at_all(population: Rows) -> None:
    (rows,) = batches(population, (300,), seed=1)
    again = [{**row, "id": f"new-{i}"} for i, row in enumerate(reversed(rows))]
    report = drift_report(profile_of(again), [profile_of(rows)])
    assert report["verdict"] == "as expected"
    for item in report["lines"]:
        assert item["p_value"] == 1.0, item
        assert item["effect"] == 0.0, item


CHANGES = {
    "strength": {"strengths": (0.05, 0.15, 0.3, 0.5)},
    "axis": {"safety": 0.75},
    "source": {"sources": (0.1, 0.1, 0.1, 0.7)},
    "turns": {"multi_turn": 0.6},
    "response_length": {"length": 45.0},
    "vocabulary": {"safety": 0.9},
    "new_prompts": {"repeated": 0.9},
    "longer": {"longer": 0.95},
}


@pytest.mark.parametrize("measure", CHANGES)
def test_what_changed_is_named_and_little_else(population: Rows, measure: str) -> None:
    (before,) = batches(population, (2000,), seed=2)
    now = draw(RECIPE.but(**CHANGES[measure]), 800, seed=77)
    report = drift_report(profile_of(now), [profile_of(before)])
    assert line(report, measure)["verdict"] in ("look", "stop")
    assert line(report, measure)["p_value"] < 0.01
    allowed = {measure}
    if "safety" in CHANGES[measure]:
        allowed |= {"axis", "vocabulary", "prompt_length"}
    if measure == "turns":
        allowed |= {"prompt_length", "vocabulary"}
    if measure == "response_length":
        # A longer response holds more different words.
        allowed |= {"vocabulary"}
    loud = {item["measure"] for item in report["lines"] if item["verdict"] != "as expected"}
    assert loud <= allowed


def test_sentences_name_shares_and_new_and_vanished_categories(population: Rows) -> None:
    (before,) = batches(population, (2000,), seed=2)
    now = draw(RECIPE.but(safety=0.8), 800, seed=78)
    before = [{**row, "source": "old"} for row in before]
    now = [{**row, "source": "xstest" if i % 3 == 0 else "old"} for i, row in enumerate(now)]
    report = drift_report(profile_of(now, batch="w2"), [profile_of(before, batch="w1")])
    shares = [
        round(100 * np.mean([row["axis"] == "safety" for row in rows])) for rows in (before, now)
    ]
    axis = line(report, "axis")
    assert axis["verdict"] == "stop"
    assert f"safety {shares[0]} % -> {shares[1]} %" in axis["text"]
    assert axis["value"]["safety"] == pytest.approx(shares[1] / 100, abs=0.005)
    assert "xstest is new: 33 %" in line(report, "source")["text"]
    back = drift_report(profile_of(before), [profile_of(now)])
    assert "xstest is gone (was 33 %)" in line(back, "source")["text"]
    assert "bomb" in line(report, "vocabulary")["value"]
    assert "bread" in line(report, "vocabulary")["before"]
    assert headline(report).startswith("drift of w2 against w1: stop (axis: safety")


def test_a_change_that_many_rows_prove_but_nobody_needs_is_no_alarm() -> None:
    base = Recipe(rows_per_prompt=1.0, habit=1e6)
    profiles = [profile_of(draw(base, 3000, seed=seed)) for seed in (1, 2)]
    for profile, safe in zip(profiles, (0.30, 0.33), strict=True):
        # A hundred times the rows: the counts that a batch of 300,000 would have.
        scale = 100
        axis = profile["measures"]["axis"]
        counts = [round(3000 * scale * (1 - safe)), round(3000 * scale * safe)]
        axis |= {"counts": counts, "clusters": 3000 * scale}
        axis["products"] = [[counts[0], 0], [counts[1]]]
    report = drift_report(profiles[0], [profiles[1]])
    assert line(report, "axis")["p_value"] < 1e-6
    assert line(report, "axis")["verdict"] == "as expected"
    assert line(report, "axis")["text"].endswith("(small)")


def test_the_first_batch_has_nothing_to_be_compared_with(population: Rows) -> None:
    report = drift_report(profile_of(population[:100], batch="w1", is_first=True), [])
    assert report["verdict"] == "as expected"
    assert report["against"] == []
    assert all(item["p_value"] is None for item in report["lines"])
    assert line(report, "axis")["value"]["safety"] > 0
    assert headline(report) == "drift of w1: the first batch, nothing to compare with"


def test_what_is_new_is_not_asked_of_the_first_batch(population: Rows) -> None:
    first, second = batches(population, (300, 300), seed=3)
    now = profile_of(first)
    report = drift_report(now, [profile_of(second, is_first=True)])
    assert line(report, "new_prompts")["p_value"] is None
    assert 0 < line(report, "new_prompts")["value"] < 1


def test_a_few_prompts_are_too_few(population: Rows) -> None:
    few, many = batches(population, (15, 500), seed=4)
    report = drift_report(
        profile_of([{**row, "axis": "safety"} for row in few]), [profile_of(many)]
    )
    assert report["verdict"] == "as expected"
    assert "prompts are too few to tell" in line(report, "axis")["text"]


def test_ungraded_batches_agree_and_a_graded_one_differs(population: Rows) -> None:
    first, second = batches(population, (400, 400), seed=5)
    blank = [{**row, "strength": None} for row in second]
    ungraded = profile_of(blank)
    same = drift_report(profile_of([{**r, "strength": None} for r in first]), [ungraded])
    assert line(same, "strength")["verdict"] == "as expected"
    assert line(same, "strength")["value"] == {"ungraded": 1.0}
    found = line(drift_report(profile_of(first), [ungraded]), "strength")
    assert found["verdict"] == "stop"
    assert "ungraded is gone (was 100 %)" in found["text"]


def test_a_batch_without_safety_rows_says_so(population: Rows) -> None:
    first, second = batches(population, (200, 200), seed=6)
    plain = [
        {**r, "axis": "helpfulness", "chosen_safe": None, "rejected_safe": None} for r in first
    ]
    report = drift_report(profile_of(plain), [profile_of(second)])
    assert line(report, "safety_bins")["text"].endswith("none of the safety comparisons")


def test_p_values_are_corrected_over_the_lines(population: Rows) -> None:
    first, second = batches(population, (300, 300), seed=7)
    second = [{**row, "tie": i % 4 == 0} for i, row in enumerate(second)]
    report = drift_report(profile_of(first), [profile_of(second)])
    tested = sorted(item["p_value"] for item in report["lines"] if item["p_value"] is not None)
    assert len(tested) == 11
    again = drift_report(
        profile_of(first),
        [profile_of(second)],
        arrivals=[arrival("helpfulness", {"better": (140, 200)}, {"better": (140, 200)})],
    )
    # One more line: the smallest p-value is multiplied by 12 in place of 11.
    assert line(again, "ties")["p_value"] == pytest.approx(
        line(report, "ties")["p_value"] * 12 / 11
    )


def test_prompts_that_come_back_in_earlier_batches_do_not_count_anew(population: Rows) -> None:
    first, second = batches(population, (400, 400), seed=8)
    other = [
        {**row, "strength": "better" if i % 2 else row["strength"]} for i, row in enumerate(second)
    ]
    now, before = profile_of(first), profile_of(other)
    once = drift_report(now, [before])
    before["prompts"]["new"] = 0
    thrice = drift_report(now, [before, before, before])
    assert line(thrice, "strength")["effect"] == pytest.approx(line(once, "strength")["effect"])
    forgetful = [{**before, "batch": name} for name in "abc"]
    for profile in forgetful:
        profile["prompts"] = {"distinct": 10**6, "new": 10**6}
    statistics = [
        line(report, "strength")["statistic"]
        for report in (once, thrice, drift_report(now, forgetful))
    ]
    assert statistics[1] == pytest.approx(statistics[0], rel=0.2)
    assert statistics[2] > 1.15 * statistics[1]


# On-arrival accuracy


def cells(axis: str, right: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Return accuracy.json with (right, of) per strength, one row a prompt."""
    total = tuple(np.sum(list(right.values()), axis=0).tolist())
    found = []
    for strength, (good, n) in {**right, None: total}.items():
        interval = proportion_interval([1.0] * good + [0.0] * (n - good), list(range(n)))
        found.append(
            {
                **{"axis": axis, "strength": strength, "source": None, "batch": None},
                **{"n": n, "prompts": n, "accuracy": interval.mean},
                **{"low": interval.low, "high": interval.high},
            }
        )
    return {"cells": found}


def arrival(axis: str, now: dict[str, Any], earlier: dict[str, Any]) -> Arrival:
    return Arrival(axis, cells(axis, now), cells(axis, earlier), level=0.95)


def arrive(population: Rows, now: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    profile = profile_of(population[:100])
    report = drift_report(profile, [profile], arrivals=[arrival("safety", now, earlier)])
    return line(report, "accuracy_safety")


def test_disagreement_of_the_reward_model_stops(population: Rows) -> None:
    found = arrive(population, {"better": (200, 400)}, {"better": (300, 400)})
    assert found["verdict"] == "stop"
    assert found["value"] == 0.5
    assert found["before"] == 0.75
    assert "50 % of 400" in found["text"]
    assert "is 75 %" in found["text"]


def test_a_harder_mix_of_strengths_is_no_disagreement(population: Rows) -> None:
    held = {"significantly_better": (270, 300), "negligibly_better": (165, 300)}
    now = {"significantly_better": (90, 100), "negligibly_better": (220, 400)}
    found = arrive(population, now, held)
    assert found["value"] == pytest.approx(0.62)
    assert found["before"] == pytest.approx(0.2 * 0.9 + 0.8 * 0.55)
    assert found["verdict"] == "as expected"


def test_an_accuracy_that_is_too_good_is_looked_at_and_never_stops(population: Rows) -> None:
    assert arrive(population, {"better": (396, 400)}, {"better": (240, 400)})["verdict"] == "look"


def test_a_strength_that_was_never_held_out_takes_the_accuracy_of_all(population: Rows) -> None:
    found = arrive(population, {"better": (60, 100)}, {"slightly_better": (120, 200)})
    assert found["before"] == pytest.approx(0.6)
    few = arrive(population, {"better": (10, 20)}, {"better": (150, 200)})
    assert few["p_value"] is None
    assert few["verdict"] == "as expected"
