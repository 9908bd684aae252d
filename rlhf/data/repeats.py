"""What a file repeats: of itself and of everything that came before, in bounded memory.

Rows meet by 64-bit words of their keys, sorted; only rows that meet another are looked at in full.
The file's own words are held, 16 bytes a row and key, and the earlier rows stream past them. A file
of more than PART_ROWS rows is compared in parts, each with the share of the keys that falls to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from rlhf.data.columns import Mask, first_words, hex_texts
from rlhf.data.files import quote
from rlhf.data.staging import Staging

if TYPE_CHECKING:
    import pyarrow as pa

Words = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]

PART_ROWS = 4_000_000
REFUSED = "refused"
"""The verdict on a row whose id stands for another row."""


class Earlier(Protocol):
    """The accepted rows of earlier batches, in ingest order."""

    def scan(self, names: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield columns of id and keys in pieces, each with the name of its batch."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What comparing rows with others found.

    `table` has row, policy (or REFUSED) and reason, by row, of the rows that are not accepted;
    `repeats_prompt` holds for every staged row whether its prompt came in an earlier batch.
    """

    table: pa.Table
    repeats_prompt: Mask


class Index:
    """Sorted words of rows, and which of them are met."""

    def __init__(self, words: Words, rows: Rows) -> None:
        order = np.argsort(words, kind="stable")
        self._words = words[order]
        self._rows = rows[order]
        self._is_met = np.zeros(len(words), bool)

    def meet(self, words: Words) -> Mask:
        """Tell which words are here, and remember which of ours they are."""
        if not self._words.size:
            return np.zeros(len(words), bool)
        at = np.minimum(np.searchsorted(self._words, words), self._words.size - 1)
        found: Mask = self._words[at] == words
        self._is_met[at[found]] = True
        return found

    def met(self, *, or_twice: bool = False) -> Rows:
        """Return the rows that were met, in order; `or_twice` adds those with equal words."""
        differs = np.ones(self._words.size, bool)
        differs[1:] = self._words[1:] != self._words[:-1]
        run = np.cumsum(differs) - 1
        chosen = np.bincount(run, weights=self._is_met) > 0
        if or_twice:
            chosen |= np.bincount(run) > 1
        return np.sort(self._rows[chosen[run]])


def id_words(ids: pa.Array) -> Words:
    """Return a word for every id, which holds in this process only."""
    return np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids)).view(np.uint64)


def find_verdicts(staging: Staging, earlier: Earlier, *, batch: str) -> Verdicts:
    """Compare the staged rows of `batch` with each other and with the earlier ones.

    The place for a further rule that compares rows: its table of row, policy and reason joins the
    others here, after the rules that come before it.
    """
    collisions = _collisions(staging, earlier)
    repetitions, repeats_prompt = _repetitions(staging, earlier, batch, collisions["row"])
    return Verdicts(join_verdicts([collisions, repetitions]), repeats_prompt)


def join_verdicts(tables: Iterable[pa.Table]) -> pa.Table:
    """Return one verdict a row, in order of rows: that of the first table which has one."""
    import pyarrow as pa

    joined = pa.concat_tables(tables).combine_chunks()
    _, first = np.unique(joined["row"].to_numpy(), return_index=True)
    return joined.take(pa.array(first))


def _parts(staging: Staging) -> Iterator[tuple[np.uint64, np.uint64]]:
    number = 1 + staging.num_rows // PART_ROWS
    for part in range(number):
        yield np.uint64(part), np.uint64(number)


def _index(
    staging: Staging, name: str, part: tuple[np.uint64, np.uint64], barred: Rows | None = None
) -> Index:
    """Index the part's words of a key; `barred` rows and those that a policy excludes are no one's
    original."""
    import pyarrow as pa

    words, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for start, batch in staging.scan([name] if barred is None else [name, "policy"]):
        column = batch.column(name)
        is_word = pa.types.is_uint64(column.type)
        found = column.to_numpy() if is_word else first_words(column)
        mine = found % part[1] == part[0]
        if barred is not None:
            mine &= batch.column("policy").is_null().to_numpy(zero_copy_only=False)
            mine[barred[slice(*np.searchsorted(barred, [start, start + len(mine)]))] - start] = (
                False
            )
        words.append(found[mine])
        rows.append(np.flatnonzero(mine) + start)
    return Index(np.concatenate(words), np.concatenate(rows))


def _collisions(staging: Staging, earlier: Earlier) -> pa.Table:
    """Find ids that stand for two different rows; the pool and the intervals go by ids."""
    found = [_verdicts([], [], [])]
    for part in _parts(staging):
        index = _index(staging, "key_id", part)
        met = _Met(("id", "key_content"))
        for name, batch in earlier.scan(met.names):
            met.add(name, batch, index.meet(id_words(batch.column("id"))))
        rows = index.met(or_twice=True)
        if rows.size:
            found.append(_colliding(staging, rows, met.table()))
    return join_verdicts(found)


def _colliding(staging: Staging, rows: Rows, earlier: pa.Table) -> pa.Table:
    mine = staging.take(["id", "key_content", "line"], rows)
    # The last of the earlier rows under an id is the one that counts.
    newest = np.arange(earlier.num_rows)[::-1]
    earlier = earlier.take(newest)
    ids = _codes(earlier["id"], mine["id"])
    contents = _codes(earlier["key_content"], _hex(mine["key_content"]))
    first = _first_of(ids)
    is_mine = np.arange(len(ids)) >= earlier.num_rows
    is_right = contents == contents[first]
    right = np.flatnonzero(is_mine & is_right)
    registered = np.full(ids.max() + 1, len(ids))
    np.minimum.at(registered, ids[right], right)
    wrong = np.flatnonzero(is_mine & ~is_right)
    reasons = []
    for place, name in zip(
        wrong, mine["id"].take(wrong - earlier.num_rows).to_pylist(), strict=True
    ):
        where = registered[ids[place]]
        if where < place:
            line = mine["line"][int(where) - earlier.num_rows].as_py()
            reasons.append(f"id={quote(name)} has other content on line {line}")
        else:
            batch = earlier["batch"][int(first[place])].as_py()
            reasons.append(f"id={quote(name)} has other content in {batch}")
    return _verdicts(rows[wrong - earlier.num_rows], [REFUSED] * len(wrong), reasons)


def _repetitions(
    staging: Staging, earlier: Earlier, batch: str, barred: pa.ChunkedArray
) -> tuple[pa.Table, Mask]:
    """Find rows that were met before, literally or folded, and their contradictions."""
    found = [_verdicts([], [], [])]
    repeats_prompt = np.zeros(staging.num_rows, bool)
    for part in _parts(staging):
        near = _index(staging, "key_near", part, barred.to_numpy())
        prompts = _index(staging, "key_prompt", part)
        met = _Met(("id", "key_near", "key_exact", "key_swapped"))
        met_prompts = _Met(("key_prompt",))
        for name, rows in earlier.scan([*met.names, *met_prompts.names]):
            met.add(name, rows, near.meet(first_words(rows.column("key_near"))))
            met_prompts.add(name, rows, prompts.meet(first_words(rows.column("key_prompt"))))
        repeats_prompt[_with_prompt(staging, prompts.met(), met_prompts.table())] = True
        contested = near.met(or_twice=True)
        if contested.size:
            found.append(_repeating(staging, contested, met.table(), batch))
    return join_verdicts(found), repeats_prompt


def _with_prompt(staging: Staging, rows: Rows, earlier: pa.Table) -> Rows:
    import pyarrow.compute as pc

    mine = _hex(staging.take(["key_prompt"], rows)["key_prompt"])
    return rows[pc.is_in(mine, earlier["key_prompt"].combine_chunks()).to_numpy()]


def _repeating(staging: Staging, rows: Rows, earlier: pa.Table, batch: str) -> pa.Table:
    """Judge rows that share a near key with another: the first of each stays.

    The place of the policy on contradictions: `seen` is the original of a row, and `differs` tells
    that it has the opposite verdict.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    mine = staging.take(["id", "key_near", "key_exact", "key_swapped"], rows)
    near = _codes(earlier["key_near"], _hex(mine["key_near"]))
    exact = _codes(earlier["key_exact"], _hex(mine["key_exact"]))
    swapped = pa.concat_arrays(
        [*earlier["key_swapped"].chunks, *mine["key_swapped"].chunks]
    ).to_numpy(zero_copy_only=False)
    leader, twin = _first_of(near), _first_of(exact)
    places = np.arange(len(near))
    left_out = np.flatnonzero((places >= earlier.num_rows) & (leader < places))
    leader, twin = leader[left_out], twin[left_out]
    is_twin = (twin < earlier.num_rows) | (twin == leader)
    seen = np.where(is_twin, twin, leader)
    differs = swapped[seen] != swapped[left_out]
    names = np.where(is_twin, "duplicate", "near_duplicate").astype(object)
    where = np.where(seen < earlier.num_rows, "_of_earlier", "_in_file").astype(object)
    policies = np.where(differs, "contradicting", names + where)
    ids = pa.chunked_array([*earlier["id"].chunks, *mine["id"].chunks], pa.string())
    batches = pa.chunked_array(
        [*earlier["batch"].chunks, pa.array([batch] * mine.num_rows, pa.string())], pa.string()
    )
    verbs = pa.array(np.where(differs, "contradicts ", "repeats "), pa.string())
    originals = [column.take(pa.array(seen)).combine_chunks() for column in (ids, batches)]
    reasons = pc.binary_join_element_wise(verbs, originals[0], " of ", originals[1], "")
    return _verdicts(rows[left_out - earlier.num_rows], policies, reasons)


class _Met:
    """Earlier rows that were met, with the names of their batches."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._tables: list[pa.Table] = []

    def add(self, name: str, batch: pa.RecordBatch, mask: Mask) -> None:
        import pyarrow as pa

        if mask.any():
            table = pa.Table.from_batches([batch.select(self.names).filter(mask)])
            batches = pa.array([name] * table.num_rows, pa.string())
            self._tables.append(table.append_column("batch", batches))

    def table(self) -> pa.Table:
        import pyarrow as pa

        if self._tables:
            return pa.concat_tables(self._tables).combine_chunks()
        flags = ("key_swapped",)
        types = [(name, pa.bool_() if name in flags else pa.string()) for name in self.names]
        return pa.schema([*types, ("batch", pa.string())]).empty_table()


def _verdicts(rows: Any, policies: Any, reasons: Any) -> pa.Table:
    import pyarrow as pa

    columns = [pa.array(rows, pa.int64()), pa.array(policies, pa.string())]
    reasons = reasons if isinstance(reasons, pa.Array) else pa.array(reasons, pa.string())
    return pa.table([*columns, reasons], names=["row", "policy", "reason"])


def _hex(column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa

    return pa.chunked_array([hex_texts(chunk) for chunk in column.chunks], pa.string())


def _codes(earlier: pa.ChunkedArray, mine: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return equal numbers for equal texts."""
    import pyarrow as pa

    both = pa.chunked_array([*earlier.chunks, *mine.chunks], pa.string()).combine_chunks()
    return both.dictionary_encode().indices.to_numpy().astype(np.int64)


def _first_of(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for every place the first one with the same code."""
    _, first = np.unique(codes, return_index=True)
    return first[codes]
