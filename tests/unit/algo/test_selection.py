import itertools
import math
import statistics

import numpy as np
import pytest

from rlhf.algo.selection import (
    best_of_n,
    best_temperature,
    kl_best_of_n,
    max_and_median_against_n,
    sweep_scores,
)
from rlhf.errors import StageError


@pytest.mark.parametrize(
    ("scores", "winner"),
    [
        ([0.5], 0),
        ([0.1, 0.9, 0.3], 1),
        ([0.1, 0.9, 0.9], 1),  # the first of equal ones
        ([-2.0, -2.0, -3.0], 0),
        ([-math.inf, -5.0], 1),
        (np.array([1.0, 2.0]), 1),
    ],
)
def test_best_of_n(scores, winner):
    assert best_of_n(scores) == winner


def test_best_of_n_refuses_nothing_and_nan():
    with pytest.raises(StageError, match="no scores"):
        best_of_n([])
    # max() would silently return either index, depending on the order.
    for scores in ([math.nan, 1.0], [1.0, math.nan]):
        with pytest.raises(StageError, match="NaN"):
            best_of_n(scores)


def test_max_and_median_by_hand():
    # Scores 1, 2, 6. n = 1: mean 3 for both. n = 2: pairs (1,2), (1,6), (2,6): maxima 2, 6, 6,
    # mean 14/3; medians 1.5, 3.5, 4, mean 3. n = 3: maximum 6, median 2.
    maxima, medians = max_and_median_against_n([[6.0, 1.0, 2.0]])
    assert maxima == pytest.approx([3.0, 14 / 3, 6.0], abs=1e-12)
    assert medians == pytest.approx([3.0, 3.0, 2.0], abs=1e-12)


def test_max_and_median_equal_the_average_over_all_subsets():
    scores = np.random.default_rng(0).normal(size=(3, 7))
    maxima, medians = max_and_median_against_n(scores)
    assert len(maxima) == len(medians) == 7
    for n in range(1, 8):
        subsets = [subset for row in scores for subset in itertools.combinations(row.tolist(), n)]
        assert maxima[n - 1] == pytest.approx(statistics.mean(map(max, subsets)), abs=1e-12)
        middle = statistics.mean(map(statistics.median, subsets))
        assert medians[n - 1] == pytest.approx(middle, abs=1e-12)


def test_max_rises_and_median_stays_for_a_hundred_samples():
    scores = np.random.default_rng(1).normal(size=(4, 100))
    maxima, medians = max_and_median_against_n(scores)
    assert all(b > a for a, b in itertools.pairwise(maxima))
    assert maxima[-1] == pytest.approx(scores.max(axis=1).mean(), abs=1e-12)
    assert medians[-1] == pytest.approx(np.median(scores, axis=1).mean(), abs=1e-12)
    assert max(medians) - min(medians) < 0.2 < maxima[-1] - maxima[0]


def test_max_and_median_refuse_nan_and_nothing():
    with pytest.raises(StageError, match="NaN"):
        max_and_median_against_n([[1.0, math.nan]])
    with pytest.raises(AssertionError, match="at least one"):
        max_and_median_against_n(np.zeros((0, 3)))


def test_kl_best_of_n_by_hand():
    assert kl_best_of_n(1) == 0.0
    assert kl_best_of_n(2) == pytest.approx(0.193147, abs=1e-6)  # 0.693147 - 0.5
    assert kl_best_of_n(4) == pytest.approx(0.636294, abs=1e-6)  # 1.386294 - 0.75
    with pytest.raises(AssertionError, match="at least 1"):
        kl_best_of_n(0)


def test_kl_best_of_n_equals_its_integral():
    # Best of n has density n u^(n-1) in the quantile u: KL = integral of n u^(n-1) log(n u^(n-1)).
    n, steps = 5, 20_000
    density = [n * ((i + 0.5) / steps) ** (n - 1) for i in range(steps)]
    integral = sum(d * math.log(d) for d in density) / steps
    assert kl_best_of_n(n) == pytest.approx(integral, abs=1e-6)


def test_sweep_scores_by_hand():
    # Axis a has values 1 and 3 at the first temperature, 5 and 7 at the second: mean 4, standard
    # deviation sqrt(5). Axis b has 100 and 300: mean 200, standard deviation 100.
    found = sweep_scores([[1, 100, 3], [5, 300, 7]], ["a", "b", "a"])
    root = math.sqrt(5)
    assert found.tolist() == [
        pytest.approx([-3 / root, -1, -1 / root]),
        pytest.approx([1 / root, 1, 3 / root]),
    ]


def test_the_scale_of_a_reward_model_never_decides():
    """Safety in units a thousand times as large, and shifted: the same scores."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 30))
    axes = ["safety" if i % 3 == 0 else "helpfulness" for i in range(30)]
    other = values.copy()
    other[:, ::3] = 1000 * other[:, ::3] + 50
    assert sweep_scores(other, axes) == pytest.approx(sweep_scores(values, axes))


def test_axes_weigh_as_many_prompts_as_they_have():
    # Both axes prefer another temperature by one standard deviation each way; 3 prompts beat 1.
    found = sweep_scores([[0, 0, 0, 1], [1, 1, 1, 0]], ["a", "a", "a", "b"])
    assert found.mean(1).tolist() == [-0.5, 0.5]


def test_an_axis_without_differences_says_nothing():
    assert sweep_scores([[5, 1], [5, 2]], ["a", "b"]).tolist() == [[0, -1], [0, 1]]


def test_sweep_scores_refuse_nan():
    with pytest.raises(StageError, match="NaN or infinite"):
        sweep_scores([[1.0], [math.nan]], ["a"])


@pytest.mark.parametrize(
    ("temperatures", "scores", "best"),
    [
        ([0.7, 1.0, 1.3], [0.1, 0.3, 0.2], 1),
        ([1.3, 1.0, 0.7], [0.3, 0.3, 0.2], 1),  # of equal ones the lower temperature
        ([0.7, 1.0], [0.3, 0.3 + 1e-12], 0),  # rounding is no difference
        ([0.7, 1.0], [-2.0, -1.0], 1),
    ],
)
def test_best_temperature(temperatures, scores, best):
    assert best_temperature(temperatures, scores) == best
