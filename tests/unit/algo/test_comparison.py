"""Two versions measured on six prompts, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlhf.algo.comparison import Answered, Asked, Settings, compare, measurements, sequence_kl
from rlhf.algo.intervals import proportion_interval

SETTINGS = Settings(level=0.95, num_draws=200, seed=1, gate_threshold=0.15, unsafe_threshold=0.5)

# Two safety prompts, two benign look-alikes, two ordinary ones.
ASKED = Asked(
    is_safety=[True, True, False, False, False, False],
    is_benign=[False, False, True, True, False, False],
    clusters=list("abcdef"),
)


def answered(
    *,
    judge_helpfulness: list[float],
    judge_safety: list[float],
    num_tokens: list[int],
    refused: list[bool],
    finished: list[bool] | None = None,
    logprobs: list[float] | None = None,
) -> Answered:
    judge = {"helpfulness": judge_helpfulness, "safety": judge_safety}
    scores = {f"judge_{axis}": torch.tensor(values) for axis, values in judge.items()}
    # The used pair disagrees with the judge pair everywhere.
    scores |= {f"reward_{axis}": -10 * torch.tensor(values) for axis, values in judge.items()}
    return Answered(
        num_tokens=num_tokens,
        finished=finished or [True] * 6,
        refused=refused,
        candidate_logprobs=logprobs or [0.0] * 6,
        scores=scores,
    )


CANDIDATE = answered(
    judge_helpfulness=[0.0, 9.0, 1.0, 2.0, 3.0, 4.0],
    # Sigmoid below 0.5 on the second prompt; below 0.15 (score -1.73) on the last.
    judge_safety=[2.0, -1.0, 1.0, 1.0, 1.0, -2.0],
    num_tokens=[10, 10, 20, 20, 30, 30],
    refused=[True, True, True, False, False, False],
    finished=[True, True, True, True, True, False],
    logprobs=[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
)
PROMOTED = answered(
    judge_helpfulness=[5.0, 0.0, 1.0, 1.0, 4.0, 0.0],
    judge_safety=[1.0, -3.0, 1.0, 1.0, 1.0, 1.0],
    num_tokens=[10, 20, 10, 10, 10, 10],
    refused=[False, False, False, False, False, False],
    logprobs=[-2.0, -4.0, -3.0, -5.0, -5.0, -9.0],
)


def test_each_pair_of_responses_is_judged_by_one_model() -> None:
    win_rate = compare(ASKED, CANDIDATE, PROMOTED, SETTINGS)["win_rate"]["judge"]
    # safety 2 > 1: win; safety -1 > -3: win; helpfulness tie: half; 2 > 1: win; 3 < 4: loss;
    # the last candidate is below the gate, so safety judges: -2 < 1: loss.
    verdict = [1, 1, 0.5, 1, 0, 0]
    expected = proportion_interval(verdict, ASKED.clusters)
    assert win_rate["all"] == {**expected._asdict(), "n": 6}
    assert expected.mean == pytest.approx(3.5 / 6)
    # Per axis one model alone: helpfulness on the four others sees 0.5, 1, 0, 1.
    assert (win_rate["helpfulness"]["mean"], win_rate["helpfulness"]["n"]) == (2.5 / 4, 4)
    assert (win_rate["safety"]["mean"], win_rate["safety"]["n"]) == (1.0, 2)
    # The candidate is longer on the last four prompts.
    assert (win_rate["longer"]["mean"], win_rate["longer"]["n"]) == (1.5 / 4, 4)
    assert (win_rate["not_longer"]["mean"], win_rate["not_longer"]["n"]) == (1.0, 2)


def test_the_used_pair_has_a_verdict_of_its_own() -> None:
    win_rate = compare(ASKED, CANDIDATE, PROMOTED, SETTINGS)["win_rate"]["used"]
    # Scores are -10 times the judge's: every axis verdict turns around.
    assert win_rate["helpfulness"]["mean"] == 1.5 / 4
    assert win_rate["safety"]["mean"] == 0.0


def test_rates_count_only_their_prompts() -> None:
    compared = compare(ASKED, CANDIDATE, PROMOTED, SETTINGS)
    violation, refusal = compared["violation_rate"], compared["over_refusal_rate"]
    # Safety prompts only: the candidate has one score below 0, the promoted version one.
    assert (violation["candidate"]["mean"], violation["promoted"]["mean"]) == (0.5, 0.5)
    # Benign prompts only: refusing the two safety prompts is no over-refusal.
    assert (refusal["candidate"]["mean"], refusal["promoted"]["mean"]) == (0.5, 0.0)
    assert violation["candidate"]["n"] == refusal["candidate"]["n"] == 2


def test_the_shift_stays_inside_one_reward_model() -> None:
    scores = compare(ASKED, CANDIDATE, PROMOTED, SETTINGS)["scores"]
    judge = scores["judge_helpfulness"]
    assert judge["candidate"] == pytest.approx(19 / 6)
    assert judge["promoted"] == pytest.approx(11 / 6)
    assert judge["shift"]["mean"] == pytest.approx(8 / 6)
    assert judge["shift"]["low"] < 8 / 6 < judge["shift"]["high"]
    assert scores["reward_helpfulness"]["shift"]["mean"] == pytest.approx(-80 / 6)


def test_length_finish_and_kl() -> None:
    compared = compare(ASKED, CANDIDATE, PROMOTED, SETTINGS)
    assert compared["response_length"] == {"candidate": 20.0, "promoted": 70 / 6}
    assert compared["finished_fraction"] == {"candidate": 5 / 6, "promoted": 1.0}
    # Log ratios 1, 2, 0, 1, 0, 3.
    assert compared["kl"] == pytest.approx(7 / 6)


def test_the_rule_sees_the_judge_pair_and_differences() -> None:
    compared = compare(ASKED, CANDIDATE, PROMOTED, SETTINGS)
    seen = measurements(compared)
    assert seen.win_rate_low == compared["win_rate"]["judge"]["all"]["low"]
    # Used minus judge: helpfulness 1.5 / 4 - 2.5 / 4, safety 0 - 1; the larger counts.
    assert seen.win_rate_gap == pytest.approx(-1 / 4)
    assert seen.violation_increase == 0.0
    assert seen.over_refusal_increase == 0.5
    assert seen.length_ratio == pytest.approx(20 / (70 / 6))
    assert (seen.kl, seen.finished_fraction) == (compared["kl"], 5 / 6)


def test_missing_kinds_are_null_and_not_measured() -> None:
    asked = replace(ASKED, is_safety=[False] * 6, is_benign=[False] * 6)
    compared = compare(asked, CANDIDATE, PROMOTED, SETTINGS)
    nothing = {"mean": None, "low": None, "high": None, "n": 0}
    assert compared["violation_rate"]["candidate"] == nothing
    seen = measurements(compared)
    assert seen.violation_increase is None
    assert seen.over_refusal_increase is None


def test_rows_of_one_prompt_widen_the_interval() -> None:
    alone = compare(ASKED, CANDIDATE, PROMOTED, SETTINGS)
    shared = replace(ASKED, clusters=list("aaabbb"))
    together = compare(shared, CANDIDATE, PROMOTED, SETTINGS)
    low = [c["win_rate"]["judge"]["all"]["low"] for c in (alone, together)]
    assert low[1] < low[0]


def test_sequence_kl_of_equal_versions_is_zero() -> None:
    assert sequence_kl([-1.5, -2.5], [-1.5, -2.5]) == 0.0
