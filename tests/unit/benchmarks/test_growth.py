"""Exponents of cost."""

from __future__ import annotations

import pytest

from benchmarks.growth import axes, judge, slope

AXIS = axes(8, longest=64)[0]


def test_the_slope_of_a_power_is_its_exponent() -> None:
    sizes = [1, 2, 4, 8]
    assert slope(sizes, [3 * size**1.7 for size in sizes]) == pytest.approx(1.7)
    assert slope(sizes, [5.0] * 4) == pytest.approx(0)


def test_the_slope_is_of_least_squares() -> None:
    # log2: x 0, 1, 2 and y 0, 2, 1: covariance (-1)(-1) + 0 + (1)(0) = 1 over 2.
    assert slope([1, 2, 4], [1, 4, 2]) == pytest.approx(0.5)


def test_counts_are_powers_of_two() -> None:
    assert axes(8, longest=64)[0].values == (1, 2, 4, 8)
    assert axes(12, longest=64)[0].values == (1, 2, 4, 8)
    assert axes(8, longest=64)[2].values == (8, 16, 32, 64)


def test_linear_cost_is_within() -> None:
    assert judge(AXIS, [1, 2, 4], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0])["within"]


def test_more_than_linear_cost_is_not() -> None:
    assert not judge(AXIS, [1, 2, 4], [1.0, 2.6, 6.8], [1.0, 2.0, 4.0])["within"]


def test_cost_may_grow_as_the_flops_do() -> None:
    assert judge(AXIS, [1, 2, 4], [1.0, 4.0, 16.0], [1.0, 4.0, 16.0])["within"]


def test_fixed_cost_does_not_hide_what_happens_at_the_end() -> None:
    found = judge(AXIS, [1, 2, 4], [10.0, 10.0, 40.0], [1.0, 2.0, 4.0])
    assert found["last_exponent"] == pytest.approx(2)
    assert not found["within"]


def test_a_steep_start_is_not_within_though_the_end_is_flat() -> None:
    assert not judge(AXIS, [1, 2, 4], [1.0, 5.0, 6.0], [1.0, 2.0, 4.0])["within"]
