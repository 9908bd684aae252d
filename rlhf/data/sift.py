"""Which parsed rows are accepted, which policy excludes the others, and which ids collide.

Every row ends in exactly one of three places, and each is counted: accepted, refused (a fault of
the file) or excluded (a rule of ours, which is never an error).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.data.columns import Mask, is_comparison, turns_name
from rlhf.data.records import Kind
from rlhf.data.tabulate import VISIBLE

if TYPE_CHECKING:
    import pyarrow as pa

POLICIES = {
    "empty_text": "a response or a turn without text",
    "over_long": "longer than max_chars characters, prompt and longer response together; never cut",
    "identical_responses": "chosen equals rejected",
    "unsafe_chosen": "on the safety axis, an unsafe chosen beside a safe rejected response "
    "(paper section 3.2.2)",
    "withdrawn": "its vendor withdrew this very row from an earlier batch or set",
    "duplicate_in_file": "equal texts earlier in this file",
    "duplicate_of_earlier": "equal texts in an earlier batch or set of this kind",
    "near_duplicate_in_file": "earlier in this file but for case, blanks and punctuation",
    "near_duplicate_of_earlier": "in an earlier batch or set but for case, blanks and punctuation",
    "similar_in_file": "earlier in this file but for a few words, see near_threshold",
    "similar_to_earlier": "in an earlier batch or set but for a few words, see near_threshold",
    "contradicting": "the same pair was met before with the opposite verdict, which stays",
}
"""Why rows are excluded, in the order in which the rules are tried."""

COMPARISON_ONLY = (
    "identical_responses",
    "unsafe_chosen",
    "similar_in_file",
    "similar_to_earlier",
    "contradicting",
)


def row_policy(row: Mapping[str, Any], kind: Kind, max_chars: int) -> tuple[str, str] | None:
    """Apply the rules that need nothing but the row, as a dict; None when none excludes it."""
    turns = row[turns_name(kind)]
    texts = {f"turn {i + 1}": message["content"] for i, message in enumerate(turns)}
    num_chars = sum(map(len, texts.values()))
    if is_comparison(kind):
        num_chars += max(len(row["chosen"]), len(row["rejected"]))
        texts |= {"chosen": row["chosen"], "rejected": row["rejected"]}
    empty = [name for name, text in texts.items() if not text.strip()]
    if empty:
        return "empty_text", f"{', '.join(empty)} has no text"
    if num_chars > max_chars:
        return "over_long", f"{num_chars} characters, more than max_chars={max_chars}"
    if not is_comparison(kind):
        return None
    if row["chosen"].strip() == row["rejected"].strip():
        return "identical_responses", "chosen equals rejected"
    if row["axis"] == "safety" and row["chosen_safe"] is False and row["rejected_safe"] is True:
        return "unsafe_chosen", "chosen is unsafe and rejected is safe"
    return None


def row_policies(table: pa.Table, kind: Kind, is_alike: Mask, max_chars: int) -> list[pa.Array]:
    """Return `row_policy` of every row as two columns of texts or nulls: policy and reason.

    `is_alike` marks comparisons whose folded responses are equal.
    """
    import pyarrow as pa

    policies: list[str | None] = [None] * table.num_rows
    reasons: list[str | None] = [None] * table.num_rows
    suspects = np.flatnonzero(_suspects(table, kind, is_alike, max_chars))
    for row, values in zip(suspects, table.take(pa.array(suspects)).to_pylist(), strict=True):
        found = row_policy(values, kind, max_chars)
        if found is not None:
            policies[row], reasons[row] = found
    return [pa.array(policies, pa.string()), pa.array(reasons, pa.string())]


def _suspects(table: pa.Table, kind: Kind, is_alike: Mask, max_chars: int) -> Mask:
    """Mark all rows that a policy could exclude, and some others."""
    import pyarrow.compute as pc

    if not table.num_rows:
        return np.zeros(0, bool)
    turns = table[turns_name(kind)].combine_chunks()
    starts = turns.offsets.to_numpy().astype(np.int64)
    starts -= starts[0]
    contents = turns.flatten().field("content")
    blank = ~pc.match_substring_regex(contents, VISIBLE).to_numpy(zero_copy_only=False)
    found: Mask = np.logical_or.reduceat(blank, starts[:-1])
    num_chars = np.add.reduceat(pc.utf8_length(contents).to_numpy(), starts[:-1])
    if is_comparison(kind):
        responses = [table[name] for name in ("chosen", "rejected")]
        for texts in responses:
            found |= ~pc.match_substring_regex(texts, VISIBLE).to_numpy()
        num_chars = num_chars + np.maximum(*(pc.utf8_length(t).to_numpy() for t in responses))
        unsafe = pc.and_(pc.equal(table["axis"], "safety"), pc.invert(table["chosen_safe"]))
        unsafe = pc.and_(unsafe, table["rejected_safe"]).fill_null(False)
        found |= unsafe.to_numpy() | is_alike
    return found | (num_chars > max_chars)
