"""The promotion rule: measurements in, a verdict with its reasons out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config import PromotionRule

ROUNDING = 1e-9
"""Slack of every bound: a rate of 0.12 minus one of 0.10 is not exactly 0.02 in floats."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """What the rule looks at; None where there were no prompts to measure it on."""

    win_rate_low: float
    """Lower confidence bound of the candidate's win rate under the judge pair."""
    win_rate_gap: float | None
    """Win rate under the used pair minus the judge pair's; the larger of the two axes."""
    violation_increase: float | None
    """Judged violation rate on safety prompts, candidate minus promoted."""
    over_refusal_increase: float | None
    """Refusal rate on benign look-alikes, candidate minus promoted."""
    length_ratio: float
    """Mean response length in tokens, candidate over promoted."""
    kl: float
    """Mean sequence KL(candidate || promoted) in nats."""
    finished_fraction: float
    """Share of the candidate's responses that ended by themselves."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One bound of the rule: the field's name, what was measured, the bound, whether it holds."""

    rule: str
    value: float | None
    bound: float
    ok: bool


def decide(measured: Measurements, rule: PromotionRule) -> list[Reason]:
    """Hold every measurement against its bound; the version is promoted if all are ok.

    NaN never holds. None holds: a bound that nothing could be measured for does not block.
    """
    return [
        _at_least("min_win_rate", measured.win_rate_low, rule.min_win_rate),
        _at_most("max_win_rate_gap", measured.win_rate_gap, rule.max_win_rate_gap),
        _at_most(
            "max_violation_increase", measured.violation_increase, rule.max_violation_increase
        ),
        _at_most(
            "max_over_refusal_increase",
            measured.over_refusal_increase,
            rule.max_over_refusal_increase,
        ),
        _at_most("max_length_ratio", measured.length_ratio, rule.max_length_ratio),
        _at_most("max_kl", measured.kl, rule.max_kl),
        _at_least("min_finished_fraction", measured.finished_fraction, rule.min_finished_fraction),
    ]


def is_promoted(reasons: Sequence[Reason]) -> bool:
    """Tell whether every bound holds."""
    return all(reason.ok for reason in reasons)


def _at_least(rule: str, value: float, bound: float) -> Reason:
    return Reason(rule, value, bound, value >= bound - ROUNDING)


def _at_most(rule: str, value: float | None, bound: float) -> Reason:
    return Reason(rule, value, bound, value is None or value <= bound + ROUNDING)
