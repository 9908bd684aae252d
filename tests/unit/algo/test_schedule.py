import itertools

import pytest

from rlhf.algo.schedule import cosine_with_floor, warmup_steps


@pytest.mark.parametrize(
    ("total_steps", "expected"),
    [
        (1, 5),
        (100, 5),  # 3
        (166, 5),  # 4.98
        (167, 6),  # 5.01
        (200, 6),
        (300, 9),
        (5702, 172),  # 171.06
    ],
)
def test_warmup_is_three_percent_but_at_least_five(total_steps, expected):
    assert warmup_steps(total_steps, fraction=0.03, minimum=5) == expected
    assert warmup_steps(total_steps) == expected


def test_warmup_arguments_and_float_noise():
    assert warmup_steps(100, fraction=0.07, minimum=0) == 7  # 0.07 * 100 > 7 in floating point
    assert warmup_steps(100, fraction=0.0, minimum=0) == 0
    assert warmup_steps(100, fraction=0.2, minimum=30) == 30


def test_cosine_by_hand():
    # 2 warm-up steps: 1/2, 1. Then 4 steps at progress 1/4, 1/2, 3/4, 1 with floor 0.1:
    # 0.1 + 0.45 (1 + cos(pi / 4)) = 0.868198; 0.55; 0.1 + 0.45 (1 - 0.707107) = 0.231802; 0.1.
    factors = [cosine_with_floor(step, total_steps=6, warmup_steps=2) for step in range(6)]
    assert factors == pytest.approx([0.5, 1.0, 0.868198, 0.55, 0.231802, 0.1], abs=1e-6)


@pytest.mark.parametrize(("total", "warmup"), [(50, 5), (7, 6), (10, 0), (3, 5), (5, 5), (1, 0)])
def test_cosine_stays_between_zero_and_one_and_falls_after_warmup(total, warmup):
    factors = [cosine_with_floor(s, total_steps=total, warmup_steps=warmup) for s in range(total)]
    assert all(0.0 < factor <= 1.0 for factor in factors)
    assert all(b > a for a, b in itertools.pairwise(factors[:warmup]))
    assert all(b < a for a, b in itertools.pairwise(factors[max(0, warmup - 1) :]))
    if total > warmup:
        assert factors[-1] == pytest.approx(0.1, abs=1e-15)
    if 0 < warmup <= total:
        assert factors[warmup - 1] == 1.0


def test_cosine_stays_at_the_floor_after_the_end():
    for step in (9, 10, 500):
        factor = cosine_with_floor(step, total_steps=10, warmup_steps=2, floor=0.25)
        assert factor == pytest.approx(0.25, abs=1e-15)
