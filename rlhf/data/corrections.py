"""Corrections and withdrawals: which rows stop to count, and how that is written down."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.artifacts import sha256_file, write_json
from rlhf.data.ledger import FOLDERS, ROWS, History, Store
from rlhf.data.records import Kind
from rlhf.data.tombstones import FOLDER, Tombstone, dead_ids, entry_name
from rlhf.errors import DataError
from rlhf.nodes import NodeContext

if TYPE_CHECKING:
    from rlhf.data.parse import Defaults
    from rlhf.data.staging import Staging

MAX_LISTED = 20
"""Ids that a message lists."""

Replaced = Mapping[str, Collection[str]]
"""Batch or set, corrections included, to the ids of its rows that are replaced."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What a file corrects: the batch or set, why, and the name of the file's own rows."""

    of: str
    reason: str
    id: str


def open_correction(
    store: Store, kind: Kind, *, of: str, reason: str, path: Path, id: str | None, default: str
) -> Correction:
    """Check that there is something to correct, and name the correction.

    A correction of a correction is one of the same batch. Without a name of its own the file's name
    counts; where that is the batch's, a number is added. DataError: no such batch or set.
    """
    root = store.root_of(kind, of)
    if id is not None and id != root:
        return Correction(root, reason, id)
    earlier = {
        name: entry
        for name, entry in store.entries(kind).items()
        if "supersedes" in entry and entry["supersedes"] == root
    }
    digest = sha256_file(path)
    for name, entry in earlier.items():
        if entry["file"]["sha256"] == digest:
            return Correction(root, reason, name)
    name = default if default != root else f"{root}-correction-{len(earlier) + 1}"
    return Correction(root, reason, name)


def replaced_rows(
    store: Store, kind: Kind, correction: Correction, staging: Staging, history: History
) -> dict[str, set[str]]:
    """Return which live rows a file replaces, by the name they lie under: same id, other content.

    A row that is equal to the one that counts replaces nothing, and neither does one whose id
    stands in another batch.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from rlhf.data.columns import hex_texts

    ids = [batch.column("id") for _, batch in staging.scan(["id"])]
    family = set(store.parts(kind, correction.of))
    live: dict[str, tuple[str, str]] = {}
    for part, batch in history.scan(["id", "key_content"]):
        met = [batch.filter(pc.is_in(batch.column("id"), piece)) for piece in ids]
        for rows in met if part in family else ():
            names, contents = (column.to_pylist() for column in rows.columns)
            live.update({id: (part, key) for id, key in zip(names, contents, strict=True)})
    wanted = pa.array(sorted(live), pa.string())
    found: dict[str, set[str]] = {}
    for _, batch in staging.scan(["id", "key_content"]):
        rows = batch.filter(pc.is_in(batch.column("id"), wanted))
        contents = hex_texts(rows.column("key_content")).to_pylist() if rows.num_rows else []
        for id, content in zip(rows.column("id").to_pylist(), contents, strict=True):
            if live[id][1] != content:
                found.setdefault(live[id][0], set()).add(id)
    return found


def check_ids(path: Path, staging: Staging, defaults: Defaults) -> None:
    """Refuse a correction with rows that do not say which row they correct."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for _, batch in staging.scan(["id", "line"]):
        lines = batch.column("line")
        given = pc.binary_join_element_wise(f"{defaults.prefix}/", lines.cast(pa.string()), "")
        missing = lines.filter(pc.equal(batch.column("id"), given))
        if len(missing):
            raise DataError(
                f"{path} line {missing[0]}: id is missing, by which a correction finds its row; "
                "give every row the id it has in the store"
            )


def correction_stone(
    kind: Kind, correction: Correction, replaced: Replaced, *, path: Path, brought: str
) -> Tombstone:
    """Return the tombstone that goes with a correction; the store gives it its number."""
    return Tombstone(
        sequence=0,
        rows={kind.name: {part: tuple(sorted(ids)) for part, ids in sorted(replaced.items())}},
        reason=correction.reason,
        time=_now(),
        file={"name": path.name, "sha256": sha256_file(path)},
        kind=kind.name,
        of=correction.of,
        by=correction.id,
        brought=brought,
    )


def read_ids(path: Path) -> list[str]:
    """Read one row id a line, blank lines left out; DataError for no file, no id, no text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: give one row id a line") from error
    ids = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not ids:
        raise DataError(f"{path} names no row: give one row id a line")
    return ids


def withdraw(store: Store, path: Path, *, reason: str, kind: Kind | None = None) -> Tombstone:
    """Withdraw the rows whose ids a file lists, in all batches and sets or those of one kind.

    A tombstone without rows says that they were all withdrawn before; it is not written. Raises
    DataError, with nothing written, when an id is no row of the stream.
    """
    ids = read_ids(path)
    kinds = list(FOLDERS) if kind is None else [kind]
    with store.lock():
        rows, missing = _find(store, kinds, ids)
        if missing:
            listed = "\n".join(f"  {id}" for id in missing[:MAX_LISTED])
            more = len(missing) - MAX_LISTED
            listed += f"\n  and {more} more" if more > 0 else ""
            where = f"stream {store.stream!r}" + (f" (ingest.kind={kind.name})" if kind else "")
            raise DataError(
                f"{path}: {len(missing)} of {len(ids)} ids are no rows of {where}, so nothing was "
                f"withdrawn; correct or remove them\n{listed}"
            )
        stone = Tombstone(
            sequence=store.position() + 1,
            rows=rows,
            reason=reason,
            time=_now(),
            file={"name": path.name, "sha256": sha256_file(path)},
        )
        if stone.num_rows:
            write_json(store.folder / FOLDER / f"{stone.sequence:09d}.json", stone.to_json())
    return stone


def _find(
    store: Store, kinds: Iterable[Kind], ids: list[str]
) -> tuple[dict[str, dict[str, tuple[str, ...]]], list[str]]:
    """Return the live rows with these ids, and the ids that no row ever had."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    stones = store.tombstones()
    wanted = pa.array(ids, pa.string())
    rows: dict[str, dict[str, tuple[str, ...]]] = {}
    known: set[str] = set()
    for kind in kinds:
        for key in store.entries(kind):
            column = pq.read_table(store.path(kind, key) / ROWS, columns=["id"]).column("id")
            found = column.filter(pc.is_in(column, wanted)).to_pylist()
            known |= set(found)
            live = sorted(set(found) - dead_ids(stones, kind.name, key))
            if live:
                rows.setdefault(kind.name, {})[key] = tuple(live)
    return rows, [id for id in ids if id not in known]


def row_facts(store: Store, kind: Kind, key: str, ids: Collection[str]) -> list[dict[str, Any]]:
    """Return id, heldout, key_prompt and axis (None but for comparisons) of some rows."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    names = ["id", "heldout", "key_prompt"]
    if kind in (Kind.batch, Kind.open):
        names.append("axis")
    table = pq.read_table(store.path(kind, key) / ROWS, columns=names)
    kept = table.filter(pc.is_in(table.column("id"), pa.array(sorted(ids), pa.string())))
    return [{"axis": None, **row} for row in kept.to_pylist()]


def list_tombstones(store: Store) -> dict[str, str]:
    """Return what a listing says of corrections and withdrawals: `entry_name` to digest."""
    found = {}
    for stone in store.tombstones():
        touched = {(stone.kind, stone.of)} if stone.is_correction else set()
        for kind, sets in stone.rows.items():
            roots = {store.root_of(Kind[kind], key) for key in sets}
            touched |= {(kind, root) for root in roots}
        for kind, key in sorted(touched):
            found[entry_name(stone.sequence, kind, key)] = stone.digest
    return found


def open_rows(context: NodeContext) -> Store:
    """Return the stream as a node reads it: without later corrections and withdrawals."""
    config = context.config
    return Store(Path(config.paths.store), config.data.stream, as_of=context.inputs.as_of)


def drop_gone(context: NodeContext, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what earlier nodes wrote about prompts that were withdrawn or read otherwise now.

    Rows have prompt_id and prompt.
    """
    store = open_rows(context)
    stones = store.tombstones()
    sets = [item.id for item in context.inputs.of_kind("prompts")]
    parts = [part for key in sets for part in store.parts(Kind.prompts, key)]
    gone = {id for part in parts for id in dead_ids(stones, Kind.prompts.name, part)}
    if not gone:
        return rows
    now = {p.id: p.prompt for key in sets for p in store.prompts(key) if p.id in gone}
    return [
        row
        for row in rows
        if row["prompt_id"] not in gone or now.get(row["prompt_id"]) == row["prompt"]
    ]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
