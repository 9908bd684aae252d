"""Comparisons that repeat others but for a few words: found in a file and in all earlier batches.

Sketches of the accepted rows lie beside rows.parquet, so that history is never cut into shingles
again. Of a file, 64 bytes a row are held in memory, and as much again while it is searched.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.config import Contradictions, Ingest, NearDuplicates
from rlhf.data import near
from rlhf.data.ledger import CHUNK_ROWS, ROWS, History
from rlhf.data.near import Sketches, Verifier
from rlhf.data.shingles import Indices
from rlhf.data.staging import Staging

if TYPE_CHECKING:
    import pyarrow as pa

SKETCHES = "sketches.parquet"
SKETCH = "sketch"
SCHEME = b"rlhf.scheme"
"""Key of the file's metadata that says how its sketches were made."""
TEXTS = ["axis", "prompt", "chosen", "rejected"]
SEARCH_ROWS = 500_000
"""Earlier sketches that are searched at a time."""
VERIFIED_PAIRS = 2_000
"""Pairs whose texts are held at a time."""


@dataclass(frozen=True, slots=True)
class RepeatRules:
    """What becomes of near duplicates and contradictions; `threshold` None compares no shingles."""

    contradictions: Contradictions
    near_duplicates: NearDuplicates
    threshold: float | None

    @classmethod
    def of(cls, settings: Ingest) -> RepeatRules:
        """Read them from the settings."""
        return cls(settings.contradictions, settings.near_duplicates, settings.near_threshold)

    def to_json(self) -> dict[str, Any]:
        """Return the rules as a manifest holds them, by the names of their settings."""
        return {
            "contradictions": self.contradictions.name,
            "near_duplicates": self.near_duplicates.name,
            "near_threshold": self.threshold,
        }


@dataclass(frozen=True, slots=True)
class Similar:
    """A row and the one it repeats, which is in this file (`row_of`) or in an earlier batch."""

    row: int
    row_of: int | None
    batch: str
    id: str
    similarity: float
    swapped: bool


def with_sketches(table: pa.Table) -> pa.Table:
    """Append the sketches of comparisons as a column."""
    import pyarrow as pa

    found = near.sketch(near.texts_of(table))
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(near.NUM_PERM), len(found), [None, pa.py_buffer(np.ascontiguousarray(found))]
    )
    return table.append_column(SKETCH, column)


def write_sketches(folder: Path, columns: Iterator[pa.Table]) -> None:
    """Write the sketches of the accepted rows, in their order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    scheme = {SCHEME: json.dumps(near.scheme()).encode()}
    schema = pa.schema([(SKETCH, pa.binary(near.NUM_PERM))], metadata=scheme)
    with pq.ParquetWriter(folder / SKETCHES, schema, compression="none", use_dictionary=False) as w:
        for table in columns:
            w.write_table(table.cast(schema))


def find_similar(
    staging: Staging, history: History, left_out: Indices, *, batch: str, threshold: float
) -> list[Similar]:
    """Return every verified pair of a row that is not left out with an earlier one, by row."""
    rows, sketches = _staged(staging, left_out)
    found: list[Similar] = []
    within = near.pairs_within(sketches, threshold=threshold)
    for left, right, pairs in _verifiers(staging, rows[within], threshold, staged=True):
        ids = staging.take(["id"], np.unique(pairs[:, 1]))["id"].to_pylist()
        name = dict(zip(np.unique(pairs[:, 1]).tolist(), ids, strict=True))
        for row, earlier, match in _matches(left, right, pairs):
            found.append(
                Similar(row, earlier, batch, name[earlier], match.similarity, match.swapped)
            )
    for key, path in history.batches:
        dead = frozenset(history.dead.get(key, ()))
        for start, block in _stored(path.parent):
            pairs = near.pairs_against(sketches, block, threshold=threshold)
            pairs = np.stack([rows[pairs[:, 0]], pairs[:, 1] + start], axis=1)
            found += _earlier(staging, path, key, pairs, dead, threshold)
    return sorted(found, key=lambda item: item.row)


def _staged(staging: Staging, left_out: Indices) -> tuple[Indices, Sketches]:
    """Return the numbers and sketches of the rows that nothing has left out yet."""
    rows, blocks = [np.empty(0, np.int64)], [np.empty((0, near.NUM_PERM), np.uint8)]
    for start, batch in staging.scan(["policy", SKETCH]):
        keep = batch.column("policy").is_null().to_numpy(zero_copy_only=False).copy()
        first, last = np.searchsorted(left_out, [start, start + batch.num_rows])
        keep[left_out[first:last] - start] = False
        rows.append(np.flatnonzero(keep) + start)
        blocks.append(_array(batch.column(SKETCH))[keep])
    return np.concatenate(rows), np.concatenate(blocks)


def _stored(folder: Path) -> Iterator[tuple[int, Sketches]]:
    """Yield the sketches of a batch in pieces, each with the number of its first row.

    They are made anew where they are missing or made in another way.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, start = folder / SKETCHES, 0
    if path.exists():
        with pq.ParquetFile(path) as file:
            if json.loads(file.schema_arrow.metadata[SCHEME]) == near.scheme():
                for batch in file.iter_batches(SEARCH_ROWS):
                    yield start, _array(batch.column(SKETCH))
                    start += batch.num_rows
                return
    with pq.ParquetFile(folder / ROWS) as file:
        for batch in file.iter_batches(CHUNK_ROWS, columns=TEXTS):
            table = pa.Table.from_batches([batch])
            yield start, near.sketch(near.texts_of(table))
            start += batch.num_rows


def _earlier(
    staging: Staging, path: Path, key: str, pairs: Indices, dead: frozenset[str], threshold: float
) -> list[Similar]:
    found = []
    for left, right, chunk in _verifiers(staging, pairs, threshold, path=path):
        ids = _take(path, ["id"], np.unique(chunk[:, 1]))["id"].to_pylist()
        name = dict(zip(np.unique(chunk[:, 1]).tolist(), ids, strict=True))
        for row, earlier, match in _matches(left, right, chunk):
            if name[earlier] not in dead:
                found.append(
                    Similar(row, None, key, name[earlier], match.similarity, match.swapped)
                )
    return found


def _verifiers(
    staging: Staging,
    pairs: Indices,
    threshold: float,
    *,
    path: Path | None = None,
    staged: bool = False,
) -> Iterator[tuple[Verifier, Verifier, Indices]]:
    """Yield pairs in pieces, by row, with the texts of both sides, in order of their numbers."""
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    for start in range(0, len(pairs), VERIFIED_PAIRS):
        chunk = pairs[order[start : start + VERIFIED_PAIRS]]
        left = staging.take(TEXTS, np.unique(chunk[:, 0]))
        wanted = np.unique(chunk[:, 1])
        right = staging.take(TEXTS, wanted) if path is None else _take(path, TEXTS, wanted)
        sides = [Verifier(near.texts_of(side), threshold=threshold) for side in (left, right)]
        yield sides[0], sides[1], chunk


def _matches(
    left: Verifier, right: Verifier, pairs: Indices
) -> Iterator[tuple[int, int, near.Match]]:
    places = [np.unique(pairs[:, side], return_inverse=True)[1] for side in (0, 1)]
    for number, (row, earlier) in enumerate(pairs.tolist()):
        match = left.match(int(places[0][number]), right, int(places[1][number]))
        if match is not None:
            yield row, earlier, match


def _take(path: Path, names: list[str], rows: Indices) -> pa.Table:
    """Return some columns of some rows of a Parquet file, which are given in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        groups = file.metadata.num_row_groups
        sizes = [file.metadata.row_group(group).num_rows for group in range(groups)]
        ends = np.cumsum(sizes)
        tables = []
        for group in np.unique(np.searchsorted(ends, rows, side="right")).tolist():
            start = int(ends[group]) - sizes[group]
            mine = rows[(rows >= start) & (rows < ends[group])] - start
            tables.append(file.read_row_group(group, columns=names).take(pa.array(mine)))
    return pa.concat_tables(tables)


def _array(column: pa.Array) -> Sketches:
    """Return a column of sketches as an array, without a copy."""
    data = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    start = column.offset * near.NUM_PERM
    return data[start : start + len(column) * near.NUM_PERM].reshape(-1, near.NUM_PERM)


@dataclass(frozen=True, slots=True)
class Note:
    """What a row repeats or contradicts, and what became of it: drop, keep or lower."""

    row: int
    swapped: bool
    match: str
    similarity: float
    batch: str
    id: str
    in_file: bool
    fate: str

    def to_json(self) -> dict[str, Any]:
        """Return it as near_duplicates.jsonl and contradictions.jsonl hold it, without the row's
        own line and id."""
        return {
            "earlier_batch": self.batch,
            "earlier_id": self.id,
            "match": self.match,
            "similarity": round(self.similarity, 4),
            "fate": self.fate,
        }

    def verdict(self) -> tuple[int, str, str]:
        """Return row, policy and reason of a row that is dropped."""
        where = "in_file" if self.in_file else "of_earlier"
        if self.match == SIMILAR:
            where = "in_file" if self.in_file else "to_earlier"
        verb = "contradicts" if self.swapped else "repeats"
        policy = f"{'similar' if self.match == SIMILAR else 'near_duplicate'}_{where}"
        how = f" (similarity {self.similarity:.3f})" if self.match == SIMILAR else ""
        reason = f"{verb} {self.id} of {self.batch}{how}"
        return self.row, "contradicting" if self.swapped else policy, reason


FOLDED, SIMILAR = "folded", "similar"


def judge_similar(found: list[Similar], rules: RepeatRules) -> list[Note]:
    """Decide about rows in the order of the file; a row that is dropped is nobody's original.

    The same verdict comes before the opposite one, then the more similar row.
    """
    options: dict[int, list[Similar]] = defaultdict(list)
    for item in found:
        options[item.row].append(item)
    dropped: set[int] = set()
    notes = []
    for row in sorted(options):
        left = [item for item in options[row] if item.row_of is None or item.row_of not in dropped]
        if not left:
            continue
        best = max(left, key=lambda item: (not item.swapped, item.similarity))
        fate = rules.contradictions.name if best.swapped else rules.near_duplicates.name
        if fate == "drop":
            dropped.add(row)
        in_file = best.row_of is not None
        notes.append(
            Note(row, best.swapped, SIMILAR, best.similarity, best.batch, best.id, in_file, fate)
        )
    return notes
