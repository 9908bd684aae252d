"""Policies: which rows are excluded, under which name, and that every row is counted once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rlhf.config import Ingest
from rlhf.data.accept import Judged, Rules, staged_block
from rlhf.data.files import Lines
from rlhf.data.keys import Record, keys_of
from rlhf.data.ledger import silent
from rlhf.data.parse import Defaults
from rlhf.data.records import Comparison, Kind, Prompt
from rlhf.data.repeats import find_verdicts
from rlhf.data.similar import RepeatRules
from rlhf.data.staging import Staging


def pair(id: str, chosen: str = "yes", rejected: str = "no", **more: Any) -> Comparison:
    prompt = [{"role": "user", "content": more.pop("question", "Is it?")}]
    fields = {"strength": "better", "axis": "helpfulness", "source": "s", **more}
    return Comparison(id=id, prompt=prompt, chosen=chosen, rejected=rejected, **fields)  # type: ignore[arg-type]


class Before:
    """Rows of an earlier batch named `old`, as the store yields them."""

    def __init__(self, *records: Record) -> None:
        self.rows = [
            {
                "id": record.id,
                **{f"key_{name}": getattr(keys, name) for name in keys.__slots__},
            }
            for record, keys in ((record, keys_of(record)) for record in records)
        ]

    def withdrawn_rows(self) -> dict[str, str]:
        return {}

    def scan(self, names: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
        for row in self.rows:
            yield "old", pa.RecordBatch.from_pylist([{name: row[name] for name in names}])


class Sifted:
    """What became of rows."""

    repeats = RepeatRules.of(Ingest())

    def __init__(self, records: Sequence[Record], history: Before, max_chars: int) -> None:
        kind = Kind.prompts if isinstance(records[0], Prompt) else Kind.batch
        data = "\n".join(json.dumps(record.to_json()) for record in records).encode()
        defaults = Defaults(source="new", axis=None, is_safety=False)
        rules = Rules(0.25, "s", max_chars)
        with Staging(Path()) as staging:
            table, refused, _ = staged_block(Lines(1, data, 0), kind, defaults, rules)
            staging.add(table, refused)
            staging.finish()
            verdicts = find_verdicts(staging, history, batch="new", rules=self.repeats)
            judged = Judged(staging, kind, verdicts)
            tables = list(judged.accepted(silent))
            self.accepted = pa.concat_tables(tables).to_pylist()
            self.refused = list(judged.refused())
            self.excluded = list(judged.excluded())
            self.counts = judged.counts


def run(*records: Record, history: Before | None = None, max_chars: int = 100) -> Sifted:
    return Sifted(records, history or Before(), max_chars)


def policies(sifted: Sifted) -> list[str]:
    return [row["policy"] for row in sifted.excluded]


@pytest.mark.parametrize(
    ("second", "policy", "reason"),
    [
        (pair("b"), "duplicate_in_file", "repeats a of new"),
        (pair("b", "YES!", "no."), "near_duplicate_in_file", "repeats a of new"),
        (pair("b", question="is it"), "near_duplicate_in_file", "repeats a of new"),
        (pair("b", "no", "yes"), "contradicting", "contradicts a of new"),
        (pair("b", "No.", "Yes."), "contradicting", "contradicts a of new"),
        (pair("b", "same ", "same"), "identical_responses", "chosen equals rejected"),
        (pair("b", " "), "empty_text", "chosen has no text"),
        (pair("b", question=""), "empty_text", "turn 1 has no text"),
        (pair("b", "x" * 95), "over_long", "101 characters, more than max_chars=100"),
        (
            pair("b", "other", axis="safety", chosen_safe=False, rejected_safe=True),
            "unsafe_chosen",
            "chosen is unsafe and rejected is safe",
        ),
    ],
)
def test_each_policy(second: Comparison, policy: str, reason: str) -> None:
    sifted = run(pair("a"), second)
    assert [row["id"] for row in sifted.accepted] == ["a"]
    assert sifted.excluded == [{"line": 2, "id": "b", "policy": policy, "reason": reason}]
    assert sifted.refused == []


@pytest.mark.parametrize(
    "second",
    [
        pair("b", axis="safety"),
        pair("b", "yes", "never"),
        pair("b", question="Was it?"),
        pair("b", "x" * 94),
        pair("b", "o", axis="safety", chosen_safe=False, rejected_safe=False),
        pair("b", "o", axis="safety", chosen_safe=None, rejected_safe=True),
        pair("b", "o", axis="helpfulness", chosen_safe=False, rejected_safe=True),
    ],
)
def test_rows_that_no_policy_excludes(second: Comparison) -> None:
    assert len(run(pair("a"), second).accepted) == 2


def test_policies_over_batches() -> None:
    history = Before(pair("a"), pair("c", "left", "right"))
    sifted = run(
        pair("b"),
        pair("d", "Yes", "No"),
        pair("e", "right", "left"),
        pair("f", "new", "newer"),
        pair("g", "new", "newest", question="Other?"),
        history=history,
    )
    assert policies(sifted) == [
        "duplicate_of_earlier",
        "near_duplicate_of_earlier",
        "contradicting",
    ]
    assert sifted.excluded[2]["reason"] == "contradicts c of old"
    assert [(row["id"], row["repeat_prompt"]) for row in sifted.accepted] == [
        ("f", True),
        ("g", False),
    ]


def test_a_prompt_repeated_within_the_file_is_no_repeat() -> None:
    sifted = run(pair("a"), pair("b", "x", "y"))
    assert [row["repeat_prompt"] for row in sifted.accepted] == [False] * 2


def test_an_id_stands_for_one_row() -> None:
    sifted = run(
        pair("a"), pair("a", "other"), pair("a"), pair("z", "q"), history=Before(pair("z"))
    )
    assert [(row["line"], row["reason"]) for row in sifted.refused] == [
        (2, "id='a' has other content on line 1"),
        (4, "id='z' has other content in old"),
    ]
    assert policies(sifted) == ["duplicate_of_earlier", "duplicate_of_earlier"]


def test_a_changed_grade_under_an_old_id_is_noticed() -> None:
    sifted = run(pair("a"), pair("a", strength="slightly_better"))
    assert [row["line"] for row in sifted.refused] == [2]


def test_an_excluded_row_is_no_original() -> None:
    """The second row repeats only one that was thrown out, so it stays."""
    bad = pair("a", "one", "two", axis="safety", chosen_safe=False, rejected_safe=True)
    good = pair("b", "one", "two", axis="safety")
    assert [row["id"] for row in run(bad, good).accepted] == ["b"]


def test_prompts_repeat_by_their_whole_text() -> None:
    def prompt(id: str, *turns: str) -> Prompt:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        return Prompt(id=id, prompt=messages, is_safety=False, source="s")  # type: ignore[arg-type]

    sifted = run(prompt("a", "Hi"), prompt("b", "Hi", "Yes?", "Go on"), prompt("c", "hi!"))
    assert [row["id"] for row in sifted.accepted] == ["a", "b"]
    assert policies(sifted) == ["near_duplicate_in_file"]
    counts = sifted.counts
    assert "contradicting" not in counts
    assert "ties" not in counts


def test_counts_add_up() -> None:
    sifted = run(
        pair("a", tie=True),
        pair("b"),
        pair("a", "other"),
        pair("c", strength=None, question="Who?"),
        pair("d", ""),
    )
    counts = sifted.counts
    named = {name: n for name, n in counts.items() if n and name != "heldout"}
    assert named == {
        "read": 5,
        "accepted": 2,
        "refused": 1,
        "excluded": 2,
        "empty_text": 1,
        "duplicate_in_file": 1,
        "ties": 1,
        "ungraded": 1,
    }
