"""Rows of different lengths to rectangular batches, and the order in which rows are seen."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BATCHES = 50
"""Batches whose rows are sorted by length together: enough to save padding, few enough to mix."""

PASS_TOKENS = {"cpu": 128, "cuda": 8192}
"""Tokens whose computation takes as long as starting one more pass does, by type of device.

On processors a tiny model is as fast with 64 to 1,024; other models were not compared. A guess for
GPUs.
"""


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Stack rows to an int64 tensor [B, longest row], filling with `value` at the end."""
    return _pad(rows, value, left=False)


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Stack rows to an int64 tensor [B, longest row], filling with `value` at the start."""
    return _pad(rows, value, left=True)


def length_grouped_order(
    lengths: Sequence[int], *, batch_size: int, epochs: int, seed: int
) -> list[list[int]]:
    """Return the row indices of every optimizer step, rows of similar length together.

    Each epoch holds every index exactly once, in an order of its own. The last batch of an epoch
    is smaller when the rows do not divide evenly. The same arguments always give the same order.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    order: list[list[int]] = []
    for epoch in range(epochs):
        rng = random.Random(f"order/{seed}/{epoch}")
        indices = list(range(len(lengths)))
        rng.shuffle(indices)
        whole = len(indices) - len(indices) % batch_size
        batches = []
        for start in range(0, whole, batch_size * CHUNK_BATCHES):
            chunk = indices[start : min(start + batch_size * CHUNK_BATCHES, whole)]
            chunk.sort(key=lambda i: lengths[i])
            batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
        rng.shuffle(batches)
        rest = indices[whole:]
        order += [*batches, rest] if rest else batches
    return order


def batches_by_length(
    lengths: Sequence[int],
    *,
    max_padding: float,
    max_rows: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[list[int]]:
    """Yield row indices, shortest rows first, in batches of little padding.

    A batch has at most `max_rows` rows and `max_tokens` rows x longest row (a longer row gets a
    batch of its own), and is closed before its padding exceeds `max_padding` tokens.
    """
    batch: list[int] = []
    padding = 0
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        # Ascending order: the newest row is the longest, and pads all others.
        length = lengths[index]
        padding += len(batch) * (length - lengths[batch[-1]]) if batch else 0
        is_full = max_rows is not None and len(batch) == max_rows
        is_full |= max_tokens is not None and (len(batch) + 1) * length > max_tokens
        if batch and (is_full or padding > max_padding):
            yield batch
            batch, padding = [], 0
        batch.append(index)
    if batch:
        yield batch


def _pad(rows: Sequence[Sequence[int]], value: int, *, left: bool) -> Tensor:
    import torch

    width = max((len(row) for row in rows), default=0)
    padded: list[int] = []
    for row in rows:
        fill = [value] * (width - len(row))
        padded += [*fill, *row] if left else [*row, *fill]
    return torch.tensor(padded, dtype=torch.long).view(len(rows), width)
