"""Blocks on their way in, and the fates of all rows on their way out: counts, digest, columns."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.artifacts import write_jsonl
from rlhf.data.columns import Mask, hex_texts, is_comparison, key_columns
from rlhf.data.files import Block
from rlhf.data.ledger import KEY_COLUMNS, Progress, row_schema
from rlhf.data.parse import Defaults
from rlhf.data.records import STRENGTHS, Kind
from rlhf.data.repeats import REFUSED, Verdicts, id_words
from rlhf.data.sift import COMPARISON_ONLY, POLICIES, row_policies
from rlhf.data.similar import SKETCH, write_sketches
from rlhf.data.staging import Staging
from rlhf.data.tabulate import refused_row, tabulate

if TYPE_CHECKING:
    import pyarrow as pa


NEAR_DUPLICATES = "near_duplicates.jsonl"
CONTRADICTIONS = "contradictions.jsonl"
"""Rows that repeat or contradict another, with the ids of both and what became of them."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a row's fate depends on beside the row: the held-out split and the longest row."""

    share: float
    salt: str
    max_chars: int


def staged_block(
    block: Block,
    kind: Kind,
    defaults: Defaults,
    rules: Rules,
    *,
    by_row: bool = False,
) -> tuple[pa.Table, list[dict[str, Any]], Counter[str]]:
    """Return a block's rows as they are staged, its refused rows and its fields without a meaning.

    Columns: line, the record's, the keys as binary values, `key_id`, `heldout`, and the policy that
    excludes the row by itself, with its reason.
    """
    import pyarrow as pa

    found = tabulate(block, kind, defaults, by_row=by_row)
    keys = key_columns(found.table, kind)
    policy, reason = row_policies(found.table, kind, keys.is_alike, rules.max_chars)
    table = found.table.drop_columns(["meta_sorted"])
    columns = {name: table[name] for name in table.schema.names}
    columns |= {
        "key_content": keys.content,
        "key_exact": keys.exact,
        "key_near": keys.near,
        "key_swapped": keys.swapped,
        "key_prompt": keys.prompt,
        "key_id": pa.array(id_words(table["id"])),
        "heldout": pa.array(_are_heldout(keys.prompt, rules)),
        "policy": policy,
        "reason": reason,
    }
    return pa.table(columns), found.refused, found.extra_fields


def _are_heldout(keys: pa.Array, rules: Rules) -> Mask:
    """Return `split.key_is_heldout` of every key."""
    import pyarrow as pa

    start = f"{rules.salt}/".encode()
    hashes = [
        hashlib.blake2b(start + key, digest_size=8).digest()
        for key in hex_texts(keys).cast(pa.binary()).to_pylist()
    ]
    limit = math.ceil(rules.share * 2**64)
    numbers = np.frombuffer(b"".join(hashes), ">u8")
    return numbers < np.uint64(limit) if limit < 2**64 else np.ones(len(numbers), bool)


class Judged:
    """The staged rows with their fates; everything is read in the order of the file."""

    def __init__(self, staging: Staging, kind: Kind, verdicts: Verdicts) -> None:
        self._staging = staging
        self._kind = kind
        self._verdicts = verdicts.table
        self._rows = verdicts.table["row"].to_numpy()
        self._repeats_prompt = verdicts.repeats_prompt
        self._notes = verdicts.notes
        self._lowered = np.zeros(staging.num_rows, bool)
        self._lowered[[note.row for note in self._notes if note.fate == "lower"]] = True
        self._collides = np.zeros(staging.num_rows, bool)
        is_refused = np.array(verdicts.table["policy"].to_pylist(), object) == REFUSED
        self._collides[self._rows[is_refused]] = True
        self.num_refused = staging.num_refused + int(is_refused.sum())
        self.accepted_by: dict[str, dict[str, int]] = {}
        self.digest = ""
        self.counts = self._count()

    def refused(self) -> Iterator[dict[str, Any]]:
        """Yield the entries of refused.jsonl."""
        return heapq.merge(self._staging.refused(), self._colliding(), key=lambda row: row["line"])

    def excluded(self) -> Iterator[dict[str, Any]]:
        """Yield the entries of excluded.jsonl."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for start, batch in self._staging.scan(["line", "id", "policy", "reason"]):
            end = start + batch.num_rows
            left_out = ~self._are_accepted(start, batch) & ~self._collides[start:end]
            places = np.flatnonzero(left_out)
            if not places.size:
                continue
            found = np.searchsorted(self._rows, places + start)
            own = batch.take(pa.array(places))
            # A row that a policy excludes by itself is never compared with others.
            index = pa.array(found, mask=own.column("policy").is_valid().to_numpy(False))
            columns = {name: own.column(name) for name in ("line", "id")}
            for name in ("policy", "reason"):
                compared = self._verdicts[name].take(index).combine_chunks()
                columns[name] = pc.coalesce(own.column(name), compared)
            yield from pa.table(columns).to_pylist()

    def accepted(self, progress: Progress) -> Iterator[pa.Table]:
        """Yield the accepted rows as they are stored."""
        import pyarrow as pa

        schema = row_schema(self._kind)
        names = [name for name in schema.names if name != "repeat_prompt"]
        for start, batch in self._staging.scan([*names, "policy"]):
            keep = self._are_accepted(start, batch)
            table = pa.Table.from_batches([batch]).filter(keep).combine_chunks()
            columns = {name: table[name] for name in names}
            for name in KEY_COLUMNS:
                if name != "key_swapped":
                    chunks = [hex_texts(chunk) for chunk in table[name].chunks]
                    columns[name] = pa.chunked_array(chunks, pa.string())
            if "repeat_prompt" in schema.names:
                repeats = self._repeats_prompt[start : start + batch.num_rows][keep]
                columns["repeat_prompt"] = pa.array(repeats)
                lowered = self._lowered[start : start + batch.num_rows][keep]
                columns |= lower_strengths(columns["strength"], columns["meta"], lowered)
            yield pa.table(columns, schema=schema)
            progress("write", start + batch.num_rows, self._staging.num_rows)

    def write_notes(self, folder: Path) -> None:
        """Write what repeats or contradicts another row, whether it is accepted or not."""
        rows = np.array([note.row for note in self._notes], np.int64)
        mine = self._staging.take(["line", "id"], rows).to_pylist() if rows.size else []
        found = [
            (note.swapped, {**own, **note.to_json()})
            for note, own in zip(self._notes, mine, strict=True)
        ]
        write_jsonl(folder / NEAR_DUPLICATES, [row for swapped, row in found if not swapped])
        if is_comparison(self._kind):
            write_jsonl(folder / CONTRADICTIONS, [row for swapped, row in found if swapped])

    def write_sketches(self, folder: Path) -> None:
        """Write the sketches of the accepted rows, if the rows have any."""
        import pyarrow as pa

        if not self._staging.has(SKETCH):
            return
        pieces = self._staging.scan([SKETCH, "policy"])
        tables = (
            pa.Table.from_batches([batch.select([SKETCH])]).filter(self._are_accepted(start, batch))
            for start, batch in pieces
        )
        write_sketches(folder, tables)

    def _colliding(self) -> Iterator[dict[str, Any]]:
        for start, batch in self._staging.scan(["line", "id"]):
            first, last = np.searchsorted(self._rows, [start, start + batch.num_rows])
            for index in range(first, last):
                row = int(self._rows[index])
                if self._collides[row]:
                    line, id = (batch.column(name)[row - start].as_py() for name in ("line", "id"))
                    yield refused_row(line, self._verdicts["reason"][index].as_py(), id)

    def _are_accepted(self, start: int, batch: pa.RecordBatch) -> Mask:
        keep: Mask = batch.column("policy").is_null().to_numpy(zero_copy_only=False).copy()
        first, last = np.searchsorted(self._rows, [start, start + batch.num_rows])
        keep[self._rows[first:last] - start] = False
        return keep

    def _count(self) -> dict[str, int]:
        """Count every fate: read = accepted + refused + excluded, and excluded by policy."""
        comparisons = is_comparison(self._kind)
        policies = Counter(self._verdicts["policy"].to_pylist())
        tally = _Tally(comparisons)
        names = ["policy", "key_content", "source", "heldout"]
        names += ["axis", "strength", "tie"] if comparisons else []
        for start, batch in self._staging.scan(names):
            keep = self._are_accepted(start, batch)
            end = start + batch.num_rows
            lowered = self._lowered[start:end][keep]
            tally.add(batch.filter(keep), self._repeats_prompt[start:end][keep], lowered)
            alone = batch.column("policy").filter(~self._collides[start:end])
            policies.update(alone.drop_null().to_pylist())
        self.digest = tally.digest.hexdigest()
        self.accepted_by = tally.values()
        counts = {
            "read": self._staging.num_rows + self._staging.num_refused,
            "accepted": tally.num_rows,
            "refused": self.num_refused,
            "excluded": sum(policies[name] for name in POLICIES),
        }
        counts |= {
            name: policies[name] for name in POLICIES if comparisons or name not in COMPARISON_ONLY
        }
        fates = {(False, "keep"): "near_duplicates_kept", (True, "keep"): "contradictions_kept"}
        fates |= {(True, "lower"): "contradictions_lowered"}
        stayed = [fates[note.swapped, note.fate] for note in self._notes if note.fate != "drop"]
        return counts | tally.flags | Counter(stayed)


def lower_strengths(strengths: pa.Array, metas: pa.Array, mask: Mask) -> dict[str, pa.Array]:
    """Return strength and meta with the marked comparisons lowered to negligibly_better.

    `meta.strength_before` keeps what the file said; ungraded comparisons have nothing to lower.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    mask = mask & pc.is_valid(strengths).to_numpy(zero_copy_only=False)
    if not mask.any():
        return {"strength": strengths, "meta": metas}
    told = zip(strengths.filter(mask).to_pylist(), metas.filter(mask).to_pylist(), strict=True)
    kept = [json.dumps({**json.loads(meta), "strength_before": before}) for before, meta in told]
    return {
        "strength": pc.if_else(mask, STRENGTHS[-1], strengths),
        "meta": pc.replace_with_mask(metas, mask, pa.array(kept, pa.string())),
    }


class _Tally:
    """Counts and digest of accepted rows."""

    def __init__(self, comparisons: bool) -> None:
        self.num_rows = 0
        self.digest = hashlib.sha256()
        self.flags = {"heldout": 0}
        if comparisons:
            self.flags |= {"repeat_prompt": 0, "ties": 0, "ungraded": 0}
        self._values = {"source": Counter[str]()}
        if comparisons:
            self._values |= {"axis": Counter(), "strength": Counter()}

    def add(self, batch: pa.RecordBatch, repeats: Mask, lowered: Mask) -> None:
        """Take the accepted rows of a piece; the digest is over contents and sources in order."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not batch.num_rows:
            return
        self.num_rows += batch.num_rows
        contents = hex_texts(batch.column("key_content"))
        lines = pc.binary_join_element_wise(contents, batch.column("source"), " ")
        if lowered.any():
            lines = pc.binary_join_element_wise(lines, pc.if_else(lowered, " lowered", ""), "")
            empty = pa.array(["{}"] * batch.num_rows)
            graded = lower_strengths(batch.column("strength"), empty, lowered)
            place = batch.schema.get_field_index("strength")
            batch = batch.set_column(place, "strength", graded["strength"])
        self.digest.update("\n".join([*lines.to_pylist(), ""]).encode())
        self.flags["heldout"] += batch.column("heldout").true_count
        for name, counter in self._values.items():
            values = batch.column(name).fill_null("ungraded")
            for item in pc.value_counts(values).to_pylist():
                counter[item["values"]] += item["counts"]
        if "ties" in self.flags:
            self.flags["repeat_prompt"] += int(repeats.sum())
            self.flags["ties"] += batch.column("tie").true_count
            self.flags["ungraded"] += batch.column("strength").null_count

    def values(self) -> dict[str, dict[str, int]]:
        """Return the counts by source and, for comparisons, by axis and strength."""
        found = {name: dict(sorted(counter.items())) for name, counter in self._values.items()}
        return found if self.num_rows else {"source": {}}
