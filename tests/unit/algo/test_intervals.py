import math
import random
import statistics
from statistics import NormalDist

import numpy as np
import pytest

from rlhf.algo.intervals import (
    _t_quantile,
    clustered_bootstrap,
    clustered_mean,
    effective_size,
    interval_json,
    paired_clustered_bootstrap,
    proportion_interval,
    wilson,
)


def test_wilson_by_hand():
    # 8 of 10 at z = 2: p 0.8, z^2/n = 0.4. Center 0.8 + 0.2 = 1.0; half width
    # 2 sqrt(0.016 + 0.01) = 0.322490; divided by 1.4: 0.483936 and 0.944636.
    assert wilson(8, 10, 2.0) == pytest.approx((0.8, 0.483936, 0.944636), abs=1e-6)


def test_wilson_limits_solve_the_score_equation():
    # The limits are the p with |p_hat - p| = z sqrt(p (1 - p) / n).
    for successes, n in [(3, 20), (50, 100), (19, 20)]:
        mean, low, high = wilson(successes, n, 1.96)
        for p in (low, high):
            assert abs(mean - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-12)


def test_wilson_at_the_edges():
    # 0 of 5 at z = 2: high = z^2 / (n + z^2) = 4/9; 5 of 5 mirrors it.
    assert wilson(0, 5, 2.0) == pytest.approx((0.0, 0.0, 4 / 9), abs=1e-15)
    assert wilson(5, 5, 2.0) == pytest.approx((1.0, 5 / 9, 1.0), abs=1e-15)
    assert all(math.isnan(x) for x in wilson(0, 0, 2.0))
    with pytest.raises(AssertionError, match="between 0 and n"):
        wilson(6, 5, 2.0)


# Two-sided 95 % quantiles of Student's t from any statistics table.
@pytest.mark.parametrize(
    ("df", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045), (99, 1.984)],
)
def test_t_quantile(df, expected):
    assert _t_quantile(0.95, df) == pytest.approx(expected, rel=2e-3)


def test_independent_rows_get_the_plain_wilson_interval():
    rows = [1] * 15 + [0] * 5
    interval = proportion_interval(rows, range(20))
    assert interval == pytest.approx(wilson(15, 20, 1.959964), abs=1e-6)
    narrower = proportion_interval(rows, range(20), level=0.8)
    assert interval.low < narrower.low < narrower.high < interval.high


def test_proportion_interval_by_hand():
    # Clusters a: 1 1, b: 1 1, c: 0 0, d: 1 0. n 8, p 5/8. Residual sums: a, b 2 - 1.25 = 0.75,
    # c -1.25, d -0.25; squares 0.5625 + 0.5625 + 1.5625 + 0.0625 = 2.75. Variance 4/3 * 2.75 / 64
    # = 0.0572917. p (1 - p) / variance = 0.234375 / 0.0572917 = 4.090909.
    # z / t_3 = 1.959964 / 3.1786170 = 0.6166103 (t as our expansion gives it): 2.522497.
    interval = proportion_interval([1, 1, 1, 1, 0, 0, 1, 0], list("aabbccdd"))
    effective = 4.090909 * 0.6166103
    expected = wilson(0.625 * effective, effective, 1.959964)
    assert interval == pytest.approx(expected, abs=1e-5)
    # At a level of 0.8 z is 1.281552 and t_3 is 1.637744 in any table.
    effective = 4.090909 * 1.281552 / 1.637744
    narrower = proportion_interval([1, 1, 1, 1, 0, 0, 1, 0], list("aabbccdd"), level=0.8)
    assert narrower == pytest.approx(wilson(0.625 * effective, effective, 1.281552), abs=1e-4)


def test_repeating_every_row_adds_no_certainty():
    rows, labels = [1, 0, 1, 1, 0, 1, 1, 1, 0, 1] * 3, list(range(30))
    once = proportion_interval(rows, labels)
    often = proportion_interval(rows * 5, labels * 5)
    assert often.mean == once.mean
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.1)
    naive = wilson(5 * sum(rows), 150, 1.96)
    assert often.high - often.low > 1.8 * (naive.high - naive.low)


def test_the_interval_is_never_narrower_than_for_independent_rows():
    # Each prompt has one success and one failure: the cluster-robust variance is 0.
    interval = proportion_interval([1, 0] * 10, [i // 2 for i in range(20)])
    assert interval == pytest.approx(wilson(10, 20, 1.959964), abs=1e-6)


@pytest.mark.parametrize("value", [0, 0.5, 1])
def test_equal_rows_never_give_an_interval_of_zero_width(value):
    independent = proportion_interval([value] * 5, "abcde")
    clustered = proportion_interval([value] * 5, "aabbc")
    single = proportion_interval([value] * 5, "aaaaa")
    # Kish's size of clusters of 2, 2, 1: 25 / 9; of one cluster: 1.
    assert independent == pytest.approx(wilson(5 * value, 5, 1.959964), abs=1e-6)
    assert clustered == pytest.approx(wilson(25 / 9 * value, 25 / 9, 1.959964), abs=1e-6)
    assert single == pytest.approx(wilson(value, 1, 1.959964), abs=1e-6)


def test_one_cluster_is_one_observation():
    interval = proportion_interval([1, 1, 0, 0], "aaaa")
    assert interval == pytest.approx(wilson(0.5, 1, 1.959964), abs=1e-6)


@pytest.mark.filterwarnings("error")
def test_no_rows_give_nan():
    draws = {"num_draws": 10, "seed": 0}
    for interval in (
        proportion_interval([], []),
        clustered_bootstrap([], [], **draws),
        paired_clustered_bootstrap([], [], [], **draws),
    ):
        assert [math.isnan(x) for x in interval] == [True, True, True]


def test_bad_input_is_refused():
    with pytest.raises(AssertionError, match="between 0 and 1"):
        proportion_interval([0.0, 1.5], "ab")
    with pytest.raises(AssertionError, match="finite"):
        proportion_interval([0.0, math.nan], "ab")
    with pytest.raises(AssertionError, match="as many labels"):
        proportion_interval([0.0, 1.0], "a")
    with pytest.raises(AssertionError, match="paired"):
        paired_clustered_bootstrap([1.0], [1.0, 2.0], "ab", num_draws=10, seed=0)


def clustered_outcomes(rng, num_rows, num_clusters, rate, correlation):
    """Rows spread over clusters whose own rates vary: a beta-binomial with that correlation."""
    labels = draw_labels(rng, num_rows, num_clusters)
    rates = np.full(num_clusters, rate)
    if correlation:
        weight = 1 / correlation - 1
        rates = rng.beta(rate * weight, (1 - rate) * weight, num_clusters)
    return (rng.random(num_rows) < rates[labels]).astype(float).tolist(), labels.tolist()


@pytest.mark.parametrize("n", [20, 100])
def test_independent_rows_are_covered_in_95_percent(n):
    # Exact: the probability of every count is known, so nothing needs to be simulated.
    intervals = [proportion_interval([1] * k + [0] * (n - k), range(n)) for k in range(n + 1)]
    coverages = []
    for rate in np.linspace(0.2, 0.8, 25):
        inside = [k for k in range(n + 1) if intervals[k].low <= rate <= intervals[k].high]
        coverages.append(sum(math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in inside))
    # Counts are discrete, so no interval keeps to 0.95 at every rate; the average does.
    assert min(coverages) >= 0.925
    assert max(coverages) <= 0.98
    assert sum(coverages) / 25 == pytest.approx(0.95, abs=0.01)


# The standard error of 500 simulations is 1 %. Observed: 0.946 to 0.966, and 0.982 for the 20 rows
# at 0.7, where the counts are coarse. Wilson's interval on the rows alone: down to 0.758.
@pytest.mark.parametrize("rate", [0.5, 0.7])
@pytest.mark.parametrize(
    ("num_rows", "num_clusters", "correlation"),
    [(20, 10, 0.3), (100, 25, 0.0), (100, 25, 0.4), (100, 50, 0.3)],
)
def test_clustered_rows_are_covered_in_95_percent(num_rows, num_clusters, correlation, rate):
    rng = np.random.default_rng(7)
    hits = naive_hits = 0
    for _ in range(500):
        rows, labels = clustered_outcomes(rng, num_rows, num_clusters, rate, correlation)
        _, low, high = proportion_interval(rows, labels)
        hits += low <= rate <= high
        _, low, high = wilson(sum(rows), num_rows, 1.96)
        naive_hits += low <= rate <= high
    assert 0.93 <= hits / 500 <= 0.985
    if num_rows == 100 and correlation:
        assert naive_hits / 500 < 0.9


STRUCTURES = [(20, 20, 0.0), (20, 14, 0.3), (20, 10, 0.3), (100, 100, 0.0), (100, 60, 0.3)]
STRUCTURES.append((100, 25, 0.4))
"""Rows, prompts that they share, and the correlation inside a prompt."""


def rate_draw(rng, n, num_clusters, correlation):
    """A rate between 0.5 and 0.9, as accuracies and win rates are; 2,000 draws average over it."""
    rate = rng.uniform(0.5, 0.9)
    rows, labels = clustered_outcomes(rng, n, num_clusters, rate, correlation)
    return proportion_interval(rows, labels), rate


def score_draw(rng, n, num_clusters, correlation):
    """Mean score: Student's t with 5 degrees of freedom, heavier tails than the normal's."""
    labels = draw_labels(rng, n, num_clusters)
    own, shared = rng.standard_t(5, size=n), rng.standard_t(5, size=num_clusters)
    rows = 3 + math.sqrt(correlation) * shared[labels] + math.sqrt(1 - correlation) * own
    return clustered_bootstrap(rows, labels, num_draws=400, seed=int(rng.integers(1e9))), 3.0


def shift_draw(rng, n, num_clusters, correlation):
    """Two versions' scores on the same prompts: what both share cancels."""
    labels = draw_labels(rng, n, num_clusters)
    easy, gain = rng.normal(scale=3, size=n), rng.standard_t(5, size=num_clusters)[labels]
    difference = math.sqrt(correlation) * gain + math.sqrt(1 - correlation) * rng.normal(size=n)
    seed = int(rng.integers(1e9))
    interval = paired_clustered_bootstrap(
        easy + 0.5 + difference, easy, labels, num_draws=400, seed=seed
    )
    return interval, 0.5


def control_draw(rng, n, num_clusters, correlation):
    """Accuracy minus that of *longer wins*: correlated rates, so that differences are -1, 0, 1."""
    labels = draw_labels(rng, n, num_clusters)
    normal = statistics.NormalDist()
    rates = rng.uniform(0.55, 0.85), rng.uniform(0.45, 0.75)
    agree = rng.normal(size=n)
    sides = []
    for rate in rates:
        shared = rng.normal(size=num_clusters)[labels]
        own = math.sqrt(0.3) * agree + math.sqrt(0.7) * rng.normal(size=n)
        latent = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
        sides.append((latent < normal.inv_cdf(rate)).astype(float))
    seed = int(rng.integers(1e9))
    interval = paired_clustered_bootstrap(*sides, labels, num_draws=400, seed=seed)
    return interval, rates[0] - rates[1]


def draw_labels(rng, n, num_clusters):
    return np.concatenate(
        [np.arange(num_clusters), rng.integers(num_clusters, size=n - num_clusters)]
    )


@pytest.mark.parametrize(("n", "num_clusters", "correlation"), STRUCTURES)
@pytest.mark.parametrize("draw", [rate_draw, score_draw, shift_draw, control_draw])
def test_intervals_cover_93_to_97_percent_of_2000_draws(draw, n, num_clusters, correlation):
    rng = np.random.default_rng(2024)
    hits = 0
    for _ in range(2000):
        (_, low, high), truth = draw(rng, n, num_clusters, correlation)
        hits += low <= truth <= high
    assert 0.93 <= hits / 2000 <= 0.97


def slow_bootstrap(values, clusters, num_draws, seed, *, t_quantile):
    """The limits in plain Python: sorted draws, and Student's interval, the wider at each end."""
    rng = random.Random(seed)
    groups = {}
    for value, label in zip(values, clusters, strict=True):
        groups.setdefault(label, []).append(value)
    means = []
    for _ in range(num_draws):
        drawn = [x for group in rng.choices(list(groups.values()), k=len(groups)) for x in group]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    mean, ratio = sum(values) / len(values), len(groups) / (len(groups) - 1)
    tail = statistics.NormalDist().cdf(-t_quantile * ratio**0.5)
    gaps = [sum(x - mean for x in group) for group in groups.values()]
    half = t_quantile * (ratio * sum(gap * gap for gap in gaps)) ** 0.5 / len(values)
    low, high = means[int(tail * num_draws)], means[int((1 - tail) * num_draws)]
    return min(low, mean - half), max(high, mean + half)


def test_bootstrap_equals_a_slow_second_implementation():
    rng = np.random.default_rng(0)
    labels = rng.integers(15, size=60).tolist()
    offsets = rng.normal(size=15)
    values = [10 + offsets[label] + 0.3 * rng.normal() for label in labels]
    mean, low, high = clustered_bootstrap(values, labels, num_draws=4000, seed=1)
    assert mean == pytest.approx(sum(values) / 60, abs=1e-12)
    # Student's quantile of 14 degrees of freedom in any table.
    expected = slow_bootstrap(values, labels, 4000, 2, t_quantile=2.145)
    assert (low, high) == pytest.approx(expected, abs=0.05)
    rows_as_clusters = clustered_bootstrap(values, range(60), num_draws=4000, seed=1)
    assert high - low > 1.5 * (rows_as_clusters.high - rows_as_clusters.low)


def test_bootstrap_is_deterministic_and_follows_seed_and_level():
    # Skewed, so that the draws decide about the upper limit.
    values, labels = [0.1, 0.2, 0.1, 0.3, 0.2, 0.2, 0.1, 0.4, 0.2, 9.0], "abcdefghij"
    first = clustered_bootstrap(values, labels, num_draws=700, seed=3)
    assert clustered_bootstrap(values, labels, num_draws=700, seed=3) == first
    assert clustered_bootstrap(values, labels, num_draws=700, seed=4) != first
    inner = clustered_bootstrap(values, labels, num_draws=700, seed=3, level=0.5)
    assert first.low < inner.low < inner.mean < inner.high < first.high


def test_bootstrap_by_hand_for_two_clusters():
    # Clusters {0} and {3, 3}: draws give 0 (1/4), 3 (1/4) or 6/3 = 2 (1/2), none beyond 0 or 3.
    # Student: mean 2, sums less 2 per row -2 and 2, standard error sqrt(2 (4 + 4)) / 3 = 4/3; one
    # degree of freedom at level 0.8: t = tan(0.4 pi) = 3.077684, half width 4.103578.
    wide = clustered_bootstrap([0.0, 3.0, 3.0], "abb", num_draws=2000, seed=0, level=0.8)
    assert wide == pytest.approx((2.0, 2 - 4.103578, 2 + 4.103578), abs=1e-6)


def test_many_clusters_leave_the_percentile_interval_as_it_is():
    rng = np.random.default_rng(3)
    values = rng.normal(size=1000)
    mean, low, high = clustered_bootstrap(values, range(1000), num_draws=4000, seed=0)
    plain = 1.96 * values.std() / 1000**0.5
    assert (mean - low, high - mean) == pytest.approx((plain, plain), rel=0.06)


def test_a_skewed_sample_keeps_its_long_side():
    values = np.random.default_rng(1).exponential(size=40)
    mean, low, high = clustered_bootstrap(values, range(40), num_draws=4000, seed=0)
    assert high - mean > 1.02 * (mean - low)


def test_limits_stay_within_what_rates_can_be():
    low_rates = [0.0] * 9 + [1.0]
    interval = clustered_bootstrap(low_rates, range(10), num_draws=500, seed=0)
    assert interval.low == 0.0
    assert interval.high < 1.0
    worse = paired_clustered_bootstrap(
        [0.0] * 5, [1.0, 1.0, 1.0, 1.0, 0.0], range(5), num_draws=500, seed=0
    )
    assert worse.low == -1.0
    # A mean of scores has no such bound.
    assert clustered_bootstrap([0.0] * 9 + [2.0], range(10), num_draws=500, seed=0).low < 0.0


def test_paired_bootstrap_uses_the_pairing():
    rng = np.random.default_rng(5)
    easy = rng.normal(scale=10, size=50)
    better, worse = easy + 1.0 + 0.1 * rng.normal(size=50), easy
    interval = paired_clustered_bootstrap(better, worse, range(50), num_draws=500, seed=0)
    assert 0.9 < interval.low < interval.mean < interval.high < 1.1
    assert interval == clustered_bootstrap(better - worse, range(50), num_draws=500, seed=0)
    backward = paired_clustered_bootstrap(worse, better, range(50), num_draws=500, seed=0)
    assert backward == pytest.approx((-interval.mean, -interval.high, -interval.low), abs=1e-12)


def test_bootstraps_without_spread():
    draws = {"num_draws": 50, "seed": 0}
    # 5 of 5: as Wilson. Wilson's upper limit of 0 of 5 is z^2 / (5 + z^2) = 0.434482.
    assert clustered_bootstrap([1.0] * 5, "abcde", **draws) == pytest.approx(
        proportion_interval([1] * 5, "abcde"), abs=1e-12
    )
    same = paired_clustered_bootstrap([1.0, 0.0, 1.0, 1.0, 0.0], [1, 0, 1, 1, 0], "abcde", **draws)
    assert same == pytest.approx((0.0, -0.434482, 0.434482), abs=1e-6)
    always = paired_clustered_bootstrap([1.0] * 5, [0.0] * 5, "abcde", **draws)
    assert always == pytest.approx((1.0, 1 - 2 * 0.434482, 1.0), abs=1e-6)
    # Nothing bounds these scores, so there are no limits to give.
    scores = clustered_bootstrap([7.3] * 5, "abcde", **draws)
    assert scores.mean == pytest.approx(7.3, abs=1e-12)
    assert math.isnan(scores.low)
    assert math.isnan(scores.high)


def test_clustered_mean_by_hand():
    # Rows 1 3 | 5 | 7 9 in three clusters, mean 5. Sums of deviations -6, 0, 6: 72 * 3/2 / 25
    # = 4.32; t of 2 degrees of freedom 4.3027.
    found = clustered_mean([1, 3, 5, 7, 9], ["a", "a", "b", "c", "c"])
    half = 4.302653 * math.sqrt(4.32)
    assert found == pytest.approx((5.0, 5.0 - half, 5.0 + half), abs=1e-5)


def test_clustered_mean_of_single_rows_is_students_interval():
    # 2 4 6: mean 4, sample variance 4, standard error sqrt(4 / 3).
    half = 4.302653 * math.sqrt(4 / 3)
    assert clustered_mean([2, 4, 6], "abc") == pytest.approx((4, 4 - half, 4 + half), abs=1e-5)


def test_clustered_mean_without_spread_or_rows():
    assert math.isnan(clustered_mean([], []).mean)
    one = clustered_mean([1, 2], "aa")
    assert one.mean == 1.5
    assert math.isnan(one.low)
    assert clustered_mean([2, 2], "ab") == (2, 2, 2)


@pytest.mark.parametrize("level", [0.95, 0.995])
def test_clustered_mean_covers(level):
    rng = np.random.default_rng(0)
    inside, draws = 0, 2000
    for _ in range(draws):
        values = np.repeat(rng.normal(size=30), 3) + rng.normal(size=90)
        _, low, high = clustered_mean(
            values.tolist(), np.repeat(np.arange(30), 3).tolist(), level=level
        )
        inside += low <= 0 <= high
    # Three standard errors of the simulation.
    assert inside / draws == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / draws))


def test_an_interval_in_json_has_no_nan():
    found = interval_json(clustered_mean([1, 2], "aa"), 2)
    assert found == {"mean": 1.5, "low": None, "high": None, "n": 2}


@pytest.mark.parametrize(("successes", "n"), [(7, 10), (0, 12), (12, 12), (333.5, 1000), (50, 100)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_an_interval_tells_its_size(successes: float, n: float, level: float) -> None:
    interval = wilson(successes, n, NormalDist().inv_cdf(0.5 + level / 2))
    assert effective_size(interval, level=level) == pytest.approx(n)
