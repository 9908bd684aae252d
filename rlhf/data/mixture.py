"""The reward models' training mixtures: a share of the own axis, the rest from elsewhere."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.records import Comparison


@dataclass(frozen=True, slots=True)
class Mixture:
    """Chosen rows with their counts; `own_share` is what was reached, not what was asked for."""

    rows: list[Comparison]
    counts: dict[str, int]
    """Rows by source."""
    num_own: int
    num_other: int
    dropped: int
    """Own rows left out because of `max_comparisons`."""
    unused_other: int
    """Rows of the other part that the share had no room for."""

    @property
    def own_share(self) -> float:
        """Share of own rows in the mixture."""
        return self.num_own / max(len(self.rows), 1)


def mixture_sizes(
    num_own: int, num_other: int, *, own_share: float, max_comparisons: int | None
) -> tuple[int, int]:
    """Return how many own and other rows a mixture takes of those there are.

    `num_own * (1 - own_share) / own_share` of the others, or all; a cap keeps the share.
    """
    wanted, room = round(num_own * (1 - own_share) / own_share), num_own
    if max_comparisons is not None:
        wanted = min(wanted, max_comparisons - round(max_comparisons * own_share))
    taken_other = min(wanted, num_other)
    if max_comparisons is not None:
        room = min(room, max_comparisons - taken_other)
    return room, taken_other


def build_mixture(
    own: Sequence[Comparison],
    other: Sequence[Comparison],
    *,
    own_share: float,
    seed: int,
    max_comparisons: int | None,
) -> Mixture:
    """Mix the own axis with a uniform sample of the rest (paper section 3.2.2, data composition).

    Keeps every own row and draws `num_own * (1 - own_share) / own_share` of the others; when there
    are fewer, takes them all and reports the share reached. No row is ever repeated. With
    `max_comparisons`, own rows are taken from the newest batch backwards (`own` is in ingest order,
    oldest first), and a batch that fits only in part is sampled uniformly. The same arguments
    always give the same rows, in input order, own rows first.
    """
    if not 0 < own_share <= 1:
        raise ValueError(f"own_share={own_share} must lie in (0, 1]")
    room, num_other = mixture_sizes(
        len(own), len(other), own_share=own_share, max_comparisons=max_comparisons
    )
    rng = random.Random(f"mixture/{seed}")
    own_rows = _newest(own, room, rng)
    other_rows = _sample(other, num_other, rng)
    rows = own_rows + other_rows
    return Mixture(
        rows=rows,
        counts=dict(sorted(Counter(row.source for row in rows).items())),
        num_own=len(own_rows),
        num_other=num_other,
        dropped=len(own) - len(own_rows),
        unused_other=len(other) - num_other,
    )


def _newest(rows: Sequence[Comparison], number: int, rng: random.Random) -> list[Comparison]:
    """Take whole batches from the newest backwards, and a sample of the one that does not fit."""
    batches: dict[str, list[Comparison]] = {}
    for row in rows:
        batches.setdefault(row.batch_id, []).append(row)
    taken: list[Comparison] = []
    for batch in reversed(list(batches.values())):
        taken = _sample(batch, min(len(batch), number - len(taken)), rng) + taken
    return taken


def _sample(rows: Sequence[Comparison], number: int, rng: random.Random) -> list[Comparison]:
    """Draw rows without replacement, in their order."""
    return [rows[i] for i in sorted(rng.sample(range(len(rows)), number))]
