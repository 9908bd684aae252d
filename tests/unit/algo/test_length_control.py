"""The gain left within length buckets: by hand, in the two extreme worlds, and slowly."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from rlhf.algo.length_control import buckets, length_controlled

HOW: dict[str, Any] = {"level": 0.95, "num_draws": 400, "seed": 0}


def control(
    candidate: list[tuple[float, int]], promoted: list[tuple[float, int]], **changes: Any
) -> dict[str, Any]:
    """Run on (score, tokens) per prompt, every prompt a cluster of its own."""
    return length_controlled(
        [score for score, _ in candidate],
        [score for score, _ in promoted],
        [tokens for _, tokens in candidate],
        [tokens for _, tokens in promoted],
        changes.pop("clusters", list(range(len(candidate)))),
        **{**HOW, "min_per_bucket": 1, **changes},
    )


def test_by_hand() -> None:
    """Two buckets, lengths 10 and 20; four prompts.

    candidate: 3 at 10; 4, 6, 8 at 20.   promoted: 1, 2, 3 at 10; 4 at 20.
    gain: 21/4 - 10/4 = 11/4. At 10: 3 - 2 = 1 over 4 responses; at 20: 6 - 4 = 2 over 4.
    within: (4 * 1 + 4 * 2) / 8 = 1.5; share 1.5 / 2.75 = 6/11.
    """
    found = control(
        [(3.0, 10), (4.0, 20), (6.0, 20), (8.0, 20)],
        [(1.0, 10), (2.0, 10), (3.0, 10), (4.0, 20)],
        num_buckets=2,
    )
    assert (found["gain"]["mean"], found["gain"]["n"]) == (2.75, 4)
    assert (found["within_buckets"]["mean"], found["within_buckets"]["n"]) == (1.5, 8)
    assert found["share"] == pytest.approx(6 / 11)
    assert found["share_low"] <= found["share"] <= found["share_high"]
    assert found["buckets"] == [
        {
            "low_tokens": 10,
            "high_tokens": 10,
            "n": 4,
            "n_candidate": 1,
            "n_promoted": 3,
            "gain": 1.0,
        },
        {
            "low_tokens": 20,
            "high_tokens": 20,
            "n": 4,
            "n_candidate": 3,
            "n_promoted": 1,
            "gain": 2.0,
        },
    ]


def test_a_bucket_that_one_version_never_reaches_is_left_out() -> None:
    """The promoted version never writes 30 tokens: 9 points there say nothing."""
    found = control(
        [(2.0, 10), (4.0, 10), (9.0, 30), (9.0, 30)],
        [(1.0, 10), (1.0, 10), (1.0, 10), (1.0, 10)],
        num_buckets=2,
    )
    assert found["gain"]["mean"] == 5.0
    assert (found["within_buckets"]["mean"], found["within_buckets"]["n"]) == (2.0, 6)
    assert [row["gain"] for row in found["buckets"]] == [2.0, None]


def world(*, per_token: float, bonus: float, number: int = 400) -> dict[str, Any]:
    """Score = per_token * tokens + bonus of the candidate + noise; the candidate is longer."""
    draw = random.Random(3)
    new = [draw.randint(15, 40) for _ in range(number)]
    old = [draw.randint(10, 35) for _ in range(number)]
    return control(
        [(per_token * n + bonus + draw.gauss(0, 0.2), n) for n in new],
        [(per_token * n + draw.gauss(0, 0.2), n) for n in old],
        num_buckets=10,
    )


def test_where_length_earns_everything_the_share_is_about_zero() -> None:
    found = world(per_token=0.1, bonus=0.0)
    assert found["gain"]["low"] > 0.3
    assert abs(found["share"]) < 0.15
    assert found["share_low"] < found["share"] < found["share_high"]


def test_where_length_earns_nothing_the_share_is_about_one() -> None:
    found = world(per_token=0.0, bonus=0.5)
    assert found["share"] == pytest.approx(1.0, abs=0.1)
    assert found["share_low"] < 1.0 < found["share_high"]


def test_half_and_half() -> None:
    """5 tokens more at 0.1 are as much as a bonus of 0.5."""
    assert world(per_token=0.1, bonus=0.5)["share"] == pytest.approx(0.5, abs=0.12)


def test_no_gain_has_no_share() -> None:
    draw = random.Random(0)
    rows = [(draw.gauss(0, 1), draw.randint(5, 9)) for _ in range(200)]
    other = [(draw.gauss(0, 1), draw.randint(5, 9)) for _ in range(200)]
    found = control(rows, other, num_buckets=5)
    assert found["gain"]["low"] < 0 < found["gain"]["high"]
    assert found["share"] is found["share_low"] is found["share_high"] is None


def test_equal_versions_gain_nothing_and_say_nothing_about_the_spread() -> None:
    rows = [(1.0, n) for n in range(10, 40)]
    found = control(rows, rows, num_buckets=3)
    assert found["within_buckets"] == {"mean": 0.0, "low": None, "high": None, "n": 60}
    assert found["share"] is None


def test_too_few_responses_are_not_cut_into_buckets() -> None:
    """9 prompts are 18 responses: less than two buckets of 10."""
    rows = [(float(n), n) for n in range(9)]
    found = length_controlled(*zip(*rows, strict=True), *zip(*rows, strict=True), range(9), **HOW)
    assert found["gain"]["n"] == 9
    assert found["within_buckets"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert found["buckets"] == []
    assert found["share"] is None
    assert control([], [], min_per_bucket=10)["gain"]["n"] == 0


def test_equal_lengths_stay_in_one_bucket() -> None:
    """Of 8 responses in 4 buckets the six of length 7 are one bucket, not three."""
    tokens = np.array([[7, 7, 7, 7], [7, 7, 8, 9]])
    assert buckets(tokens, num_buckets=4).tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]


def slow_within(rows: list[tuple[float, int, int]]) -> float:
    """Rows are (score, bucket, is candidate); compare bucket by bucket in plain loops."""
    total, weight = 0.0, 0
    for bucket in {row[1] for row in rows}:
        new = [score for score, where, is_new in rows if where == bucket and is_new]
        old = [score for score, where, is_new in rows if where == bucket and not is_new]
        if new and old:
            size = len(new) + len(old)
            total += size * (sum(new) / len(new) - sum(old) / len(old))
            weight += size
    return total / weight


@pytest.mark.parametrize("seed", range(10))
def test_mean_and_limits_equal_the_slow_ones(seed: int) -> None:
    """The same clusters are drawn by the same generator, then everything is counted in loops."""
    draw = random.Random(seed)
    number = 40
    clusters = [draw.randint(0, 24) for _ in range(number)]
    candidate = [(draw.gauss(0.5, 1), draw.randint(5, 25)) for _ in range(number)]
    promoted = [(draw.gauss(0, 1), draw.randint(3, 20)) for _ in range(number)]
    found = control(candidate, promoted, clusters=clusters, num_buckets=4, num_draws=60)

    tokens = np.array([[n for _, n in candidate], [n for _, n in promoted]])
    where = buckets(tokens, num_buckets=4)

    def rows_of(prompt: int) -> list[tuple[float, int, int]]:
        return [
            (candidate[prompt][0], int(where[0, prompt]), 1),
            (promoted[prompt][0], int(where[1, prompt]), 0),
        ]

    every = [row for prompt in range(number) for row in rows_of(prompt)]
    assert found["within_buckets"]["mean"] == pytest.approx(slow_within(every))
    labels = list(dict.fromkeys(clusters))
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(labels), size=(60, len(labels)))
    slow = []
    for indices in drawn:
        rows = [
            row
            for index in indices
            for prompt in range(number)
            if clusters[prompt] == labels[index]
            for row in rows_of(prompt)
        ]
        slow.append(slow_within(rows))
    low, high = np.quantile(slow, [0.025, 0.975])
    assert found["within_buckets"]["low"] == pytest.approx(low)
    assert found["within_buckets"]["high"] == pytest.approx(high)
