"""What a file repeats: of itself and of everything that came before, in bounded memory.

Rows meet by 64-bit words of their keys, sorted; only rows that meet another are looked at in full.
The file's own words are held, 16 bytes a row and key, and the earlier rows stream past them. A file
of more than PART_ROWS rows is compared in parts, each with the share of the keys that falls to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from rlhf.config import Contradictions, NearDuplicates
from rlhf.data.columns import Mask, first_words, hex_texts
from rlhf.data.files import quote
from rlhf.data.ledger import History
from rlhf.data.near import ALIKE, own_similarity
from rlhf.data.similar import FOLDED, Note, RepeatRules, find_similar, judge_similar
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

    def withdrawn_rows(self) -> dict[str, str]:
        """Return id to content key of rows that were withdrawn."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What comparing rows with others found.

    `table` has row, policy (or REFUSED) and reason, by row, of the rows that are not accepted;
    `repeats_prompt` holds for every staged row whether its prompt came in an earlier batch; `notes`
    has every near duplicate and contradiction, also of rows that stay.
    """

    table: pa.Table
    repeats_prompt: Mask
    notes: list[Note]


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


def find_verdicts(
    staging: Staging, earlier: Earlier, *, batch: str, rules: RepeatRules
) -> Verdicts:
    """Compare the staged rows of `batch` with each other and with the earlier ones."""
    barred = join_verdicts([_collisions(staging, earlier), _withdrawals(staging, earlier)])
    repetitions, notes, repeats_prompt = _repetitions(staging, earlier, batch, barred, rules)
    table = join_verdicts([barred, repetitions])
    return Verdicts(table, repeats_prompt, sorted_notes(notes))


def add_similar(
    verdicts: Verdicts, staging: Staging, history: History, *, batch: str, rules: RepeatRules
) -> Verdicts:
    """Go on with what the rows that are left repeat but for a few words."""
    if rules.threshold is None:
        return verdicts
    left_out = verdicts.table["row"].to_numpy()
    found = find_similar(staging, history, left_out, batch=batch, threshold=rules.threshold)
    notes = judge_similar(found, rules)
    table = join_verdicts([verdicts.table, note_verdicts(notes)])
    return replace(verdicts, table=table, notes=sorted_notes([*verdicts.notes, *notes]))


def note_verdicts(notes: Iterable[Note]) -> pa.Table:
    """Return the verdicts on the rows that notes drop."""
    dropped = [note.verdict() for note in notes if note.fate == "drop"]
    return _verdicts(*zip(*dropped, strict=True)) if dropped else _verdicts([], [], [])


def sorted_notes(notes: Iterable[Note]) -> list[Note]:
    """Return one note a row, by row; the first one counts."""
    first: dict[int, Note] = {}
    for note in notes:
        first.setdefault(note.row, note)
    return [first[row] for row in sorted(first)]


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


def _withdrawals(staging: Staging, earlier: Earlier) -> pa.Table:
    """Find withdrawn rows that are delivered again as they were."""
    import pyarrow as pa
    import pyarrow.compute as pc

    withdrawn = earlier.withdrawn_rows()
    wanted = pa.array(sorted(withdrawn), pa.string())
    found = [_verdicts([], [], [])]
    for start, batch in staging.scan(["id", "key_content", "policy"]) if withdrawn else ():
        is_left = pc.and_(pc.is_in(batch.column("id"), wanted), batch.column("policy").is_null())
        rows = np.flatnonzero(is_left)
        mine = batch.take(pa.array(rows))
        ids = mine.column("id").to_pylist()
        contents = hex_texts(mine.column("key_content")).to_pylist() if ids else []
        same = [
            i for i, (id, key) in enumerate(zip(ids, contents, strict=True)) if withdrawn[id] == key
        ]
        reasons = [f"{ids[i]} was withdrawn" for i in same]
        found.append(_verdicts(rows[same] + start, ["withdrawn"] * len(same), reasons))
    return join_verdicts(found)


def _repetitions(
    staging: Staging, earlier: Earlier, batch: str, barred: pa.Table, rules: RepeatRules
) -> tuple[pa.Table, list[Note], Mask]:
    """Find rows that were met before, literally or folded, and their contradictions."""
    found, notes = [_verdicts([], [], [])], []
    repeats_prompt = np.zeros(staging.num_rows, bool)
    for part in _parts(staging):
        near = _index(staging, "key_near", part, barred["row"].to_numpy())
        prompts = _index(staging, "key_prompt", part)
        met = _Met(("id", "key_near", "key_exact", "key_swapped"))
        met_prompts = _Met(("key_prompt",))
        for name, rows in earlier.scan([*met.names, *met_prompts.names]):
            met.add(name, rows, near.meet(first_words(rows.column("key_near"))))
            met_prompts.add(name, rows, prompts.meet(first_words(rows.column("key_prompt"))))
        repeats_prompt[_with_prompt(staging, prompts.met(), met_prompts.table())] = True
        contested = near.met(or_twice=True)
        if contested.size:
            verdicts, more = _repeating(staging, contested, met.table(), batch, rules)
            found.append(verdicts)
            notes += more
    return join_verdicts(found), notes, repeats_prompt


def _with_prompt(staging: Staging, rows: Rows, earlier: pa.Table) -> Rows:
    import pyarrow.compute as pc

    mine = _hex(staging.take(["key_prompt"], rows)["key_prompt"])
    return rows[pc.is_in(mine, earlier["key_prompt"].combine_chunks()).to_numpy()]


def _repeating(
    staging: Staging, rows: Rows, earlier: pa.Table, batch: str, rules: RepeatRules
) -> tuple[pa.Table, list[Note]]:
    """Judge rows that share a near key with another.

    Of the rows with one verdict the first stays, and the others repeat it. The first row with the
    opposite verdict contradicts; when it is dropped, so are all that repeat it.
    """
    import pyarrow as pa

    mine = staging.take(["id", "key_near", "key_exact", "key_swapped"], rows)
    near = _codes(earlier["key_near"], _hex(mine["key_near"]))
    exact = _codes(earlier["key_exact"], _hex(mine["key_exact"]))
    near = _without_folding(staging, rows, near, exact)
    swapped = pa.concat_arrays(
        [*earlier["key_swapped"].chunks, *mine["key_swapped"].chunks]
    ).to_numpy(zero_copy_only=False)
    first, same, twin = (_first_of(codes) for codes in (near, 2 * near + swapped, exact))
    number, places = earlier.num_rows, np.arange(len(near))
    keeps_both = rules.contradictions is not Contradictions.drop
    keeps_near = rules.near_duplicates is NearDuplicates.keep
    stays = (same < number) | (same == first) | keeps_both
    opposes = (first < places) & (~stays | (same == places))
    is_twin = (twin < places) & ((twin < number) | (twin == same) | keeps_near)
    seen = np.where(opposes, first, np.where(is_twin, twin, same))
    left_out = np.flatnonzero((places >= number) & (seen < places))
    ids = [*earlier["id"].to_pylist(), *mine["id"].to_pylist()]
    batches = [*earlier["batch"].to_pylist(), *[batch] * mine.num_rows]
    twins, notes = [], []
    for place in left_out.tolist():
        at, row = int(seen[place]), int(rows[place - number])
        if is_twin[place] and not opposes[place]:
            where = "of_earlier" if at < number else "in_file"
            twins.append((row, f"duplicate_{where}", f"repeats {ids[at]} of {batches[at]}"))
            continue
        rule = rules.contradictions if opposes[place] else rules.near_duplicates
        fate, is_opposite = rule.name, bool(opposes[place])
        notes.append(Note(row, is_opposite, FOLDED, 1.0, batches[at], ids[at], at >= number, fate))
    exact_verdicts = _verdicts(*zip(*twins, strict=True)) if twins else _verdicts([], [], [])
    return join_verdicts([exact_verdicts, note_verdicts(notes)]), notes


def _without_folding(staging: Staging, rows: Rows, near: Any, exact: Any) -> Any:
    """Let rows whose own responses are alike be equal only where their texts are, case included.

    Rows with one near key have the same words, so all of them are alike or none is.
    """
    if not staging.has("chosen"):
        return near
    sides = staging.take(["chosen", "rejected"], rows)
    own = own_similarity(*(sides[name].combine_chunks() for name in ("chosen", "rejected")))
    is_alike = np.zeros(int(near.max()) + 1, bool)
    is_alike[near[len(near) - len(rows) :][own >= ALIKE]] = True
    return np.where(is_alike[near], exact + len(near), near)


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
    _, first, code = np.unique(codes, return_index=True, return_inverse=True)
    return first[code]
