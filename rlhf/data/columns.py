"""Texts and hashes of whole columns: what `split.fold_text` and `keys.keys_of` define for a row.

Texts are handled as one buffer of UTF-8 with the offsets of its values; only values with rare
characters go through Python one by one. Every function takes columns without nulls, of any slice.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlhf.data.keys import UNHASHED
from rlhf.data.records import RECORDS, Comparison, Kind
from rlhf.data.split import FOLDED, fold_text

if TYPE_CHECKING:
    import pyarrow as pa

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

SPACE = 32
SHORT_ESCAPES = {
    b"\\": b"\\\\",  # first, for the others bring backslashes of their own
    b'"': b'\\"',
    b"\n": b"\\n",
    b"\r": b"\\r",
    b"\t": b"\\t",
    b"\f": b"\\f",
    b"\b": b"\\b",
}
"""Bytes that JSON writes as a backslash and one letter."""

IS_SHORT = np.isin(np.arange(256), [key[0] for key in SHORT_ESCAPES])
IS_ESCAPED = bytes(bool(IS_SHORT[byte]) or not 32 <= byte <= 126 for byte in range(256))
"""Byte to 1 where JSON in ASCII escapes it, by a letter or by a number."""

FOLDING = bytes(
    SPACE if FOLDED.fullmatch(chr(byte)) and byte < 128 else byte + 32 * (65 <= byte <= 90)
    for byte in range(256)
)
"""Byte to byte: what FOLDED matches to a blank, capitals to small letters, others as they are."""

WIDE_BLANKS = [
    char.encode()
    for char in "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000\u2018\u2019\u201c\u201d\u2026"
    + "".join(map(chr, range(0x2000, 0x200B)))
    if unicodedata.normalize("NFKC", char) == char
]
"""What else FOLDED matches, as far as NFKC leaves it."""


@dataclass(frozen=True, slots=True)
class KeyColumns:
    """Keys of rows as binary columns; `is_alike` marks comparisons of two equal folded texts."""

    content: pa.Array
    exact: pa.Array
    near: pa.Array
    swapped: pa.Array
    prompt: pa.Array
    is_alike: Mask


def key_columns(table: pa.Table, kind: Kind) -> KeyColumns:
    """Return the hashes of `keys.keys_of` for every row.

    The table has the fields of the kind's record and `meta_sorted`, `meta` as canonical JSON.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    turns = table["messages" if kind is Kind.sft else "prompt"].combine_chunks()
    starts = turns.offsets.to_numpy().astype(np.int64)
    starts -= starts[0]
    flat = turns.flatten()
    roles, contents = flat.field("role"), flat.field("content")
    folded = fold_texts(contents)
    literals = {"turns": json_texts(contents), "folded": json_texts(folded)}
    written = {
        name: _nest(_join('["', roles, '", ', literal, "]"), starts, ", ")
        for name, literal in literals.items()
    }
    objects = _join('{"content":', literals["turns"], ',"role":"', roles, '"}')
    ready = {turns_name(kind): _nest(objects, starts, ","), "meta": _one(table["meta_sorted"])}
    users = np.flatnonzero(pc.equal(roles, "user").to_numpy(zero_copy_only=False))
    first_user = users[np.searchsorted(users, starts[:-1])]
    prompt = digests(folded.take(pa.array(first_user)), _blake2b)
    if kind not in (Kind.batch, Kind.open):
        content = digests(_canonical(table, kind, ready), hashlib.sha256)
        exact, near = (digests(written[name], _blake2b) for name in ("turns", "folded"))
        no = np.zeros(table.num_rows, bool)
        return KeyColumns(content, exact, near, pa.array(no), prompt, no)
    ready |= {name: json_texts(_one(table[name])) for name in ("chosen", "rejected")}
    content = digests(_canonical(table, kind, ready), hashlib.sha256)
    axis = _one(table["axis"])
    exact = _join('["', axis, '", ', written["turns"], ", ")
    exact = _join(exact, ready["chosen"], ", ", ready["rejected"], "]")
    pair = [fold_texts(_one(table[name])) for name in ("chosen", "rejected")]
    swapped = pc.greater(*pair)
    sides = [json_texts(side) for side in pair]
    ordered = [pc.if_else(swapped, sides[1 - side], sides[side]) for side in (0, 1)]
    near = _join('["', axis, '", ', written["folded"], ", ", ordered[0], ", ", ordered[1], "]")
    return KeyColumns(
        content=content,
        exact=digests(exact, _blake2b),
        near=digests(near, _blake2b),
        swapped=swapped,
        prompt=prompt,
        is_alike=pc.equal(*pair).to_numpy(zero_copy_only=False),
    )


def turns_name(kind: Kind) -> str:
    """Return the field that holds a record's turns."""
    return "messages" if kind is Kind.sft else "prompt"


def fold_texts(texts: pa.Array) -> pa.Array:
    """Return `fold_text` of every value."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wide = pc.invert(pc.string_is_ascii(texts))
    plain = texts
    if pc.any(wide).as_py():
        normal = [unicodedata.normalize("NFKC", text) for text in texts.filter(wide).to_pylist()]
        folds = pa.array([text.casefold() for text in normal], pa.string())
        plain = pc.replace_with_mask(texts, wide, folds)
    data, offsets = _buffer(plain)
    blanked = data.tobytes().translate(FOLDING)
    for blank in WIDE_BLANKS if plain is not texts else ():
        if blank in blanked:
            blanked = blanked.replace(blank, b" " * len(blank))
    folded = _texts(*_squeeze(np.frombuffer(blanked, np.uint8), offsets))
    empty = pc.equal(pc.binary_length(folded), 0)
    if pc.any(empty).as_py():
        exact = [fold_text(text) for text in texts.filter(empty).to_pylist()]
        folded = pc.replace_with_mask(folded, empty, pa.array(exact, pa.string()))
    return folded


def json_texts(texts: pa.Array) -> pa.Array:
    """Return every value as json.dumps writes it: quoted and in ASCII."""
    import pyarrow as pa
    import pyarrow.compute as pc

    data, offsets = _buffer(texts)
    escaped = data.tobytes()
    places = np.flatnonzero(np.frombuffer(escaped.translate(IS_ESCAPED), np.uint8))
    values = data[places]
    is_short = IS_SHORT[values]
    short = places[is_short]
    found = set(np.unique(values[is_short]).tolist())
    for byte, text in SHORT_ESCAPES.items():
        if byte[0] in found:
            escaped = escaped.replace(byte, text)
    literals = _texts(np.frombuffer(escaped, np.uint8), offsets + np.searchsorted(short, offsets))
    literals = _join('"', literals, '"')
    if short.size < places.size:
        mask = np.zeros(len(texts), bool)
        mask[np.searchsorted(offsets, places[~is_short], side="right") - 1] = True
        exact = [encode_basestring_ascii(text) for text in texts.filter(mask).to_pylist()]
        literals = pc.replace_with_mask(literals, mask, pa.array(exact, pa.string()))
    return literals


def digests(texts: pa.Array, make: Callable[[bytes], Any]) -> pa.Array:
    """Return the hash of every value as a binary column."""
    import pyarrow as pa

    hashes = [make(text).digest() for text in texts.cast(pa.binary()).to_pylist()]
    return pa.array(hashes, pa.binary())


def hex_texts(keys: pa.Array) -> pa.Array:
    """Return binary values of one length as lower-case hexadecimal texts."""
    data, _ = _buffer(keys)
    size = len(data) // max(len(keys), 1)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    written = np.stack([digits[data >> 4], digits[data & 15]], axis=1).reshape(-1)
    return _texts(written, np.arange(len(keys) + 1, dtype=np.int64) * 2 * size)


def first_words(keys: pa.Array) -> npt.NDArray[np.uint64]:
    """Return the first eight bytes of every key, from a binary column or a hexadecimal one."""
    import pyarrow as pa

    data, _ = _buffer(keys)
    if not len(keys):
        return np.empty(0, np.uint64)
    table = data.reshape(len(keys), -1)
    if pa.types.is_string(keys.type):
        digits = table[:, :16] - np.where(table[:, :16] > 57, 87, 48).astype(np.uint8)
        table = np.bitwise_or(digits[:, ::2] << 4, digits[:, 1::2], dtype=np.uint8)
    return np.ascontiguousarray(table[:, :8]).view(np.uint64).reshape(-1)


_blake2b = partial(hashlib.blake2b, digest_size=16)


def _canonical(table: pa.Table, kind: Kind, ready: dict[str, pa.Array]) -> pa.Array:
    """Return what `artifacts.digest_json` hashes; `ready` columns are JSON already."""
    import pyarrow as pa
    import pyarrow.compute as pc

    parts: list[Any] = []
    for name in sorted(set(RECORDS[kind].__slots__) - set(UNHASHED)):
        parts.append(f'{"," if parts else "{"}"{name}":')
        if name in ready:
            parts.append(ready[name])
            continue
        column = _one(table[name])
        texts = column if pa.types.is_boolean(column.type) else json_texts(column.fill_null(""))
        texts = pc.if_else(column.is_valid(), texts.cast(pa.string()), "null")
        parts.append(texts)
    return _join(*parts, "}")


def _nest(items: pa.Array, starts: Offsets, separator: str) -> pa.Array:
    """Return the JSON lists of items that are JSON already."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lists = pa.ListArray.from_arrays(pa.array(starts.astype(np.int32)), items)
    return _join("[", pc.binary_join(lists, separator), "]")


def _join(*parts: Any) -> pa.Array:
    import pyarrow.compute as pc

    return pc.binary_join_element_wise(*parts, "")


def _one(column: Any) -> pa.Array:
    """Return a column in one piece."""
    import pyarrow as pa

    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _buffer(texts: pa.Array) -> tuple[Bytes, Offsets]:
    """Return the bytes of a column and where its values begin and end."""
    import pyarrow as pa

    if len(texts) == 0:
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    _, starts, data = texts.buffers()
    wide = pa.types.is_large_string(texts.type) or pa.types.is_large_binary(texts.type)
    offsets = np.frombuffer(starts, np.int64 if wide else np.int32)
    offsets = offsets[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    if data is None or offsets[0] == offsets[-1]:
        return np.empty(0, np.uint8), offsets - offsets[0]
    return np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]], offsets - offsets[0]


def _texts(data: Bytes, offsets: Offsets) -> pa.Array:
    import pyarrow as pa

    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.string(), len(offsets) - 1, buffers)


def _squeeze(data: Bytes, offsets: Offsets) -> tuple[Bytes, Offsets]:
    """Keep the last blank of each run inside a value, and none at its ends."""
    is_blank = data == SPACE
    followed = np.empty_like(is_blank)
    followed[:-1] = is_blank[1:]
    followed[offsets[1:][offsets[1:] > offsets[:-1]] - 1] = True
    data, offsets = _without(data, offsets, np.flatnonzero(is_blank & followed))
    starts = offsets[:-1][offsets[1:] > offsets[:-1]]
    return _without(data, offsets, starts[data[starts] == SPACE])


def _without(data: Bytes, offsets: Offsets, gone: npt.NDArray[np.intp]) -> tuple[Bytes, Offsets]:
    if gone.size == 0:
        return data, offsets
    keep = np.ones(len(data), bool)
    keep[gone] = False
    return data[keep], offsets - np.searchsorted(gone, offsets)


def is_comparison(kind: Kind) -> bool:
    """Tell whether a kind's rows are comparisons."""
    return RECORDS[kind] is Comparison
