"""Rows of a block as columns of our own fields, without a guess: rows that do not fit are left out.

JSON lines are read by `pyarrow.json` under a fixed schema. It is stricter than Python's parser (a
name twice, a lone surrogate), never laxer for the rows that are taken, so leaving out what it
refuses is enough. Parquet columns are cast where that changes no value.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlhf.data.files import RowError, read_object
from rlhf.data.keys import DERIVED
from rlhf.data.parse import FIELDS, unknown_fields
from rlhf.data.records import Kind

if TYPE_CHECKING:
    import pyarrow as pa

Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

TURNS = ("prompt", "messages", "completion")
FLAGS = ("chosen_safe", "rejected_safe", "tie", "is_safety", "heldout", "repeat_prompt")
"""Fields that are true or false; all but these and the turns are texts."""

META = b'"meta"'
COLON = re.compile(rb"[ \t\r]*:[ \t\r]*")
ROW_NUMBER = re.compile(r" in row (\d+)$")
ESCAPED_ASCII = re.compile(rb"\\u00(?:[2-6]|7[0-9a-eA-E])")
ESCAPED = re.compile(rb"\\u")
ANYTHING = re.compile(rb"")
MAX_FAULTS = 256
"""Rows of a block that `pyarrow.json` may stumble over; what follows then goes row by row."""
MAX_BRACKETS = 256
"""Brackets in a line whose other fields get a type: nesting must not exhaust the stack."""

_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Raw:
    """Columns of the rows that fit; `rows` are their indices in the block.

    `metas` is what each row says as `meta`, `extras` its fields without a meaning.
    """

    table: pa.Table
    rows: Indices
    metas: Sequence[Any]
    extras: Sequence[dict[str, Any]]


def field_type(name: str) -> pa.DataType:
    """Return the type of a record's column."""
    import pyarrow as pa

    if name in TURNS:
        return pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    return pa.bool_() if name in FLAGS else pa.string()


def from_lines(texts: Sequence[bytes], data: bytes, kind: Kind) -> Raw | None:
    """Return the lines of a block that fit; `data` is the block as a whole.

    `meta` may hold anything, so Python reads it; in its place pyarrow sees `true`, which also tells
    that it stood once, and at the top of the row.
    """
    rows = np.flatnonzero(_are_plain(texts, data))
    if rows.size == 0:
        return None
    kept = [texts[row] for row in rows.tolist()]
    kept, metas, has_meta = _without_metas(kept) if META in data else _no_metas(kept)
    table, fits = _read_json(kept, _line_schema(kind, read_object(kept[0])))
    if table is None:
        return None
    same = table["meta"].is_valid().to_numpy() == has_meta[fits]
    chosen = np.flatnonzero(fits)[same]
    table = table.drop_columns(["meta"])
    table = table if same.all() else table.filter(same).combine_chunks()
    return Raw(table, rows[chosen], [metas[i] for i in chosen], [{}] * chosen.size)


def from_batch(batch: pa.RecordBatch, kind: Kind) -> Raw | None:
    """Return the rows of a Parquet file, when its columns have the types of our own fields."""
    import pyarrow as pa

    names = batch.schema.names
    others = [*unknown_fields(kind, dict.fromkeys(names)), *({"meta"} & set(names))]
    extras: list[dict[str, Any]] = [{}] * batch.num_rows
    try:
        columns = {
            name: _plain_column(batch.column(name), name)
            for name in sorted((FIELDS[kind] - {"meta", "completion", *DERIVED}) & set(names))
        }
        if others:
            extras = json.loads(json.dumps(batch.select(others).to_pylist(), default=str))
    except ValueError:  # of which pa.ArrowInvalid is one
        return None
    metas = [row.pop("meta", None) for row in extras] if "meta" in names else [None] * len(extras)
    return Raw(pa.table(columns), np.arange(batch.num_rows), metas, extras)


def _are_plain(texts: Sequence[bytes], data: bytes) -> Mask:
    """Tell which lines may be given to `pyarrow.json`: UTF-8, from a brace to a brace.

    Between such lines a row ends, so as many rows as lines means one row a line.
    """
    found = [text[:1] == b"{" and text[-1:] == b"}" for text in texts]
    if not (data.isascii() or _is_utf8(data)):
        found = [fits and _is_utf8(text) for fits, text in zip(found, texts, strict=True)]
    return np.array(found, bool)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _no_metas(texts: Sequence[bytes]) -> tuple[list[bytes], list[Any], Mask]:
    return list(texts), [None] * len(texts), np.zeros(len(texts), bool)


def _without_metas(texts: Sequence[bytes]) -> tuple[list[bytes], list[Any], Mask]:
    """Return lines with `true` as their last `meta`, the values, and which lines had one.

    All values are read at once where every `meta` is the last of its row, as they mostly are.
    """
    cut, metas, has_meta = _no_metas(texts)
    parts = [text.rpartition(META) for text in texts]
    has_meta = np.array([name != b"" and tail[:1] == b":" for _, name, tail in parts], bool)
    rows = np.flatnonzero(has_meta)
    values = _read_all([parts[row][2][1:-1] for row in rows])
    if values is None:
        found = [_without_meta(text) for text in texts]
        return [x[0] for x in found], [x[1] for x in found], np.array([x[2] for x in found], bool)
    for row, value in zip(rows, values, strict=True):
        cut[row] = parts[row][0] + b'"meta":true}'
        metas[row] = value
    return cut, metas, has_meta


def _read_all(values: Sequence[bytes]) -> list[Any] | None:
    """Parse values in one go; None when one is no JSON value. Each is kept apart by a token that
    nobody can foresee, so that none reaches into the next."""
    token = secrets.token_hex(16)
    text = b"[" + f',"{token}",'.encode().join(values) + b"]"
    try:
        found = json.loads(text.decode()) if values else []
    except (ValueError, RecursionError):
        return None
    apart = len(found) == max(2 * len(values) - 1, 0) and set(found[1::2]) <= {token}
    return found[::2] if apart else None


def _without_meta(text: bytes) -> tuple[bytes, Any, bool]:
    start = text.rfind(META)
    match = COLON.match(text, start + len(META)) if start > 0 else None
    if match is None:
        return text, None, False
    tail = text[match.end() :].decode()
    try:
        value, end = _DECODER.raw_decode(tail)
    except (ValueError, RecursionError):
        return text, None, False
    end = end if tail.isascii() else len(tail[:end].encode())
    return text[: match.end()] + b"true" + text[match.end() + end :], value, True


def _line_schema(kind: Kind, first: dict[str, Any] | RowError) -> pa.Schema:
    """Return the types of a block's fields; the first row says which form id and turns have."""
    import pyarrow as pa

    row = first if isinstance(first, dict) else {}
    fields = []
    for name in sorted(FIELDS[kind] - {"id", "meta"}):
        turns = name in ("prompt", "messages", "completion")
        is_text = turns and isinstance(row.get(name), str)
        listed = field_type("messages") if turns else field_type(name)
        fields.append((name, pa.string() if is_text else listed))
    if not isinstance(row.get("id"), int):
        fields.append(("id", pa.string()))
    return pa.schema([*fields, ("meta", pa.bool_())])


def _read_json(texts: Sequence[bytes], schema: pa.Schema) -> tuple[pa.Table | None, Mask]:
    """Return the rows that have the schema's fields and no others, and which lines they are."""
    import pyarrow as pa

    fits = np.ones(len(texts), bool)
    try:
        table = _parse_json(memoryview(b"\n".join(texts)), schema, others="error")
        if table.num_rows == len(texts):
            return table, fits
    except pa.ArrowInvalid:
        # Other fields get a type below, as deep as they are nested.
        fits[:] = [text.count(b"[") + text.count(b"{") <= MAX_BRACKETS for text in texts]
    _find_faults(texts, fits, schema)
    table = _parse_kept(texts, fits, schema)
    if table is None or table.num_rows != fits.sum():
        return None, np.zeros(len(texts), bool)
    return _without_others(table, texts, fits, schema)


def _find_faults(texts: Sequence[bytes], fits: Mask, schema: pa.Schema) -> None:
    """Unmark the lines on which `pyarrow.json` stumbles; it names the first one each time."""
    import pyarrow as pa

    lines = np.flatnonzero(fits)
    kept = [texts[line] for line in lines.tolist()]
    data = b"\n".join(kept)
    starts = np.cumsum([0, *(len(text) + 1 for text in kept)])
    first = 0
    for _ in range(MAX_FAULTS):
        if first >= len(kept):
            return
        try:
            _parse_json(memoryview(data)[starts[first] :], schema)
            return
        except pa.ArrowInvalid as error:
            match = ROW_NUMBER.search(str(error))
            if match is None:
                break
            # After two rows on one line the count is one too far.
            fault = first + int(match.group(1))
            fits[lines[max(fault - 1, 0) : fault + 1]] = False
            first = fault + 1
    fits[lines[first:]] = False


def _parse_json(data: memoryview, schema: pa.Schema, *, others: str = "infer") -> pa.Table:
    import pyarrow as pa
    import pyarrow.json as pj

    return pj.read_json(
        pa.BufferReader(pa.py_buffer(data)),
        read_options=pj.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior=others),
    ).combine_chunks()


def _parse_kept(texts: Sequence[bytes], fits: Mask, schema: pa.Schema) -> pa.Table | None:
    import pyarrow as pa

    if not fits.any():
        return None
    kept = [text for text, fit in zip(texts, fits, strict=True) if fit]
    try:
        return _parse_json(memoryview(b"\n".join(kept)), schema)
    except pa.ArrowInvalid:
        return None


def _without_others(
    table: pa.Table, texts: Sequence[bytes], fits: Mask, schema: pa.Schema
) -> tuple[pa.Table | None, Mask]:
    """Leave out rows with fields that have no meaning: their values belong into `meta`."""
    others = set(table.schema.names) - set(schema.names) - {"id"}
    if not others:
        return table, fits
    literals = [json.dumps(name, ensure_ascii=False).encode() for name in others]
    # A name may also be written with escapes: those of ASCII are rare, others are not.
    escapes = ESCAPED_ASCII if "".join(others).isascii() else ESCAPED
    if any(b"\\" in literal for literal in literals):
        escapes = ANYTHING
    has = [
        any(literal in text for literal in literals) or escapes.search(text) is not None
        for text in texts
    ]
    fits = fits & ~np.array(has, bool)
    table = _parse_kept(texts, fits, schema)
    return table, fits if table is not None else np.zeros(len(texts), bool)


def _plain_column(column: pa.Array, name: str) -> pa.Array:
    """Cast a column to the type of its field; ArrowInvalid where that would change a value."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    turns = name in ("prompt", "messages")
    if name == "id" and pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    if turns and pa.types.is_list(column.type):
        return _plain_turns(column)
    texts = (pa.string(), pa.large_string(), pa.string_view())
    wanted = pa.string() if turns else field_type(name)
    allowed = texts if wanted == pa.string() else (pa.bool_(),)
    if column.type not in (*allowed, pa.null()):
        raise pa.ArrowInvalid(f"{name} is {column.type}")
    column = column.cast(wanted)
    column.validate(full=True)
    return column


def _plain_turns(column: pa.Array) -> pa.Array:
    """Return turns with role and content alone; other parts of a turn have no meaning."""
    import pyarrow as pa
    import pyarrow.compute as pc

    inner = column.type.value_type
    names = ("role", "content")
    if not pa.types.is_struct(inner) or any(inner.get_field_index(name) < 0 for name in names):
        raise pa.ArrowInvalid(f"turns are {column.type}")
    flat = column.flatten()
    texts = [_plain_column(flat.field(name), name) for name in names]
    struct = pa.StructArray.from_arrays(texts, names=names, mask=flat.is_null())
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    mask = column.is_null() if column.null_count else None
    return pa.ListArray.from_arrays(offsets, struct, mask=mask)
