"""Records as JSON: every field, in order, and back."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest

from rlhf.data.records import Comparison, Conversation, Prompt

USER = {"role": "user", "content": "q"}
RECORDS = [
    Comparison(
        id="a",
        prompt=[USER],  # type: ignore[list-item]
        chosen="x",
        rejected="y",
        strength="better",
        axis="safety",
        source="s",
        meta={"a": [1]},
    ),
    Prompt(id="p", prompt=[USER], is_safety=True, source="s"),  # type: ignore[list-item]
    Conversation(id="c", messages=[USER], source="s"),  # type: ignore[list-item]
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_json_holds_every_field_and_leads_back(record: Comparison | Prompt | Conversation) -> None:
    row = record.to_json()
    assert list(row) == [field.name for field in fields(record)]
    assert row == asdict(record)
    assert type(record)(**row) == record
