import math
import random
from fractions import Fraction
from itertools import combinations, permutations, product

import numpy as np
import pytest

from rlhf.algo.agreement import cohen_kappa, gwet_ac2, mean_kappa, weight_table

# Krippendorff's example with gaps, 12 units and 4 annotators, as in Gwet's own tables: AC1 0.77544.
PUBLISHED = [
    [1, 1, 1],
    [2, 2, 3, 2],
    [3, 3, 3, 3],
    [3, 3, 3, 3],
    [2, 2, 2, 2],
    [1, 2, 3, 4],
    [4, 4, 4, 4],
    [1, 1, 2, 1],
    [2, 2, 2, 2],
    [5, 5, 5],
    [1, 1],
    [3],
]

FIRST = [0, 0, 1, 2, 2]
SECOND = [0, 1, 1, 2, 0]


def test_weights_by_hand():
    assert weight_table(3, "identity").tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert weight_table(3, "linear").tolist() == [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]]
    assert weight_table(3, "quadratic").tolist() == [[1, 0.75, 0], [0.75, 1, 0.75], [0, 0.75, 1]]


def test_kappa_of_a_table_by_hand():
    # 20 both yes, 5 yes/no, 10 no/yes, 15 both no: p_o = 35/50 = 0.7;
    # p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5; kappa = 0.2 / 0.5 = 0.4.
    cells = {(1, 1): 20, (1, 0): 5, (0, 1): 10, (0, 0): 15}
    rows = [pair for pair, number in cells.items() for _ in range(number)]
    first, second = zip(*rows, strict=True)
    assert cohen_kappa(first, second, num_levels=2, weights="identity") == pytest.approx(0.4)


def test_weighted_kappa_by_hand():
    # Shares of the first: 0.4, 0.2, 0.4; of the second: 0.4, 0.4, 0.2.
    # Linear: p_o = (1 + 0.5 + 1 + 1 + 0) / 5 = 0.7; p_e = 0.4 * (0.4 + 0.2 + 0)
    # + 0.2 * (0.2 + 0.4 + 0.1) + 0.4 * (0 + 0.2 + 0.2) = 0.54; kappa = 0.16 / 0.46.
    linear = cohen_kappa(FIRST, SECOND, num_levels=3, weights="linear")
    assert linear == pytest.approx(0.16 / 0.46)
    # Quadratic: p_o = 3.75 / 5; p_e = 0.4 * 0.7 + 0.2 * 0.85 + 0.4 * 0.5 = 0.65.
    quadratic = cohen_kappa(FIRST, SECOND, num_levels=3, weights="quadratic")
    assert quadratic == pytest.approx(0.1 / 0.35)


def test_ac2_by_hand():
    # Same ratings: p_a = 0.7; pi = 0.4, 0.3, 0.3, so sum of pi (1 - pi) = 0.66; the weights sum
    # to 5, so p_e = 5 / 6 * 0.66 = 0.55; AC2 = 0.15 / 0.45.
    rows = [list(pair) for pair in zip(FIRST, SECOND, strict=True)]
    assert gwet_ac2(rows, num_levels=3, weights="linear") == pytest.approx(1 / 3)
    # A sixth item with one rating of level 0 changes what is usual and nothing else:
    # pi = 0.5, 0.25, 0.25; p_e = 5 / 6 * 0.625.
    chance = 5 / 6 * 0.625
    found = gwet_ac2([*rows, [0]], num_levels=3, weights="linear")
    assert found == pytest.approx((0.7 - chance) / (1 - chance))


def test_ac1_of_the_published_table():
    rows = [[level - 1 for level in row] for row in PUBLISHED]
    found = gwet_ac2(rows, num_levels=5, weights="identity")
    assert found == pytest.approx(0.77544, abs=5e-6)


def test_two_of_three_by_hand():
    # One item, levels 0, 0, 2 of 3, linear: the three pairs agree 1, 0, 0, so p_a = 1/3.
    # pi = 2/3, 0, 1/3: p_e = 5/6 * (2/9 + 2/9) = 10/27. AC2 = (9 - 10) / (27 - 10).
    found = gwet_ac2([[0, 0, 2]], num_levels=3, weights="linear")
    assert found == pytest.approx(-1 / 17)


def slow_weight(k: int, m: int, q: int, weights: str) -> Fraction:
    apart = Fraction(abs(k - m), q - 1)
    return {
        "identity": Fraction(int(k == m)),
        "linear": 1 - apart,
        "quadratic": 1 - apart * apart,
    }[weights]


def slow_ac2(rows: list[list[int]], q: int, weights: str) -> float:
    """Agreement of every ordered pair of ratings, and chance level by level, as fractions."""
    shares = []
    for row in rows:
        pairs = list(permutations(row, 2))
        if pairs:
            shares.append(sum(slow_weight(k, m, q, weights) for k, m in pairs) / len(pairs))
    observed = sum(shares) / len(shares)
    rated = [row for row in rows if row]
    pi = [sum(Fraction(row.count(k), len(row)) for row in rated) / len(rated) for k in range(q)]
    total = sum(slow_weight(k, m, q, weights) for k, m in product(range(q), repeat=2))
    chance = total * sum(p * (1 - p) for p in pi) / (q * (q - 1))
    return float((observed - chance) / (1 - chance))


def slow_kappa(first: list[int], second: list[int], q: int, weights: str) -> float:
    """Observed and expected disagreement, every rating of one against every one of the other."""
    n = len(first)
    lost = sum(1 - slow_weight(k, m, q, weights) for k, m in zip(first, second, strict=True))
    expected = sum(1 - slow_weight(k, m, q, weights) for k, m in product(first, second))
    return float(1 - Fraction(lost, n) / (Fraction(expected) / (n * n)))


@pytest.mark.parametrize("weights", ["identity", "linear", "quadratic"])
def test_against_slow_implementations(weights):
    rng = random.Random(weights)
    for q in (2, 5, 8):
        rows = [[rng.randrange(q) for _ in range(rng.randint(0, 4))] for _ in range(40)]
        found = gwet_ac2(rows, num_levels=q, weights=weights)
        assert found == pytest.approx(slow_ac2(rows, q, weights), abs=1e-12)
        first = [rng.randrange(q) for _ in range(30)]
        second = [x if rng.random() < 0.6 else rng.randrange(q) for x in first]
        found = cohen_kappa(first, second, num_levels=q, weights=weights)
        assert found == pytest.approx(slow_kappa(first, second, q, weights), abs=1e-12)


@pytest.mark.parametrize("weights", ["identity", "linear", "quadratic"])
def test_the_ends(weights):
    same = [[k, k, k] for k in range(8)]
    assert gwet_ac2(same, num_levels=8, weights=weights) == pytest.approx(1)
    assert cohen_kappa(range(8), range(8), num_levels=8, weights=weights) == pytest.approx(1)
    rng = random.Random(0)
    first, second = ([rng.randrange(8) for _ in range(20_000)] for _ in range(2))
    assert cohen_kappa(first, second, num_levels=8, weights=weights) == pytest.approx(0, abs=0.03)
    rows = [list(pair) for pair in zip(first, second, strict=True)]
    assert gwet_ac2(rows, num_levels=8, weights=weights) == pytest.approx(0, abs=0.03)


def test_nearly_equal_ratings_are_agreement_for_ac2_and_not_for_kappa():
    # 98 of 100 alike, the rest split: the paradox that AC1 was made for.
    first, second = [0] * 98 + [1, 0], [0] * 98 + [0, 1]
    rows = [list(pair) for pair in zip(first, second, strict=True)]
    assert gwet_ac2(rows, num_levels=2, weights="identity") > 0.95
    assert cohen_kappa(first, second, num_levels=2, weights="identity") < 0


def test_order_of_annotators_and_of_direction_do_not_matter():
    rng = random.Random(4)
    rows = [[rng.randrange(8) for _ in range(rng.randint(1, 3))] for _ in range(30)]
    turned = [[7 - level for level in reversed(row)] for row in rows]
    for weights in ("linear", "quadratic"):
        found = gwet_ac2(rows, num_levels=8, weights=weights)
        assert gwet_ac2(turned, num_levels=8, weights=weights) == pytest.approx(found)


def test_mean_kappa_weighs_pairs_by_common_items():
    rng = random.Random(2)
    people = "abc"
    rows = [
        {name: rng.randrange(8) for name in rng.sample(people, rng.randint(1, 3))}
        for _ in range(60)
    ]
    total = number = 0.0
    for one, other in combinations(people, 2):
        common = [(row[one], row[other]) for row in rows if one in row and other in row]
        first, second = zip(*common, strict=True)
        total += len(common) * cohen_kappa(first, second, num_levels=8)
        number += len(common)
    assert len({len([r for r in rows if a in r and b in r]) for a, b in combinations("abc", 2)}) > 1
    assert mean_kappa(rows, num_levels=8) == pytest.approx(total / number)


def test_mean_kappa_of_two_is_cohens():
    rows = [{"x": k, "y": m} for k, m in zip(FIRST, SECOND, strict=True)]
    expected = cohen_kappa(FIRST, SECOND, num_levels=3)
    assert mean_kappa(rows, num_levels=3) == pytest.approx(expected)


def test_too_little_to_tell():
    assert math.isnan(gwet_ac2([], num_levels=8))
    assert math.isnan(gwet_ac2([[1], [], [2]], num_levels=8))
    assert math.isnan(cohen_kappa([], [], num_levels=8))
    assert math.isnan(cohen_kappa([3, 3], [3, 3], num_levels=8))
    assert math.isnan(mean_kappa([{"x": 1}, {"y": 2}], num_levels=8))
    assert math.isnan(mean_kappa([{"x": 1, "y": 1}, {"x": 1, "y": 1}], num_levels=8))
    with pytest.raises(AssertionError, match="not below"):
        gwet_ac2([[8, 1]], num_levels=8)


def test_weights_fall_with_distance():
    for weights in ("linear", "quadratic"):
        row = weight_table(8, weights)[0]
        assert np.all(np.diff(row) < 0)
