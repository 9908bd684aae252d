"""Policies: which rows are excluded, under which name, and that every row is counted once."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.data.keys import keys_of
from rlhf.data.ledger import History, Seen
from rlhf.data.records import Comparison, Prompt
from rlhf.data.sift import Sifted, count_rows, sift


def pair(id: str, chosen: str = "yes", rejected: str = "no", **more: Any) -> Comparison:
    prompt = [{"role": "user", "content": more.pop("question", "Is it?")}]
    fields = {"strength": "better", "axis": "helpfulness", "source": "s", **more}
    return Comparison(id=id, prompt=prompt, chosen=chosen, rejected=rejected, **fields)  # type: ignore[arg-type]


def run(*records: Any, history: History | None = None, max_chars: int = 100) -> Sifted:
    return sift(
        list(enumerate(records, start=1)),
        batch="new",
        history=history or History(position=0),
        share=0.25,
        salt="s",
        max_chars=max_chars,
    )


def history_of(*records: Any) -> History:
    history = History(position=1)
    for record in records:
        keys = keys_of(record)
        seen = Seen("old", record.id, keys.swapped)
        history.exact[keys.exact] = history.near[keys.near] = seen
        history.contents[record.id] = ("old", keys.content)
        history.prompts.add(keys.prompt)
    return history


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
    assert [record.id for record, _ in sifted.accepted] == ["a"]
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
    history = history_of(pair("a"), pair("c", "left", "right"))
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
    assert [(r.id, r.repeat_prompt) for r, _ in sifted.accepted if isinstance(r, Comparison)] == [
        ("f", True),
        ("g", False),
    ]


def test_a_prompt_repeated_within_the_file_is_no_repeat() -> None:
    sifted = run(pair("a"), pair("b", "x", "y"))
    assert [r.repeat_prompt for r, _ in sifted.accepted if isinstance(r, Comparison)] == [False] * 2


def test_an_id_stands_for_one_row() -> None:
    sifted = run(
        pair("a"), pair("a", "other"), pair("a"), pair("z", "q"), history=history_of(pair("z"))
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
    assert [record.id for record, _ in run(bad, good).accepted] == ["b"]


def test_prompts_repeat_by_their_whole_text() -> None:
    def prompt(id: str, *turns: str) -> Prompt:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        return Prompt(id=id, prompt=messages, is_safety=False, source="s")  # type: ignore[arg-type]

    sifted = run(prompt("a", "Hi"), prompt("b", "Hi", "Yes?", "Go on"), prompt("c", "hi!"))
    assert [record.id for record, _ in sifted.accepted] == ["a", "b"]
    assert policies(sifted) == ["near_duplicate_in_file"]
    counts = count_rows(sifted, num_read=3, comparisons=False)
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
    counts = count_rows(sifted, num_read=5, comparisons=True)
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
