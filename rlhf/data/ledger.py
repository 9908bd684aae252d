"""The store: immutable batches and sets of a stream, in the order they came.

<root>/<stream>/stream.json                          held-out share and salt, fixed by the first
<root>/<stream>/<batches|open|sft|prompts>/<id>/     rows.parquet refused.jsonl excluded.jsonl
                                                     profile.json (batches) manifest.json,
                                                     renamed into place as one; tombstone.json
                                                     too where it is a correction
<root>/<stream>/tombstones/<number>.json             withdrawn rows
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.artifacts import (
    MANIFEST,
    atomic_folder,
    list_files,
    read_json,
    sha256_file,
    write_json,
    write_jsonl,
)
from rlhf.data.records import Comparison, Conversation, Kind, Prompt
from rlhf.data.tombstones import FILE, FOLDER, Tombstone, dead_ids, read_tombstone
from rlhf.errors import ArtifactError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

FOLDERS = {Kind.batch: "batches", Kind.open: "open", Kind.sft: "sft", Kind.prompts: "prompts"}
ROWS = "rows.parquet"
KEY_COLUMNS = ("key_content", "key_exact", "key_near", "key_swapped", "key_prompt")
CHUNK_ROWS = 10_000
"""Rows of a Parquet row group, which bounds the memory of writing and of reading."""
SCAN_ROWS = 100_000
"""Rows whose keys are read at a time."""

REPEATING = (
    *("strength", "axis", "source", "annotator", "model_chosen", "model_rejected", "meta"),
    *("prompt.list.element.role", "messages.list.element.role"),
)
"""Columns with few distinct values, which Parquet writes once each."""


Progress = Callable[[str, int, int], None]
"""Told what is done, how much of it, and the total: bytes when reading, else rows."""


def silent(what: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True, slots=True)
class History:
    """What earlier batches of a stream and kind hold; `position` is the stream's newest number."""

    position: int
    batches: tuple[tuple[str, Path], ...]
    """Name and rows of each, in ingest order, corrections included."""
    progress: Progress
    dead: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Batch to ids of rows that were replaced or withdrawn: they count no more."""
    withdrawn: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Those of them that their vendor withdrew."""

    def scan(self, names: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield columns of `id` and KEY_COLUMNS in pieces, each with the name of its batch.

        Rows that count no more are left out.
        """
        import pyarrow.parquet as pq

        done = 0
        total = sum(pq.read_metadata(path).num_rows for _, path in self.batches)
        for id, path in self.batches:
            dead = self.dead.get(id, ())
            columns = list(dict.fromkeys([*names, *(["id"] if dead else [])]))
            for batch in _scan_file(path, columns):
                kept = batch.filter(~_are_among(batch.column("id"), dead)) if dead else batch
                if kept.num_rows:
                    yield id, kept.select(list(names))
                done += batch.num_rows
                self.progress("compare with earlier rows", done, total)

    def without(self, rows: Mapping[str, Collection[str]]) -> History:
        """Return the history as it is once these rows, by batch, are replaced."""
        names = {*self.dead, *rows}
        dead = {name: {*self.dead.get(name, ()), *rows.get(name, ())} for name in names}
        return replace(self, dead=dead)

    def withdrawn_rows(self) -> dict[str, str]:
        """Return id to content key of the withdrawn rows."""
        found: dict[str, str] = {}
        for id, path in self.batches:
            gone = self.withdrawn.get(id, ())
            for batch in _scan_file(path, ["id", "key_content"]) if gone else ():
                rows = batch.filter(_are_among(batch.column("id"), gone))
                found.update(zip(*(column.to_pylist() for column in rows.columns), strict=True))
        return found


@dataclass(frozen=True, slots=True)
class Entry:
    """Everything that is written for one batch or set, as it comes."""

    kind: Kind
    id: str
    rows: Iterable[pa.Table]
    """Accepted rows with all columns of `row_schema`."""
    refused: Iterable[dict[str, Any]]
    excluded: Iterable[dict[str, Any]]
    manifest: Mapping[str, Any]
    beside: Sequence[Callable[[Path], None]] = ()
    """What writes further files into the folder, each called with it after rows.parquet."""
    tombstone: Tombstone | None = None
    """The rows that a correction replaces."""


class Store:
    """One stream of the store; reading checks that the rows are those that were ingested.

    With `as_of` it reads as it did when that was the stream's newest number: later corrections and
    withdrawals do not count.
    """

    def __init__(self, root: Path, stream: str, *, as_of: int | None = None) -> None:
        self.root = root
        self.stream = stream
        self.folder = root / stream
        self.as_of = as_of

    def ids(self, kind: Kind) -> list[str]:
        """Return the names of batches or sets in ingest order, without corrections of others."""
        return [id for id, manifest in self.entries(kind).items() if "supersedes" not in manifest]

    def entries(self, kind: Kind) -> dict[str, dict[str, Any]]:
        """Return name to manifest of everything of a kind, corrections included, in order."""
        found = self._manifests(kind)
        return {id: found[id] for id in sorted(found, key=lambda id: found[id]["sequence"])}

    def root_of(self, kind: Kind, id: str) -> str:
        """Return the batch or set that a correction corrects; any other name is its own."""
        manifest = self.manifest(kind, id)
        return str(manifest["supersedes"]) if "supersedes" in manifest else id

    def parts(self, kind: Kind, id: str) -> list[str]:
        """Return the names under which the rows of a batch or set lie: its own, its corrections'.

        They come in order, as of the store's number.
        """
        return [id] + [
            name
            for name, manifest in self.entries(kind).items()
            if "supersedes" in manifest
            and manifest["supersedes"] == id
            and (self.as_of is None or manifest["sequence"] <= self.as_of)
        ]

    def tombstones(self) -> list[Tombstone]:
        """Return the corrections and withdrawals as of the store's number, in order."""
        paths = [*(self.folder / FOLDER).glob("[0-9]*.json")]
        for kind in FOLDERS:
            corrections = (id for id, m in self._manifests(kind).items() if "supersedes" in m)
            paths += [self.path(kind, id) / FILE for id in corrections]
        found = sorted(map(read_tombstone, paths), key=lambda stone: stone.sequence)
        return [stone for stone in found if self.as_of is None or stone.sequence <= self.as_of]

    def manifest(self, kind: Kind, id: str) -> dict[str, Any]:
        """Return a manifest: rows, digest, counts, policy; DataError when there is no such set."""
        path = self.path(kind, id) / MANIFEST
        if not path.exists():
            known = ", ".join(self.ids(kind)) or "none"
            raise DataError(
                f"{kind.name} {id!r} is not in stream {self.stream!r} of {self.root} "
                f"(there: {known}); add it with `rlhf ingest`"
            )
        found: dict[str, Any] = read_json(path)
        return found

    def digest(self, kind: Kind, id: str) -> str:
        """Return the digest of the accepted rows."""
        return str(self.manifest(kind, id)["digest"])

    def comparisons(self, kind: Kind, id: str) -> list[Comparison]:
        """Return the rows of a batch, or of a set of open comparisons, with `batch_id` filled."""
        return [Comparison(**row, batch_id=id) for row in self._live_rows(kind, id)]

    def prompts(self, id: str) -> list[Prompt]:
        """Return the rows of a prompt set."""
        return [Prompt(**row) for row in self._live_rows(Kind.prompts, id)]

    def conversations(self, id: str) -> list[Conversation]:
        """Return the rows of an SFT set."""
        return [Conversation(**row) for row in self._live_rows(Kind.sft, id)]

    def split(self) -> dict[str, Any] | None:
        """Return the recorded held-out share and salt; None before the first ingest."""
        path = self.folder / "stream.json"
        if not path.exists():
            return None
        found: dict[str, Any] = read_json(path)
        return found

    def check_split(self, *, share: float, salt: str) -> None:
        """Refuse a held-out share or salt other than the stream's: the split is fixed for good."""
        recorded = self.split()
        if recorded is None:
            return
        for name, value in (("heldout_share", share), ("heldout_salt", salt)):
            if recorded[name] != value:
                raise DataError(
                    f"data.{name}={value} differs from {recorded[name]}, which stream "
                    f"{self.stream!r} was split with; give data.{name}={recorded[name]} "
                    "or another stream"
                )

    def position(self) -> int:
        """Return the newest sequence number of the stream, over all kinds; 0 when empty."""
        numbers = [m["sequence"] for kind in FOLDERS for m in self._manifests(kind).values()]
        withdrawals = (self.folder / FOLDER).glob("[0-9]*.json")
        return max([*numbers, *(int(path.stem) for path in withdrawals)], default=0)

    def history(self, kind: Kind, *, before: str, progress: Progress = silent) -> History:
        """Return what came before batch `before`, or all there is when it is new."""
        position = self.position()
        entries = self.entries(kind)
        newest = entries[before]["sequence"] - 1 if before in entries else position
        stones = Store(self.root, self.stream, as_of=newest).tombstones()
        ids = [id for id, manifest in entries.items() if manifest["sequence"] <= newest]
        withdrawals = [stone for stone in stones if not stone.is_correction]
        return History(
            position,
            tuple((id, self.path(kind, id) / ROWS) for id in ids),
            progress,
            dead={id: dead_ids(stones, kind.name, id) for id in ids},
            withdrawn={id: dead_ids(withdrawals, kind.name, id) for id in ids},
        )

    def add(self, entry: Entry, *, share: float, salt: str, position: int) -> bool:
        """Write a batch under the stream's lock; False when the stream moved on from `position`.

        All files appear at once; a kill leaves a hidden folder, which nothing reads.
        """
        with self.lock():
            if self.position() != position:
                return False
            self.check_split(share=share, salt=salt)
            if self.split() is None:
                split = {"heldout_share": share, "heldout_salt": salt}
                write_json(self.folder / "stream.json", split)
            with atomic_folder(self.path(entry.kind, entry.id)) as folder:
                _write_rows(folder / ROWS, entry.kind, entry.rows)
                if entry.kind is Kind.batch:
                    from rlhf.data.profile import write_profile  # With NumPy.

                    write_profile(folder, batch=entry.id, is_first=not self.ids(Kind.batch))
                write_jsonl(folder / "refused.jsonl", entry.refused)
                write_jsonl(folder / "excluded.jsonl", entry.excluded)
                for write in entry.beside:
                    write(folder)
                if entry.tombstone is not None:
                    stone = replace(entry.tombstone, sequence=position + 1)
                    write_json(folder / FILE, stone.to_json())
                files = list_files(folder)
                manifest = {"sequence": position + 1, **entry.manifest, "files": files}
                write_json(folder / MANIFEST, manifest)
        return True

    def path(self, kind: Kind, id: str) -> Path:
        """Return the folder of a batch or set."""
        return self.folder / FOLDERS[kind] / id

    def _manifests(self, kind: Kind) -> dict[str, dict[str, Any]]:
        paths = (self.folder / FOLDERS[kind]).glob(f"*/{MANIFEST}")
        return {p.parent.name: read_json(p) for p in paths if not p.parent.name.startswith(".")}

    def _live_rows(self, kind: Kind, id: str) -> Iterator[dict[str, Any]]:
        """Yield the rows that count: of the batch or set itself, then of its corrections."""
        stones = self.tombstones()
        for part in self.parts(kind, id):
            dead = dead_ids(stones, kind.name, part)
            yield from (row for row in self._rows(kind, part) if row["id"] not in dead)

    def _rows(self, kind: Kind, id: str) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as pq

        path = self.path(kind, id) / ROWS
        if self.manifest(kind, id)["files"][ROWS]["sha256"] != sha256_file(path):
            raise ArtifactError(f"{path} changed after ingest; restore it or ingest its file anew")
        names = [name for name in row_schema(kind).names if name not in KEY_COLUMNS]
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=names):
                for row in batch.to_pylist():
                    yield {**row, "meta": json.loads(row["meta"])}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Wait for other writers of this stream; the lock ends with its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise ArtifactError(
                    f"{self.folder} cannot be locked ({error.strerror}), so that two ingests could "
                    "collide; put paths.store on a file system with flock"
                ) from error
            yield


def _scan_file(path: Path, names: list[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(SCAN_ROWS, columns=names, use_threads=False)


def _are_among(column: pa.Array, ids: Collection[str]) -> Any:
    """Return a mask of the texts that are among some."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.is_in(column, pa.array(sorted(ids), pa.string()))
    return found.to_numpy(zero_copy_only=False)


def row_schema(kind: Kind) -> pa.Schema:
    """Return the columns of rows.parquet."""
    import pyarrow as pa

    text, flag = pa.string(), pa.bool_()
    messages = pa.list_(pa.struct([("role", text), ("content", text)]))
    fields = [("id", text)]
    if kind is Kind.sft:
        fields.append(("messages", messages))
    else:
        fields.append(("prompt", messages))
    if kind in (Kind.batch, Kind.open):
        texts = ("chosen", "rejected", "strength", "axis", "annotator", "model_chosen")
        flags = ("chosen_safe", "rejected_safe", "tie", "repeat_prompt")
        fields += [(name, text) for name in (*texts, "model_rejected")]
        fields += [(name, flag) for name in flags]
    if kind is Kind.prompts:
        fields.append(("is_safety", flag))
    fields += [("source", text), ("heldout", flag), ("meta", text)]
    fields += [(name, flag if name == "key_swapped" else text) for name in KEY_COLUMNS]
    return pa.schema(fields)


def _write_rows(path: Path, kind: Kind, tables: Iterable[pa.Table]) -> None:
    import pyarrow.parquet as pq

    schema = row_schema(kind)
    repeating = [name for name in REPEATING if name.split(".")[0] in schema.names]
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=repeating) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=CHUNK_ROWS)
