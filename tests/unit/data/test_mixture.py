"""Shares of the reward models' mixtures, by hand and as properties."""

from __future__ import annotations

import pytest

from rlhf.data.mixture import build_mixture
from rlhf.data.records import Comparison


def rows(number: int, *, batch: str = "w1", source: str = "own") -> list[Comparison]:
    return [
        Comparison(
            id=f"{source}/{batch}/{i}",
            prompt=[{"role": "user", "content": f"{i}"}],
            chosen="a",
            rejected="b",
            strength="better",
            axis="helpfulness",
            source=source,
            batch_id=batch,
        )
        for i in range(number)
    ]


@pytest.mark.parametrize(
    ("num_own", "num_other", "share", "cap", "expected_own", "expected_other"),
    [
        (100, 500, 0.5, None, 100, 100),  # helpfulness: 50/50
        (90, 500, 0.9, None, 90, 10),  # safety: 90/10
        (45, 500, 0.9, None, 45, 5),
        (100, 30, 0.5, None, 100, 30),  # the other part is short: all of it, all own rows
        (100, 30, 1.0, None, 100, 0),
        (0, 30, 0.5, None, 0, 0),
        (1000, 1000, 0.5, 100, 50, 50),
        (1000, 1000, 0.9, 100, 90, 10),
        (1000, 10, 0.5, 100, 90, 10),  # short under a cap: own rows fill it
        (20, 1000, 0.5, 100, 20, 20),
    ],
)
def test_numbers_by_hand(
    num_own: int,
    num_other: int,
    share: float,
    cap: int | None,
    expected_own: int,
    expected_other: int,
) -> None:
    own, other = rows(num_own), rows(num_other, source="other")
    mixture = build_mixture(own, other, own_share=share, seed=0, max_comparisons=cap)
    assert (mixture.num_own, mixture.num_other) == (expected_own, expected_other)
    counts = {"other": expected_other, "own": expected_own}
    assert mixture.counts == {name: n for name, n in counts.items() if n}
    assert mixture.dropped == num_own - expected_own
    assert mixture.unused_other == num_other - expected_other
    ids = [row.id for row in mixture.rows]
    assert len(set(ids)) == len(ids) == expected_own + expected_other
    if ids:
        assert mixture.own_share == expected_own / len(ids)


def test_newest_batches_come_first_under_a_cap() -> None:
    own = rows(10, batch="w1") + rows(10, batch="w2") + rows(10, batch="w3")
    mixture = build_mixture(own, [], own_share=1.0, seed=3, max_comparisons=15)
    taken = [row.batch_id for row in mixture.rows]
    assert taken == ["w2"] * 5 + ["w3"] * 10
    assert mixture.dropped == 15


def test_the_sample_is_uniform_and_keyed_by_the_seed() -> None:
    own, other = rows(200), rows(400, source="other")
    hits = [0] * 400
    for seed in range(60):
        mixture = build_mixture(own, other, own_share=0.5, seed=seed, max_comparisons=None)
        for row in mixture.rows[200:]:
            hits[int(row.id.rsplit("/", 1)[1])] += 1
    assert 12 < min(hits) <= max(hits) < 48  # 60 draws at one half each: mean 30, deviation 3.9
    again = build_mixture(own, other, own_share=0.5, seed=59, max_comparisons=None)
    assert [r.id for r in again.rows] == [r.id for r in mixture.rows]
    first = build_mixture(own, other, own_share=0.5, seed=0, max_comparisons=None)
    assert [r.id for r in first.rows] != [r.id for r in mixture.rows]


def test_share_must_be_positive() -> None:
    with pytest.raises(ValueError, match="own_share=0"):
        build_mixture(rows(1), rows(1), own_share=0.0, seed=0, max_comparisons=None)
