"""Fuzzy near duplicates among comparisons: MinHash sketches, LSH lookups, exact verification.

Two rows are near duplicates when prompt and both responses, each with its counterpart, have a
Jaccard similarity of word shingles of at least a threshold. MinHash (Broder 1997), made by rensa
(one sketch of `NUM_PERM` bytes a row), proposes pairs; every proposed pair is then checked on its
real shingles, so that the sketch costs recall but never precision. The responses are an unordered
pair: a match says whether the verdicts agree.

What may not be merged although it is similar:
- texts whose numbers or negations differ, in value or in order;
- texts of fewer than `MIN_WORDS` words that differ at all;
- rows whose copies differ by half or more of what tells a row's own responses apart, as in
  minimal-edit pairs: there the small difference is what the row is about. Here case and
  punctuation count, and they count fully where the own responses share `ALIKE` of their words;
- rows with different prompts, unless a response of `MIN_WORDS` words matches: refusals and one-word
  answers are alike under any prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlhf.data.shingles import (
    SHINGLE_WORDS,
    Hashes,
    Indices,
    Shingles,
    guarded_words,
    jaccard,
    mix,
    shingles,
)

if TYPE_CHECKING:
    import pyarrow as pa

Sketches = npt.NDArray[np.uint8]
"""[rows, NUM_PERM]: the lowest byte of each MinHash value."""

NUM_PERM = 64
BANDS = 10
BAND_ROWS = 6
"""A pair is proposed when all values of a band agree: with probability 1 - (1 - J^6)^10, which is
0.9995 at J = 0.9, 0.95 at 0.8 and 0.15 at 0.5."""
SEED = 20240607
PROMPT_TAG = np.uint64(0xA0761D6478BD642F)
"""Keeps the shingles of prompts and responses apart."""
MAX_PARTNERS = 16
"""Rows of one bucket that a row is compared with, from its beginning and again from its end."""
SLACK = 0.15
"""Proposed pairs are dropped unread when their sketches say less than threshold - SLACK: four
standard errors of 64 values at J = 0.9."""
MIN_WORDS = 30
"""Shorter texts must have the same words: there a few words more are another answer."""
ALIKE = 0.5
"""Responses that share half of their shingles may differ in just what folding takes away: case and
punctuation, in tasks that are about these."""
CHUNK_BYTES = 4 * 2**20
"""Text that is cut into shingles at a time; working memory is about 100 times as much."""
CHUNK_PAIRS = 200_000

PARTS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Match:
    """A row and the earlier row that it repeats; `swapped` when their verdicts are opposite.

    `similarity` is the smallest Jaccard similarity of prompt and both responses.
    """

    row: int
    earlier: int
    similarity: float
    swapped: bool


def scheme() -> dict[str, Any]:
    """Return what sketches depend on: only those of one scheme may be compared."""
    import rensa

    version = int(rensa.RMinHash.ALGORITHM_VERSION)
    return {"sketch": "rensa.RMinHash", "version": version, "values": NUM_PERM, "seed": SEED}


def texts_of(table: pa.Table) -> pa.Table:
    """Return axis, prompt, chosen and rejected as columns of text; a prompt is all of its turns."""
    import pyarrow as pa
    import pyarrow.compute as pc

    turns = table.column("prompt").combine_chunks()
    flat = turns.flatten()
    said = pc.binary_join_element_wise(flat.field("role"), flat.field("content"), ": ")
    lengths = pc.fill_null(pc.list_value_length(turns), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    prompt = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), said), "\n")
    names = ("axis", "chosen", "rejected")
    columns = {name: table.column(name).combine_chunks() for name in names}
    return pa.table({"prompt": prompt, **columns})


def sketch(texts: pa.Table) -> Sketches:
    """Return the MinHash sketches of the rows of `texts_of`, in order."""
    import rensa

    found = []
    for chunk in _chunks(texts):
        parts = [shingles(chunk.column(name).combine_chunks()) for name in PARTS]
        hashes, offsets = _by_row(parts)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            hashes, offsets.astype(np.uint64), NUM_PERM, SEED
        )
        count = chunk.num_rows * NUM_PERM
        values = np.fromiter(chain.from_iterable(matrix.to_rows()), dtype=np.uint32, count=count)
        found.append(values.astype(np.uint8).reshape(chunk.num_rows, NUM_PERM))
    return np.concatenate(found) if found else np.zeros((0, NUM_PERM), dtype=np.uint8)


def pairs_within(sketches: Sketches, *, threshold: float) -> Indices:
    """Propose pairs (row, earlier row) [pairs, 2] among the rows of one file."""
    number = len(sketches)
    found = []
    for band in range(BANDS):
        order, first = _runs(_band(sketches, band))
        place = np.arange(number) - first
        head = np.minimum(place, MAX_PARTNERS)
        tail = np.minimum(place - head, MAX_PARTNERS)
        for counts, base in ((head, first), (tail, np.arange(number) - tail)):
            rows = np.repeat(np.arange(number), counts)
            earlier = _expand(base, counts)
            found.append(_likely(sketches, order[rows], sketches, order[earlier], threshold))
    return _distinct(found)


def pairs_against(sketches: Sketches, earlier: Sketches, *, threshold: float) -> Indices:
    """Propose pairs (row, earlier row) [pairs, 2] of a file's rows with rows of the history."""
    found = []
    for band in range(BANDS):
        keys = _band(earlier, band)
        order = np.argsort(keys, kind="stable")
        wanted = _band(sketches, band)
        low = np.searchsorted(keys[order], wanted, side="left")
        high = np.searchsorted(keys[order], wanted, side="right")
        counts = np.minimum(high - low, 2 * MAX_PARTNERS)
        rows = np.repeat(np.arange(len(sketches)), counts)
        partners = order[_expand(low, counts)]
        found.append(_likely(sketches, rows, earlier, partners, threshold))
    return _distinct(found)


def own_similarity(chosen: pa.Array, rejected: pa.Array) -> npt.NDArray[np.float64]:
    """Return how much of their words the two responses of each row share."""
    sides = [shingles(texts) for texts in (chosen, rejected)]
    found = (jaccard(sides[0].unique(row), sides[1].unique(row)) for row in range(len(chosen)))
    return np.fromiter(found, np.float64, len(chosen))


class Verifier:
    """Compares rows by their real shingles; `texts` are rows of `texts_of`, by index."""

    def __init__(self, texts: pa.Table, *, threshold: float) -> None:
        self.threshold = threshold
        self.axes = texts.column("axis").to_pylist()
        self.texts = {name: texts.column(name).to_pylist() for name in PARTS}
        self.shingles = {name: shingles(texts.column(name).combine_chunks()) for name in PARTS}

    def match(self, row: int, other: Verifier, earlier: int) -> Match | None:
        """Return how a row repeats an earlier one, or None when it does not."""
        if self.axes[row] != other.axes[earlier]:
            return None
        prompts = self._same("prompt", row, other, "prompt", earlier)
        if prompts is None:
            return None
        found = []
        for swapped in (False, True):
            sides = ("rejected", "chosen") if swapped else ("chosen", "rejected")
            first = self._same("chosen", row, other, sides[0], earlier)
            second = self._same("rejected", row, other, sides[1], earlier)
            if first is not None and second is not None:
                found.append(Match(row, earlier, min(first, second), swapped))
        found = [match for match in found if self._is_copy(match, other)]
        if not found:
            return None
        (match,) = found
        words = max(int(self.shingles[name].words[row]) for name in PARTS[1:])
        if prompts < 1 and words < MIN_WORDS:
            return None
        return replace(match, similarity=min(prompts, match.similarity))

    def _same(
        self, part: str, row: int, other: Verifier, other_part: str, earlier: int
    ) -> float | None:
        """Return the similarity of two texts, or None when they may not stand for each other."""
        mine, theirs = self.texts[part][row], other.texts[other_part][earlier]
        if mine == theirs:
            return 1.0
        left, right = self.shingles[part], other.shingles[other_part]
        found = jaccard(left.unique(row), right.unique(earlier))
        num_words = min(left.words[row], right.words[earlier])
        if found < 1 and num_words < MIN_WORDS:
            return None
        if found < self.threshold or guarded_words(mine) != guarded_words(theirs):
            return None
        return found

    def _is_copy(self, match: Match, other: Verifier) -> bool:
        """Tell whether the copies differ by less than half of what their responses differ by.

        As distances are a metric, this holds for one way round at most.
        """
        sides = ("rejected", "chosen") if match.swapped else ("chosen", "rejected")
        mine = [_literal(self.texts[name][match.row]) for name in ("chosen", "rejected")]
        theirs = [_literal(other.texts[name][match.earlier]) for name in sides]
        between = max(_distance(mine[0], theirs[0]), _distance(mine[1], theirs[1]))
        own = min(_distance(*mine), _distance(*theirs))
        is_alike = max(self._own(match.row), other._own(match.earlier)) >= ALIKE
        return 2 * between < own and not (is_alike and between > 1 - self.threshold)

    def _own(self, row: int) -> float:
        """Return how much of their words the row's own responses share."""
        chosen, rejected = self.shingles["chosen"], self.shingles["rejected"]
        return jaccard(chosen.unique(row), rejected.unique(row))


def _literal(text: str) -> set[tuple[str, ...]]:
    """Return a text's shingles with case and punctuation, which some comparisons are about."""
    words = text.split()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(len(words) - 2, 1))}


def _distance(left: set[tuple[str, ...]], right: set[tuple[str, ...]]) -> float:
    return 1 - len(left & right) / max(len(left | right), 1)


def _chunks(texts: pa.Table) -> Iterator[pa.Table]:
    """Cut a table so that a chunk holds about CHUNK_BYTES of text, and at least one row."""
    import pyarrow.compute as pc

    sizes = sum(pc.binary_length(texts.column(n)).to_numpy().astype(np.int64) for n in PARTS)
    part = np.cumsum(sizes) // CHUNK_BYTES
    starts = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), texts.num_rows]
    for start, end in pairwise(starts):
        if end > start:
            yield texts.slice(start, end - start)


def _by_row(parts: list[Shingles]) -> tuple[Hashes, Indices]:
    """Lay the shingles of prompt, chosen and rejected of each row beside each other."""
    counts = [np.diff(part.offsets) for part in parts]
    total = np.sum(counts, axis=0)
    offsets = np.concatenate([[0], np.cumsum(total)]).astype(np.int64)
    hashes = np.empty(offsets[-1], dtype=np.uint64)
    base = offsets[:-1].copy()
    for number, part in enumerate(parts):
        values = mix(part.hashes ^ PROMPT_TAG) if number == 0 else part.hashes
        hashes[_expand(base, counts[number])] = values
        base += counts[number]
    return hashes, offsets


def _expand(starts: Indices, counts: Indices) -> Indices:
    """Return starts[i], starts[i] + 1, ... counts[i] times, for all i in turn."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total)


def _band(sketches: Sketches, band: int) -> Hashes:
    """Return the values of one band as one key a row."""
    key = np.zeros(len(sketches), dtype=np.uint64)
    for place in range(band * BAND_ROWS, (band + 1) * BAND_ROWS):
        key = (key << np.uint64(8)) | sketches[:, place]
    return key


def _runs(keys: Hashes) -> tuple[Indices, Indices]:
    """Sort keys; returns the order, and for each sorted place where its run of equals begins."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))
    return order, first


def _likely(
    left: Sketches, rows: Indices, right: Sketches, partners: Indices, threshold: float
) -> Indices:
    """Keep the pairs whose sketches agree often enough."""
    needed = int(np.ceil(NUM_PERM * max(threshold - SLACK, 0.0)))
    kept = []
    for start in range(0, len(rows), CHUNK_PAIRS):
        one, other = rows[start : start + CHUNK_PAIRS], partners[start : start + CHUNK_PAIRS]
        agree = np.count_nonzero(left[one] == right[other], axis=1)
        kept.append(np.stack([one, other], axis=1)[agree >= needed])
    return np.concatenate(kept) if kept else np.zeros((0, 2), dtype=np.int64)


def _distinct(pairs: list[Indices]) -> Indices:
    """Return the pairs of all bands once each, by row and then by earlier row."""
    found: Indices = np.unique(np.concatenate(pairs), axis=0)
    return found
