"""The profile of a batch: what drift is told from, small, mergeable, made in one pass over rows.

A profile is JSON (`profile.json` beside rows.parquet). Every measure holds counts by category and,
for tests that know that rows of one prompt belong together, the products sum_c y_c y_c' of the
counts y_c per prompt c. Memory is some 30 bytes a row beside a chunk of a thousand rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf.algo.twosample import ClusterSums, category_sums, category_sums_of, vector_sums
from rlhf.artifacts import read_json, write_text
from rlhf.data.records import AXES, STRENGTHS
from rlhf.data.vocabulary import DIMENSIONS, MAX_ROWS, Vocabulary, merged_counts

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "profile.json"
ROWS = "rows.parquet"
FORMAT = 1
"""Raised when a profile's content changes; a file of another format is computed anew."""

Profile = dict[str, Any]
Integers = NDArray[np.int64]

CHUNK_ROWS = 1024
READ_BYTES = 1 << 20
MAX_NAMED = 32
"""Sources that are counted by name; the rarer ones are counted together as OTHERS."""
MAX_ANNOTATORS = 1000
OTHERS = "(others)"
UNGRADED = "ungraded"
MAX_TURNS = 9
"""User turns are counted up to here; the last count is of this many or more."""
BINS_PER_OCTAVE = 4
NUM_BINS = 20 * BINS_PER_OCTAVE
"""Length bins: bin i begins at 2^(i/4) characters."""
HASH_DIGITS = 16
SAFETY = ("safe", "unsafe", "unknown")
LONGER = ("chosen", "rejected", "equal")

NAMES: Mapping[str, tuple[Any, ...]] = {
    "strength": (*STRENGTHS, UNGRADED),
    "axis": AXES,
    "safety_bins": tuple(f"{chosen}/{rejected}" for chosen in SAFETY for rejected in SAFETY),
    "ties": ("tie", "no tie"),
    "longer": LONGER,
    "new_prompts": ("new", "repeated"),
    "turns": tuple(range(1, MAX_TURNS + 1)),
    "prompt_length": tuple(range(NUM_BINS)),
    "response_length": tuple(range(NUM_BINS)),
}
"""Categories of the measures whose categories are known beforehand, in their order."""

COLUMNS = (
    *("prompt", "chosen", "rejected", "strength", "axis", "source", "annotator"),
    *("chosen_safe", "rejected_safe", "tie", "repeat_prompt", "key_exact", "key_prompt"),
)


def write_profile(folder: Path, *, batch: str, is_first: bool) -> None:
    """Compute the profile of the rows in a batch's folder and write it beside them."""
    profile = profile_rows(folder / ROWS, batch=batch, is_first=is_first)
    write_text(folder / FILE, json.dumps(profile, ensure_ascii=False) + "\n")


def read_profile(folder: Path, *, batch: str, is_first: bool) -> Profile:
    """Read a batch's profile; a batch without one, or with an older one, is read row by row."""
    if (folder / FILE).exists():
        found: Profile = read_json(folder / FILE)
        if found["format"] == FORMAT:
            return found
    return profile_rows(folder / ROWS, batch=batch, is_first=is_first)


def profile_rows(path: Path, *, batch: str, is_first: bool) -> Profile:
    """Compute the profile of comparisons in a Parquet file of the store.

    `is_first`: no batch came before, so that nothing can be said about prompts that come back.
    """
    import pyarrow.parquet as pq

    # Buffered reading streams pages; otherwise a row group's columns would be held whole.
    with pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
        chunks = file.iter_batches(CHUNK_ROWS, columns=list(COLUMNS), use_threads=False)
        num_rows = file.metadata.num_rows
        return profile_chunks(chunks, num_rows=num_rows, batch=batch, is_first=is_first)


def profile_chunks(
    chunks: Iterable[pa.RecordBatch], *, num_rows: int, batch: str, is_first: bool
) -> Profile:
    """Compute the profile of comparisons that come in chunks with at least COLUMNS."""
    scan = _Scan(num_rows)
    for chunk in chunks:
        scan.add(chunk)
    return scan.profile(batch, is_first=is_first)


@dataclass(frozen=True, slots=True)
class Measure:
    """Counts and cluster sums of one measure; `names` are its categories."""

    names: tuple[Any, ...]
    sums: ClusterSums

    def to_json(self) -> dict[str, Any]:
        """Return the measure without the categories that do not occur; products row by row from
        the diagonal on."""
        kept = np.flatnonzero(self.sums.sums)
        products = self.sums.products[np.ix_(kept, kept)].astype(np.int64)
        return {
            "names": [self.names[i] for i in kept],
            "counts": self.sums.sums[kept].astype(np.int64).tolist(),
            "clusters": int(self.sums.clusters),
            "products": [products[i, i:].tolist() for i in range(len(kept))],
        }


def merged_measure(
    parts: Sequence[Mapping[str, Any]], names: Sequence[Any] | None = None
) -> Measure:
    """Add up a measure over profiles; a prompt in several of them counts as several clusters.

    `names` None takes the categories that occur.
    """
    if names is None:
        names = sorted({name for part in parts for name in part["names"]})
    place = {name: i for i, name in enumerate(names)}
    counts, products = np.zeros(len(names)), np.zeros((len(names), len(names)))
    for part in parts:
        at = np.array([place[name] for name in part["names"]], dtype=np.int64)
        counts[at] += part["counts"]
        products[np.ix_(at, at)] += _square(part["products"])
    clusters = sum(part["clusters"] for part in parts)
    return Measure(tuple(names), category_sums_of(counts, products, clusters=clusters))


@dataclass(frozen=True, slots=True)
class Words:
    """Cluster sums of the vectors of `vocabulary`, and in how many comparisons words occur."""

    sums: ClusterSums
    counts: Mapping[str, int]


def merged_words(parts: Sequence[Mapping[str, Any]]) -> Words:
    """Add up the vocabularies of profiles."""
    rows, clusters, squares = (
        float(sum(part[name] for part in parts)) for name in ("rows", "clusters", "squares")
    )
    sums = ClusterSums(
        rows,
        clusters,
        squares,
        np.sum([part["sums"] for part in parts], axis=0),
        np.sum([part["cross"] for part in parts], axis=0),
        np.sum([_square(part["products"]) for part in parts], axis=0),
    )
    return Words(sums, merged_counts([part["words"] for part in parts]))


def num_distinct_prompts(profiles: Sequence[Profile]) -> int:
    """Return how many prompts there are in several batches of a stream, in ingest order."""
    first, *later = (profile["prompts"] for profile in profiles)
    known = first["distinct"] + sum(part["new"] for part in later)
    return int(max(known, *(part["distinct"] for part in (first, *later))))


class _Scan:
    """Codes of every row, filled chunk by chunk."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.prompts = np.empty(num_rows, dtype=np.uint64)
        self.codes = {
            name: np.empty(num_rows, dtype=np.int8)
            for name in (*NAMES, *LONGER[:2])
            if name != "response_length"
        }
        self.sources = np.empty(num_rows, dtype=np.int32)
        self.source_names: dict[str, int] = {}
        self.annotators: Counter[str] = Counter()
        self.vocabulary = Vocabulary()
        self.sampled: list[NDArray[np.uint64]] = []
        self.position = 0

    def add(self, chunk: pa.RecordBatch) -> None:
        """Fill in the codes of the next rows."""
        here = slice(self.position, self.position + chunk.num_rows)
        self.position += chunk.num_rows
        self.prompts[here] = hash_numbers(chunk.column("key_prompt"))
        for name, values in _codes(chunk).items():
            self.codes[name][here] = values
        self.sources[here] = self._source_codes(chunk.column("source"))
        for row in chunk.column("annotator").drop_null().value_counts().to_pylist():
            self.annotators[row["values"]] += row["counts"]
        share = min(1.0, MAX_ROWS / self.num_rows)
        hashes = hash_numbers(chunk.column("key_exact"))
        kept = np.flatnonzero(hashes <= np.uint64(min(int(share * 2**64), 2**64 - 1)))
        for texts in _texts(chunk.take(kept)):
            self.vocabulary.add(texts)
        self.sampled.append(self.prompts[here][kept])

    def profile(self, batch: str, *, is_first: bool) -> Profile:
        """Return the profile of all rows that were added."""
        self._sort()
        starts = np.concatenate([[True], self.prompts[1:] != self.prompts[:-1]])
        clusters = np.cumsum(starts, dtype=np.int32) - 1
        rated = (self.codes["axis"] == AXES.index("safety")) | (
            self.codes["safety_bins"] != len(NAMES["safety_bins"]) - 1
        )
        measures = {
            name: _measure(NAMES[name], self.codes[name], clusters)
            for name in ("strength", "axis", "ties", "turns", "prompt_length", "new_prompts")
            if not (is_first and name == "new_prompts")
        }
        for name, counted in (("safety_bins", rated), ("longer", self.codes["ties"] == 1)):
            measures[name] = _measure(NAMES[name], self.codes[name][counted], clusters[counted])
        measures["source"] = _measure(*self._named_sources(), clusters)
        responses = np.stack([self.codes[side] for side in LONGER[:2]], axis=1).ravel()
        measures["response_length"] = _measure(
            NAMES["response_length"], responses, np.repeat(clusters, 2)
        )
        num_prompts = int(clusters[-1]) + 1
        is_new = np.bincount(clusters[self.codes["new_prompts"] == 0], minlength=num_prompts) > 0
        return {
            "format": FORMAT,
            "batch": batch,
            "rows": self.num_rows,
            "prompts": {"distinct": num_prompts, "new": int(is_new.sum())},
            "measures": {name: measure.to_json() for name, measure in sorted(measures.items())},
            "annotators": dict(self.annotators.most_common(MAX_ANNOTATORS)),
            "vocabulary": self._words(),
        }

    def _sort(self) -> None:
        """Bring the rows of each prompt together."""
        order = np.argsort(self.prompts).astype(np.int32)
        self.prompts = self.prompts[order]
        self.sources = self.sources[order]
        for name, values in self.codes.items():
            self.codes[name] = values[order]

    def _source_codes(self, column: pa.Array) -> Integers:
        encoded = column.dictionary_encode()
        known = self.source_names
        table = [known.setdefault(name, len(known)) for name in encoded.dictionary.to_pylist()]
        return np.array(table)[encoded.indices.to_numpy()]

    def _named_sources(self) -> tuple[tuple[str, ...], NDArray[Any]]:
        """Return the most frequent sources, the rest under one name, and each row's code."""
        names = list(self.source_names)
        counts = np.bincount(self.sources, minlength=len(names))
        ranked = sorted(range(len(names)), key=lambda i: (-counts[i], names[i]))
        kept = ranked[:MAX_NAMED]
        table = np.full(len(names), len(kept), dtype=np.int8)
        table[kept] = np.arange(len(kept))
        return (*(names[i] for i in kept), OTHERS), table[self.sources]

    def _words(self) -> dict[str, Any]:
        vectors = np.array(self.vocabulary.vectors).reshape(-1, DIMENSIONS)
        labels = np.concatenate(self.sampled).view(np.int64)
        sums = vector_sums(vectors, labels)
        return {
            "rows": int(sums.rows),
            "clusters": int(sums.clusters),
            "squares": int(sums.squares),
            "sums": _rounded(sums.sums),
            "cross": _rounded(sums.cross),
            "products": [_rounded(row[i:]) for i, row in enumerate(sums.products)],
            "words": self.vocabulary.top(),
        }


def _measure(names: Sequence[Any], codes: NDArray[Any], clusters: NDArray[Any]) -> Measure:
    sums = category_sums(codes, clusters, num_categories=len(names))
    return Measure(tuple(names), sums)


def _codes(chunk: pa.RecordBatch) -> dict[str, NDArray[Any]]:
    """Return the category of every row in each measure, as positions in NAMES."""
    import pyarrow.compute as pc

    prompt_chars, turns = _prompt_sizes(chunk.column("prompt"))
    chosen, rejected = (pc.utf8_length(chunk.column(name)).to_numpy() for name in LONGER[:2])
    safe = [_flags(chunk.column(name)) for name in ("chosen_safe", "rejected_safe")]
    return {
        "strength": _positions(chunk.column("strength"), STRENGTHS),
        "axis": _positions(chunk.column("axis"), AXES),
        "safety_bins": len(SAFETY) * safe[0] + safe[1],
        "ties": 1 - chunk.column("tie").cast("int8").to_numpy(),
        "longer": np.select([chosen > rejected, chosen < rejected], [0, 1], 2),
        "new_prompts": chunk.column("repeat_prompt").cast("int8").to_numpy(),
        "turns": np.clip(turns, 1, MAX_TURNS) - 1,
        "prompt_length": length_bins(prompt_chars),
        "chosen": length_bins(chosen),
        "rejected": length_bins(rejected),
    }


def _positions(column: pa.Array, names: Sequence[str]) -> Integers:
    """Return each value's position in `names`; null comes after the last."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found: Integers = pc.index_in(column, pa.array(names)).fill_null(len(names)).to_numpy()
    return found


def _flags(column: pa.Array) -> Integers:
    """Return 0 for safe (true), 1 for unsafe and 2 for unknown."""
    found: Integers = (1 - column.cast("int8").fill_null(-1).to_numpy()).astype(np.int64)
    return found


def _prompt_sizes(prompts: pa.ListArray) -> tuple[Integers, Integers]:
    """Return characters and user turns of every prompt."""
    import pyarrow.compute as pc

    messages = prompts.flatten()
    chars = pc.utf8_length(messages.field("content")).to_numpy()
    users = pc.equal(messages.field("role"), "user").cast("int64").to_numpy()
    ends = np.cumsum(prompts.value_lengths().to_numpy())
    sums = [np.concatenate([[0], np.cumsum(values)])[ends] for values in (chars, users)]
    return np.diff(sums[0], prepend=0), np.diff(sums[1], prepend=0)


def length_bins(chars: NDArray[Any]) -> Integers:
    """Return the bin of every length in characters."""
    bins = np.floor(BINS_PER_OCTAVE * np.log2(np.maximum(chars, 1)))
    return np.clip(bins, 0, NUM_BINS - 1).astype(np.int64)


def hash_numbers(column: pa.Array) -> NDArray[np.uint64]:
    """Return the first 64 bits of hexadecimal hashes [N]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    begun = pc.utf8_slice_codeunits(column, 0, HASH_DIGITS)
    text = pa.concat_arrays([begun]).buffers()[2]
    digits = np.frombuffer(text, dtype=np.uint8, count=HASH_DIGITS * len(column))
    # 0-9 are 48 to 57 and a-f are 97 to 102 in ASCII.
    nibbles = np.where(digits < 97, digits - 48, digits - 87).reshape(-1, HASH_DIGITS)
    packed = nibbles[:, ::2] << 4 | nibbles[:, 1::2]
    return np.ascontiguousarray(packed).view(">u8")[:, 0].astype(np.uint64)


def _texts(rows: pa.RecordBatch) -> Iterator[list[str]]:
    for row in rows.select(["prompt", "chosen", "rejected"]).to_pylist():
        yield [*(turn["content"] for turn in row["prompt"]), row["chosen"], row["rejected"]]


def _square(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Return a symmetric matrix from its rows from the diagonal on."""
    full = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        full[i, i:] = row
        full[i:, i] = row
    return full


def _rounded(values: NDArray[np.float64]) -> list[float]:
    """Round to seven digits, so that sums in another order give the same file."""
    return [float(f"{value:.7g}") for value in values]
