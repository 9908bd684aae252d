"""Rows that no longer count: withdrawn by a vendor, or replaced by a correction.

Batches never change. A withdrawal is a file of its own in the stream, a correction lies in the
folder of the batch that brings the new rows; both take a number in the stream's order, beside the
batches. What a stream holds as of a number follows from the files up to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.artifacts import digest_json, read_json
from rlhf.errors import ArtifactError

FOLDER = "tombstones"
"""Withdrawals of a stream, one numbered file each."""
FILE = "tombstone.json"
"""A correction's, in the folder of the batch that brings the new rows."""
LISTED = "tombstones"
"""Beside the kinds in the listing of a stream: `entry_name` to digest."""


@dataclass(frozen=True, slots=True)
class Tombstone:
    """Rows that count no more from `sequence` on; kind to batch or set to row ids.

    `of` and `by` are empty for a withdrawal. For a correction they name the corrected batch or set
    and the one that brings the new rows.
    """

    sequence: int
    rows: Mapping[str, Mapping[str, tuple[str, ...]]]
    reason: str
    time: str
    file: Mapping[str, str]
    kind: str = ""
    of: str = ""
    by: str = ""
    brought: str = ""
    """Digest of the new rows."""

    @property
    def is_correction(self) -> bool:
        """Tell a correction from a withdrawal."""
        return bool(self.of)

    @property
    def num_rows(self) -> int:
        """Rows that count no more."""
        return sum(len(ids) for sets in self.rows.values() for ids in sets.values())

    @property
    def digest(self) -> str:
        """Digest of what changes: the rows that go and those that come."""
        rows = {kind: {key: sorted(ids) for key, ids in s.items()} for kind, s in self.rows.items()}
        return digest_json([rows, self.kind, self.of, self.brought])

    def ids(self, kind: str, key: str) -> tuple[str, ...]:
        """Return the row ids of one batch or set."""
        return self.rows[kind][key] if key in self.rows.get(kind, {}) else ()

    def to_json(self) -> dict[str, Any]:
        """Return the tombstone as it is written, with its digest."""
        return {
            "sequence": self.sequence,
            "what": "correction" if self.is_correction else "withdrawal",
            "kind": self.kind,
            "of": self.of,
            "by": self.by,
            "brought": self.brought,
            "reason": self.reason,
            "time": self.time,
            "file": dict(self.file),
            "num_rows": self.num_rows,
            "rows": {k: {key: list(i) for key, i in sets.items()} for k, sets in self.rows.items()},
            "digest": self.digest,
        }


def read_tombstone(path: Path) -> Tombstone:
    """Read one file; raises ArtifactError when its rows are not those that were recorded."""
    tree = read_json(path)
    names = ("sequence", "reason", "time", "file", "kind", "of", "by", "brought")
    rows = {k: {key: tuple(i) for key, i in sets.items()} for k, sets in tree["rows"].items()}
    found = Tombstone(rows=rows, **{name: tree[name] for name in names})
    if found.digest != tree["digest"]:
        raise ArtifactError(f"{path} changed after it was written; restore it")
    return found


def dead_ids(tombstones: Iterable[Tombstone], kind: str, key: str) -> frozenset[str]:
    """Return the rows of a batch or set that count no more."""
    return frozenset(id for stone in tombstones for id in stone.ids(kind, key))


def entry_name(sequence: int, kind: str, key: str) -> str:
    """Return how a listing names one tombstone's effect on one batch or set."""
    return f"{sequence:09d}/{kind}/{key}"


def newest(listing: Mapping[str, Mapping[str, str]]) -> int:
    """Return the number of the newest tombstone in a listing; 0 when there is none."""
    entries = _entries(listing)
    return max((int(name.partition("/")[0]) for name in entries), default=0)


def digest_as_of(
    listing: Mapping[str, Mapping[str, str]], kind: str, key: str, position: int
) -> str:
    """Return the digest of a batch's or set's rows as of a number of the stream.

    Without a tombstone up to there it is that of the accepted rows. KeyError: it is not listed.
    """
    own = listing[kind][key]
    entries = _entries(listing)
    found = [
        entries[name]
        for name in sorted(entries)
        if int(name.partition("/")[0]) <= position and name.partition("/")[2] == f"{kind}/{key}"
    ]
    return digest_json([own, *found]) if found else own


def _entries(listing: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
    """Return the tombstones of a listing; one without any need not name them."""
    return listing.get(LISTED, {})
