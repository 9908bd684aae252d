"""When a run over-optimises: planted curves with known answers, and how often noise alone does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from rlhf.algo.over_optimisation import (
    CANNOT_TELL,
    MIN_PROMPTS,
    NO_SIGN,
    OVER,
    Curve,
    judge_curve,
    judge_curves,
)


def curve(
    used: Sequence[float],
    canary: Sequence[float],
    *,
    prompts: int = 64,
    noise: float = 0.5,
    seed: int = 0,
) -> Curve:
    """Return scorings every 5 iterations with these means: prompts differ much, scorings less."""
    rng = np.random.default_rng(seed)
    base_P = rng.normal(size=prompts) * 3
    size = (len(used), prompts)
    return Curve(
        iterations=[5 * i for i in range(len(used))],
        used_IP=np.array(used)[:, None] + base_P + noise * rng.normal(size=size),
        canary_IP=np.array(canary)[:, None] + base_P + noise * rng.normal(size=size),
        clusters=list(range(prompts)),
    )


def test_a_canary_that_falls_while_the_used_score_rises_is_over_optimisation() -> None:
    """Gao's picture: the canary has its maximum at 10; 15 may be noise, 20 and 25 are not."""
    found = judge_curve(curve([0, 1, 2, 3, 4, 5], [0, 1, 2, 1.85, 0.8, 0]), level=0.95)
    assert (found["verdict"], found["since"]) == (OVER, 20)
    assert (found["best_iteration"], found["last_iteration"]) == (10, 25)
    assert found["used_change"]["low"] > 0
    assert found["canary_change"]["high"] < 0
    assert found["canary_change"]["mean"] == pytest.approx(-2, abs=0.3)
    assert found["n"] == 64


def test_both_rising_is_no_sign() -> None:
    found = judge_curve(curve([0, 1, 2, 3], [0, 0.5, 1, 1.5]), level=0.95)
    assert (found["verdict"], found["since"]) == (NO_SIGN, None)
    assert found["best_iteration"] == found["last_iteration"] == 15


def test_a_policy_that_gets_worse_on_both_is_no_over_optimisation() -> None:
    assert judge_curve(curve([3, 2, 1, 0], [3, 2, 1, 0]), level=0.95)["verdict"] == NO_SIGN


def test_one_bad_scoring_in_the_middle_is_no_sign() -> None:
    found = judge_curve(curve([0, 1, 2, 3, 4], [0, 2, 0, 1.9, 2.05]), level=0.95)
    assert (found["verdict"], found["since"]) == (NO_SIGN, None)


def test_since_is_the_start_of_the_last_stretch() -> None:
    """It falls at 10, is back at 15, and falls for good at 20."""
    found = judge_curve(curve([0, 1, 2, 3, 4, 5], [0, 2, 0, 2, 0, 0]), level=0.95)
    assert (found["verdict"], found["since"]) == (OVER, 20)


def test_pairs_by_prompt_show_what_means_alone_would_hide() -> None:
    """Prompts differ by 3, the fall is 0.5: only the paired difference can see it."""
    small = curve([0, 1, 2], [0, 0.5, 0], prompts=100, noise=0.3)
    assert judge_curve(small, level=0.95)["verdict"] == OVER
    unpaired = np.random.default_rng(1)
    shuffled = Curve(
        small.iterations,
        small.used_IP,
        np.stack([unpaired.permutation(row) for row in small.canary_IP]),
        small.clusters,
    )
    assert judge_curve(shuffled, level=0.95)["verdict"] == NO_SIGN


@pytest.mark.parametrize(
    ("prompts", "scorings", "expected"),
    [
        (MIN_PROMPTS, 3, OVER),
        (MIN_PROMPTS - 1, 3, CANNOT_TELL),
        (64, 2, OVER),
        (64, 1, CANNOT_TELL),
        (0, 3, CANNOT_TELL),
        (64, 0, CANNOT_TELL),
    ],
)
def test_too_little_to_tell(prompts: int, scorings: int, expected: str) -> None:
    used, canary = [0.0, 1.0, 2.0][:scorings], [9.0, 5.0, 0.0][:scorings]
    found = judge_curve(curve(used, canary, prompts=prompts), level=0.95)
    assert found["verdict"] == expected
    assert found["n"] == prompts


def test_repeated_prompts_count_once() -> None:
    many = curve([0, 1, 2], [9, 5, 0], prompts=60)
    few = Curve(many.iterations, many.used_IP, many.canary_IP, [i % 10 for i in range(60)])
    assert judge_curve(few, level=0.95)["verdict"] == CANNOT_TELL


def test_noise_alone_seldom_raises_the_alarm() -> None:
    """A flat canary, its maximum anywhere among 6 scorings: 2.5 % false alarms, and noise."""
    alarms = sum(
        judge_curve(curve(range(6), [0] * 6, seed=seed), level=0.95)["verdict"] == OVER
        for seed in range(1000)
    )
    assert alarms / 1000 <= 0.025 + 2 * 0.005


def test_the_worst_axis_is_the_verdict() -> None:
    bad, good = curve([0, 1, 2], [2, 1, 0]), curve([0, 1, 2], [0, 1, 2])
    few = curve([0, 1, 2], [2, 1, 0], prompts=5)
    found = judge_curves({"helpfulness": good, "safety": bad}, level=0.95)
    assert (found["verdict"], found["since"]) == (OVER, 5)
    assert "on safety the used" in found["text"]
    assert found["axes"]["helpfulness"]["verdict"] == NO_SIGN
    half = judge_curves({"helpfulness": good, "safety": few}, level=0.95)
    assert (half["verdict"], half["since"]) == (NO_SIGN, None)
    assert half["text"].endswith("(cannot tell about safety: too few prompts)")
    none = judge_curves({"helpfulness": few, "safety": few}, level=0.95)
    assert none["verdict"] == CANNOT_TELL
    late = curve([0, 1, 2, 3], [0, 1, 2, 0])
    assert judge_curves({"helpfulness": late, "safety": bad}, level=0.95)["since"] == 5
