"""Padding and the order of rows."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rlhf.data.collate import (
    batches_by_length,
    length_grouped_order,
    pad_left,
    pad_right,
)

ROWS = [[1, 2, 3], [4], []]


PASS = 128


def test_padding_by_hand() -> None:
    assert pad_right(ROWS, 9).tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]
    assert pad_left(ROWS, 9).tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]]
    assert pad_right(ROWS, 0).dtype is torch.long
    assert pad_right([], 0).shape == (0, 0)


@pytest.mark.parametrize(("num_rows", "batch_size"), [(1, 4), (8, 4), (10, 4), (1003, 2), (0, 3)])
def test_every_epoch_holds_every_row_once(num_rows: int, batch_size: int) -> None:
    lengths = [(i * 37) % 101 for i in range(num_rows)]
    order = length_grouped_order(lengths, batch_size=batch_size, epochs=3, seed=5)
    steps = -(-num_rows // batch_size)
    assert len(order) == 3 * steps
    for epoch in range(3):
        batches = order[epoch * steps : (epoch + 1) * steps]
        assert Counter(i for b in batches for i in b) == Counter(range(num_rows))
        assert all(len(b) == batch_size for b in batches[:-1])


def test_order_is_keyed_by_the_seed_and_differs_between_epochs() -> None:
    lengths = [i % 13 for i in range(64)]
    order = length_grouped_order(lengths, batch_size=4, epochs=2, seed=1)
    assert order == length_grouped_order(lengths, batch_size=4, epochs=2, seed=1)
    assert order != length_grouped_order(lengths, batch_size=4, epochs=2, seed=2)
    assert order[:16] != order[16:]
    assert order[:16] == length_grouped_order(lengths, batch_size=4, epochs=1, seed=1)


def test_grouping_saves_padding_and_batches_are_shuffled() -> None:
    lengths = [(i * 7919) % 500 + 1 for i in range(500)]  # one chunk

    def padded(order: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in b) * len(b) for b in order)

    grouped = length_grouped_order(lengths, batch_size=10, epochs=1, seed=0)
    plain = [list(range(i, i + 10)) for i in range(0, 500, 10)]
    assert padded(grouped) < 1.1 * sum(lengths) < padded(plain)
    longest = [max(lengths[i] for i in b) for b in grouped]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        length_grouped_order([1], batch_size=0, epochs=1, seed=0)


def test_batches_hold_every_row_once_within_the_bounds() -> None:
    lengths = [9, 3, 3, 5, 1, 9]
    assert list(batches_by_length(lengths, max_tokens=10, max_padding=PASS)) == [
        [4, 1, 2],
        [3],
        [0],
        [5],
    ]
    assert list(batches_by_length(lengths, max_rows=4, max_padding=PASS)) == [[4, 1, 2, 3], [0, 5]]
    assert list(batches_by_length(lengths, max_padding=PASS)) == [[4, 1, 2, 3, 0, 5]]
    assert list(batches_by_length([20], max_tokens=10, max_padding=PASS)) == [[0]]
    assert list(batches_by_length([], max_tokens=10, max_padding=PASS)) == []


def test_a_batch_ends_before_it_has_too_much_padding() -> None:
    # Rows of 10 beside one of 74: two are padded by 128 tokens, three by 192.
    assert list(batches_by_length([10, 10, 74], max_padding=PASS)) == [[0, 1, 2]]
    assert list(batches_by_length([10, 10, 10, 74, 74], max_padding=PASS)) == [[0, 1, 2], [3, 4]]
    # Padding adds up: 60 for the second row, then twice 40 more.
    assert list(batches_by_length([10, 70, 104], max_padding=PASS)) == [[0, 1, 2]]
    assert list(batches_by_length([10, 70, 105], max_padding=PASS)) == [[0, 1], [2]]
