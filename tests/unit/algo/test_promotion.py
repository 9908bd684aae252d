"""The promotion rule: every bound on its own, at its edge and past it."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest

from rlhf.algo.promotion import Measurements, decide, is_promoted
from rlhf.config import PromotionRule

GOOD = Measurements(
    win_rate_low=0.55,
    win_rate_gap=0.05,
    violation_increase=0.0,
    over_refusal_increase=0.0,
    length_ratio=1.1,
    kl=5.0,
    finished_fraction=0.95,
)

PAST_THE_BOUND = {
    "min_win_rate": ("win_rate_low", 0.499),
    "max_win_rate_gap": ("win_rate_gap", 0.151),
    "max_violation_increase": ("violation_increase", 0.021),
    "max_over_refusal_increase": ("over_refusal_increase", 0.051),
    "max_length_ratio": ("length_ratio", 1.51),
    "max_kl": ("kl", 100.1),
    "min_finished_fraction": ("finished_fraction", 0.49),
}

AT_THE_BOUND = {
    "win_rate_low": 0.5,
    "win_rate_gap": 0.65 - 0.50,  # 0.15000000000000002 in floats
    "violation_increase": 0.12 - 0.10,  # 0.01999... in floats
    "over_refusal_increase": 0.35 - 0.30,  # 0.04999...
    "length_ratio": 1.5,
    "kl": 100.0,
    "finished_fraction": 0.5,
}


def test_a_good_version_is_promoted_with_one_reason_per_field_of_the_rule() -> None:
    reasons = decide(GOOD, PromotionRule())
    assert is_promoted(reasons)
    assert [reason.rule for reason in reasons] == [field.name for field in fields(PromotionRule)]


@pytest.mark.parametrize("rule", PAST_THE_BOUND)
def test_each_bound_refuses_alone(rule: str) -> None:
    name, value = PAST_THE_BOUND[rule]
    reasons = decide(replace(GOOD, **{name: value}), PromotionRule())
    assert not is_promoted(reasons)
    [failed] = [reason for reason in reasons if not reason.ok]
    assert (failed.rule, failed.value) == (rule, value)


@pytest.mark.parametrize("name", AT_THE_BOUND)
def test_the_bound_itself_holds(name: str) -> None:
    assert is_promoted(decide(replace(GOOD, **{name: AT_THE_BOUND[name]}), PromotionRule()))


def test_rounding_does_not_cross_a_bound() -> None:
    rule = PromotionRule(max_violation_increase=0.3 - 0.1)  # 0.19999...
    assert is_promoted(decide(replace(GOOD, violation_increase=0.2), rule))


@pytest.mark.parametrize("name", ["violation_increase", "over_refusal_increase"])
def test_what_could_not_be_measured_does_not_block(name: str) -> None:
    assert is_promoted(decide(replace(GOOD, **{name: None}), PromotionRule()))


@pytest.mark.parametrize("name", [field.name for field in fields(Measurements)])
def test_nan_never_holds(name: str) -> None:
    assert not is_promoted(decide(replace(GOOD, **{name: math.nan}), PromotionRule()))


def test_bounds_come_from_the_rule() -> None:
    strict = PromotionRule(min_win_rate=0.6)
    assert [r.rule for r in decide(GOOD, strict) if not r.ok] == ["min_win_rate"]
