"""A block of a file to a table of records: by columns where that is exact, else row by row.

Every row that the columnar way does not take goes to `parse.parse_row`, which knows the foreign
formats and words the messages, and comes back in its place. So both ways give the same rows, which
the tests hold together.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.data.columns import turns_name
from rlhf.data.files import (
    Block,
    RowError,
    Rows,
    cut_line,
    plain_row,
    quote,
    read_object,
    storable,
)
from rlhf.data.keys import DERIVED
from rlhf.data.parse import ROLES, Defaults, parse_meta, parse_row, unknown_fields
from rlhf.data.raw import Indices, Mask, Raw, field_type, from_batch, from_lines
from rlhf.data.records import AXES, RECORDS, STRENGTHS, Comparison, Kind

if TYPE_CHECKING:
    import pyarrow as pa

MAX_REFUSED_VALUE = 500
"""Characters of a refused value that refused.jsonl keeps."""

VISIBLE = "[!-~]"
"""A text with such a character is not blank; one without is looked at by Python."""

_SORTED = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Tabulated:
    """Rows of a block: `table` has line, the record's fields, and `meta_sorted` to hash it."""

    table: pa.Table
    refused: list[dict[str, Any]]
    extra_fields: Counter[str]


def record_schema(kind: Kind) -> pa.Schema:
    """Return the columns of a kind's record, in its order; what ingest derives is left out."""
    import pyarrow as pa

    names = [name for name in RECORDS[kind].__slots__ if name not in DERIVED]
    return pa.schema([(name, field_type(name)) for name in names])


def refused_row(line: int, reason: str, value: object) -> dict[str, Any]:
    """Return an entry of refused.jsonl; long values are shortened."""
    text = value if isinstance(value, str) else quote(value)
    return {"line": line, "reason": reason, "value": storable(text[:MAX_REFUSED_VALUE])}


def tabulate(block: Block, kind: Kind, defaults: Defaults, *, by_row: bool = False) -> Tabulated:
    """Return a block's records, in file order, and what was refused.

    `by_row` takes the row-wise way for every row: the same result, slowly.
    """
    raw: Raw | None = None
    left: Iterable[tuple[int, dict[str, Any] | RowError]]
    if isinstance(block, Rows):
        raw = None if by_row else from_batch(block.batch, kind)
        table, rest = _by_column(raw, block.first, block.batch.num_rows, kind, defaults)
        left = ((block.first + int(i), plain_row(block.batch, int(i))) for i in rest)
    elif block.is_cut:
        table, left = _no_rows(kind), [(block.first, cut_line(block))]
    else:
        texts = block.texts()
        raw = None if by_row else from_lines(texts, block.data, kind)
        table, rest = _by_column(raw, block.first, len(texts), kind, defaults)
        found = ((block.first + int(i), texts[i]) for i in rest)
        left = ((line, read_object(text)) for line, text in found if text.strip())
    slow = _by_row(left, kind, defaults)
    if isinstance(block, Rows) and table.num_rows:
        # Every row of a Parquet file has all of its columns.
        names = unknown_fields(kind, dict.fromkeys(block.batch.schema.names))
        slow.extra_fields.update(dict.fromkeys(names, table.num_rows))
    return Tabulated(_rejoin(table, slow.table), slow.refused, slow.extra_fields)


def _by_row(
    rows: Iterable[tuple[int, dict[str, Any] | RowError]], kind: Kind, defaults: Defaults
) -> Tabulated:
    import pyarrow as pa

    refused: list[dict[str, Any]] = []
    extra_fields: Counter[str] = Counter()
    written: list[dict[str, Any]] = []
    for line, row in rows:
        if isinstance(row, RowError):
            refused.append(refused_row(line, row.reason, row.value))
            continue
        try:
            record = parse_row(kind, row, line=line, defaults=defaults).to_json()
        except RowError as error:
            refused.append(refused_row(line, error.reason, error.value))
        else:
            stored, hashed = _write_meta(record["meta"])
            written.append({**record, "line": line, "meta": stored, "meta_sorted": hashed})
        extra_fields.update(unknown_fields(kind, row))
    table = pa.Table.from_pylist(written, schema=_no_rows(kind).schema)
    return Tabulated(table, refused, extra_fields)


def _no_rows(kind: Kind) -> pa.Table:
    import pyarrow as pa

    fields = [("line", pa.int64()), *record_schema(kind), ("meta_sorted", pa.string())]
    return pa.schema(fields).empty_table()


def _rejoin(table: pa.Table, slow: pa.Table) -> pa.Table:
    """Put the rows of both ways back into the order of the file."""
    import pyarrow as pa

    if slow.num_rows == 0:
        return table
    if table.num_rows == 0:
        return slow
    both = pa.concat_tables([table, slow]).combine_chunks()
    return both.take(pa.array(np.argsort(both["line"].to_numpy(), kind="stable")))


def _by_column(
    raw: Raw | None, first: int, num_rows: int, kind: Kind, defaults: Defaults
) -> tuple[pa.Table, Indices]:
    """Return the records of the rows that are right, and the indices of all other rows."""
    import pyarrow as pa

    taken = np.zeros(num_rows, bool)
    if raw is None:
        return _no_rows(kind), np.flatnonzero(~taken)
    metas, fits = _metas(raw)
    columns = {name: raw.table[name] for name in raw.table.schema.names}
    for name in {"id", *record_schema(kind).names} - set(columns) - {"meta"}:
        columns[name] = pa.nulls(len(metas), field_type(name))
    columns |= {"line": pa.array(raw.rows + first, pa.int64())}
    columns["meta"] = pa.array(_dump_all(metas, json.JSONEncoder()), pa.string())
    columns["meta_sorted"] = pa.array(_dump_all(metas, _SORTED), pa.string())
    if RECORDS[kind] is Comparison:
        ties = [meta.get("tie") for meta in metas]
        fits &= np.array([tie is None or isinstance(tie, bool) for tie in ties], bool)
        columns["meta_tie"] = pa.array([tie is True for tie in ties], pa.bool_())
    table, rows = _keep(pa.table(columns), raw.rows, fits)
    if columns["id"].type not in (pa.string(), pa.int64()):
        return _no_rows(kind), np.flatnonzero(~taken)
    table, rows = _keep(table, rows, _are_there(table, kind, defaults))
    table, rows = _keep(table, rows, _are_turns(table[turns_name(kind)], kind))
    taken[rows] = True
    return _records(table, kind, defaults), np.flatnonzero(~taken)


def _keep(table: pa.Table, rows: Indices, mask: Mask) -> tuple[pa.Table, Indices]:
    if mask.all():
        return table, rows
    return table.filter(mask).combine_chunks(), rows[mask]


def _metas(raw: Raw) -> tuple[list[dict[str, Any]], Mask]:
    """Return `meta` with the fields that have no meaning, and which rows' may be taken."""
    fits = np.ones(len(raw.metas), bool)
    metas: list[dict[str, Any]] = []
    for index, (meta, extra) in enumerate(zip(raw.metas, raw.extras, strict=True)):
        try:
            found = meta if type(meta) is dict else parse_meta(meta)
            metas.append({**found, **extra} if extra else found)
        except RowError:
            metas.append({})
            fits[index] = False
    return metas, fits


def _dump_all(metas: Sequence[dict[str, Any]], encoder: json.JSONEncoder) -> list[str]:
    """Return every object as JSON, in one go: a token that nobody can foresee keeps them apart."""
    if not any(metas):
        return ["{}"] * len(metas)
    token = secrets.token_hex(16)
    between: list[Any] = [token] * (2 * len(metas) - 1)
    between[::2] = metas
    comma = encoder.item_separator
    return encoder.encode(between)[1:-1].split(f'{comma}"{token}"{comma}')


def _write_meta(meta: dict[str, Any]) -> tuple[str, str]:
    return (json.dumps(meta), _SORTED.encode(meta)) if meta else ("{}", "{}")


def _are_there(table: pa.Table, kind: Kind, defaults: Defaults) -> Mask:
    """Tell which rows have what they need, and values that are known."""
    import pyarrow as pa
    import pyarrow.compute as pc

    turns = table[turns_name(kind)]
    fits = [turns.is_valid()]
    if not pa.types.is_string(turns.type):
        fits.append(pc.greater(pc.list_value_length(turns).fill_null(0), 0))
    if pa.types.is_string(table["id"].type):
        fits.append(pc.match_substring_regex(table["id"], VISIBLE).fill_null(True))
    if RECORDS[kind] is Comparison:
        fits += [table["chosen"].is_valid(), table["rejected"].is_valid()]
        fits.append(pc.is_in(table["strength"], pa.array([*STRENGTHS, None], pa.string())))
        axes = AXES if defaults.axis is None else (*AXES, None)
        fits.append(pc.is_in(table["axis"], pa.array(axes, pa.string())))
    found = fits[0]
    for more in fits[1:]:
        found = pc.and_(found, more)
    return found.to_numpy().astype(bool)


def _are_turns(turns: pa.ChunkedArray, kind: Kind) -> Mask:
    """Tell which turns are messages as `parse` wants them; every row has some."""
    import pyarrow as pa
    import pyarrow.compute as pc

    fits = np.ones(len(turns), bool)
    if pa.types.is_string(turns.type) or not len(turns):
        return fits
    lists = turns.combine_chunks()
    flat = lists.flatten()
    starts = lists.offsets.to_numpy().astype(np.int64)
    starts -= starts[0]
    roles = flat.field("role")

    def has(role: str) -> Mask:
        return pc.equal(roles, role).fill_null(False).to_numpy(zero_copy_only=False)

    known = np.logical_or.reduce([has(role) for role in ROLES])
    wrong = ~known | ~flat.is_valid().to_numpy(zero_copy_only=False)
    wrong |= ~flat.field("content").is_valid().to_numpy(zero_copy_only=False)
    later = np.ones(len(flat), bool)
    later[starts[:-1]] = False
    wrong |= has("system") & later
    if kind is Kind.sft:
        fits = has("assistant")[starts[1:] - 1] & np.logical_or.reduceat(has("user"), starts[:-1])
    else:
        fits = has("user")[starts[1:] - 1]
    return fits & ~np.logical_or.reduceat(wrong, starts[:-1])


def _records(table: pa.Table, kind: Kind, defaults: Defaults) -> pa.Table:
    """Fill in what rows do not say."""
    import pyarrow as pa
    import pyarrow.compute as pc

    name = turns_name(kind)
    columns = {field: table[field] for field in _no_rows(kind).schema.names}
    if pa.types.is_string(columns[name].type):
        content = columns[name].combine_chunks()
        user = pa.array(np.full(len(content), "user"), pa.string())
        flat = pa.StructArray.from_arrays([user, content], names=["role", "content"])
        starts = pa.array(np.arange(len(content) + 1), pa.int32())
        columns[name] = pa.ListArray.from_arrays(starts, flat)
    lines = table["line"].cast(pa.string())
    own = pc.binary_join_element_wise(f"{defaults.prefix}/", lines, "")
    columns["id"] = pc.coalesce(table["id"].cast(pa.string()), own)
    has_source = pc.greater(pc.binary_length(table["source"].fill_null("")), 0)
    columns["source"] = pc.if_else(has_source, table["source"], defaults.source)
    if RECORDS[kind] is Comparison:
        columns["axis"] = table["axis"].fill_null(defaults.axis or "")
        columns["tie"] = pc.or_(table["tie"].fill_null(False), table["meta_tie"])
    if kind is Kind.prompts:
        columns["is_safety"] = table["is_safety"].fill_null(defaults.is_safety)
    return pa.table(columns, schema=_no_rows(kind).schema)
