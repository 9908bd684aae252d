"""One row to one record: every accepted format, and every wrong field by name."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.data.files import RowError
from rlhf.data.parse import Defaults, infer_kind, parse_row, unknown_fields
from rlhf.data.records import Comparison, Conversation, Kind, Prompt
from rlhf.errors import DataError

DEFAULTS = Defaults(source="week", axis="helpfulness", is_safety=False)
USER = {"role": "user", "content": "Why is the sky blue?"}
GOOD = {"role": "assistant", "content": "Rayleigh scattering."}
BAD = {"role": "assistant", "content": "Because."}
OURS: dict[str, Any] = {
    "id": "x1",
    "prompt": [USER],
    "chosen": "Rayleigh scattering.",
    "rejected": "Because.",
    "strength": "better",
    "axis": "safety",
    "chosen_safe": True,
    "rejected_safe": None,
    "source": "vendor",
    "annotator": "a7",
    "model_chosen": "v1",
    "model_rejected": "v0",
    "meta": {"tie": True, "votes": [1, 2]},
}


def parse(row: dict[str, Any], kind: Kind = Kind.batch, **changes: Any) -> Any:
    defaults = Defaults(**{**{n: getattr(DEFAULTS, n) for n in DEFAULTS.__slots__}, **changes})
    return parse_row(kind, row, line=17, defaults=defaults)


def without(name: str, row: dict[str, Any] = OURS) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def test_our_own_fields() -> None:
    assert parse(OURS) == Comparison(
        id="x1",
        prompt=[USER],
        chosen="Rayleigh scattering.",
        rejected="Because.",
        strength="better",
        axis="safety",
        source="vendor",
        chosen_safe=True,
        rejected_safe=None,
        annotator="a7",
        model_chosen="v1",
        model_rejected="v0",
        tie=True,
        meta={"tie": True, "votes": [1, 2]},
    )


@pytest.mark.parametrize(
    ("tie", "meta_tie", "expected"),
    [(None, None, False), (True, None, True), (False, True, True), (False, False, False)],
)
def test_tie_from_the_row_or_its_meta(tie: Any, meta_tie: Any, expected: bool) -> None:
    assert parse({**OURS, "tie": tie, "meta": {"tie": meta_tie}}).tie is expected


def test_defaults_fill_what_a_row_does_not_say() -> None:
    row = parse({"prompt": [USER], "chosen": "a", "rejected": "b"})
    assert (row.id, row.source, row.axis, row.strength) == ("week/17", "week", "helpfulness", None)
    assert (row.tie, row.meta) == (False, {})
    assert parse({"prompt": [USER], "chosen": "a", "rejected": "b", "id": 5}).id == "5"


def test_fields_without_a_meaning_go_to_meta_and_derived_ones_are_ignored() -> None:
    row = {**OURS, "score": 3, "heldout": True, "batch_id": "other", "repeat_prompt": True}
    assert unknown_fields(Kind.batch, row) == ["score"]
    record = parse(row)
    assert record.meta == {"tie": True, "votes": [1, 2], "score": 3}
    assert (record.heldout, record.batch_id, record.repeat_prompt) == (False, "", False)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why is the sky blue?", "chosen": GOOD["content"], "rejected": BAD["content"]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Why is the sky blue?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "chosen": "\n\nHuman: Why is the sky blue?\n\nAssistant: Rayleigh scattering.",
            "rejected": "\n\nHuman: Why is the sky blue?\n\nAssistant: Because.",
        },
    ],
    ids=["trl-standard", "trl-conversational", "trl-whole", "trl-implicit", "hh-rlhf"],
)
def test_foreign_preference_formats(row: dict[str, Any]) -> None:
    record = parse(row)
    assert record.prompt == [USER]
    assert (record.chosen, record.rejected) == ("Rayleigh scattering.", "Because.")
    assert record.strength is None


def test_a_transcript_of_many_turns() -> None:
    head = "\n\nHuman: Hi: there\n\nAssistant: Hello.\n\nTwo paragraphs.\n\nHuman: Bye"
    row = {"chosen": head + "\n\nAssistant: Bye!", "rejected": head + "\n\nAssistant:"}
    record = parse(row)
    assert record.prompt == [
        {"role": "user", "content": "Hi: there"},
        {"role": "assistant", "content": "Hello.\n\nTwo paragraphs."},
        {"role": "user", "content": "Bye"},
    ]
    assert (record.chosen, record.rejected) == ("Bye!", "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"strength": "hugely_better"}, "strength='hugely_better' is not one of significantly_"),
        ({"strength": ""}, "strength='' is not one of"),
        ({"strength": ["better"]}, "strength=['better'] is not one of"),
        ({"axis": "honesty"}, "axis='honesty' is not one of helpfulness, safety"),
        ({"chosen": None}, "chosen is missing"),
        ({"rejected": 3}, "rejected='R"),
        ({"chosen": 3, "rejected": 4}, "chosen=3 is not a list of messages"),
        ({"chosen": "\ud800"}, "holds half a character"),
        ({"prompt": []}, "prompt=[] is not a list of messages"),
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": [USER, GOOD]}, "prompt must end in a user turn"),
        ({"prompt": [{"role": "human", "content": "x"}]}, "prompt[0].role='human' is not one of"),
        ({"prompt": [USER, {"role": "system", "content": "x"}, USER]}, "prompt[1].role='system'"),
        ({"prompt": [{"role": "user"}]}, "needs role and content"),
        ({"prompt": [{"role": "user", "content": 7}]}, "prompt[0].content=7 is not a text"),
        ({"chosen_safe": "yes"}, "chosen_safe='yes' is not true, false or null"),
        ({"rejected_safe": 0}, "rejected_safe=0 is not true, false or null"),
        ({"tie": "no"}, "tie='no' is not true, false or null"),
        ({"meta": {"tie": 1}}, "meta.tie=1 is not true, false or null"),
        ({"meta": [1]}, "meta=[1] is not a JSON object"),
        ({"meta": "{"}, "meta='{' is not a JSON object"),
        ({"id": " "}, "id='' is empty"),
        ({"id": 1.5}, "id=1.5 is not a text"),
        ({"source": 7}, "source=7 is not a text"),
        ({"annotator": 7}, "annotator=7 is not a text"),
        ({"chosen": [USER, GOOD], "rejected": [BAD]}, "differ before their last turn"),
        ({"chosen": [GOOD, USER], "rejected": [GOOD, USER]}, "chosen must end in an assistant"),
        (
            {"prompt": "Other?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "prompt is not the shared beginning",
        ),
    ],
)
def test_wrong_fields_are_named(change: dict[str, Any], reason: str) -> None:
    row = {**OURS, **change}
    if change == {"rejected": 3}:
        reason = "chosen='Rayleigh scattering.' is not a list of messages"
    with pytest.raises(RowError) as caught:
        parse(row)
    assert reason in caught.value.reason
    assert "\n" not in caught.value.reason


def test_an_axis_is_needed_from_somewhere() -> None:
    with pytest.raises(RowError, match=r"axis is missing; add it or give ingest\.axis"):
        parse(without("axis"), axis=None)
    assert parse(without("axis"), axis="safety").axis == "safety"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "plain text", "rejected": "other"}, "prompt is missing"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            "differ before their last turn",
        ),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "must end in an assistant turn"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "x"}, "is not a Human/Assistant"),
    ],
)
def test_transcripts_that_cannot_be_read(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse(row)


def test_demonstrations() -> None:
    expected = Conversation(id="week/17", messages=[USER, GOOD], source="week")
    assert parse({"messages": [USER, GOOD]}, Kind.sft) == expected
    assert parse({"prompt": [USER], "completion": [GOOD]}, Kind.sft) == expected
    text = {"prompt": USER["content"], "completion": GOOD["content"]}
    assert parse(text, Kind.sft) == expected
    for row, reason in (
        ({"messages": [GOOD, USER]}, "must end in an assistant turn"),
        ({"messages": [GOOD]}, "must hold a user turn"),
        ({"text": "x"}, "messages is missing"),
    ):
        with pytest.raises(RowError, match=reason):
            parse(row, Kind.sft)


def test_two_turns_of_one_role_may_follow_each_other() -> None:
    assert parse({"messages": [USER, USER, BAD, GOOD]}, Kind.sft).messages[1] == USER


def test_prompts_and_their_tag() -> None:
    assert parse({"prompt": "Hi", "is_safety": True}, Kind.prompts) == Prompt(
        id="week/17", prompt=[{"role": "user", "content": "Hi"}], is_safety=True, source="week"
    )
    assert parse({"prompt": [USER]}, Kind.prompts).is_safety is False
    assert parse({"prompt": [USER]}, Kind.prompts, is_safety=True).is_safety is True
    assert (
        parse({"prompt": [USER], "is_safety": False}, Kind.prompts, is_safety=True).is_safety
        is False
    )
    for row, reason in (
        ({"prompt": [USER], "is_safety": 1}, "is_safety=1 is not true, false or null"),
        ({"prompt": [USER, GOOD]}, "must end in a user turn"),
        ({"text": "x"}, "prompt is missing"),
    ):
        with pytest.raises(RowError, match=reason):
            parse(row, Kind.prompts)


def test_the_kind_is_inferred_but_open_never() -> None:
    assert infer_kind(OURS, "f") is Kind.batch
    assert infer_kind(without("strength"), "f") is Kind.batch
    assert infer_kind({"messages": [], "id": 1}, "f") is Kind.sft
    assert infer_kind({"prompt": "", "completion": ""}, "f") is Kind.sft
    assert infer_kind({"prompt": ""}, "f") is Kind.prompts
    for row in ({"text": "x"}, {"prompt": "x", "chosen": "y"}, {}):
        with pytest.raises(DataError, match="cannot tell what it holds from the fields"):
            infer_kind(row, "f")
