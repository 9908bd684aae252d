"""What makes two rows the same: hashes of a row's content, exact and folded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from rlhf.artifacts import digest_json
from rlhf.data.records import Comparison, Conversation, Message, Prompt
from rlhf.data.split import fold_text, prompt_key

Record = Comparison | Prompt | Conversation
"""A row of the store."""

DERIVED = ("batch_id", "heldout", "repeat_prompt")
"""Fields that ingest works out; they are no part of a row's content."""

UNHASHED = (*DERIVED, "source")


@dataclass(frozen=True, slots=True)
class Keys:
    """Hashes of one row."""

    content: str
    """Everything the file said about the row, its id included, but for the source: a file that
    names none gives its own name, and a renamed copy holds the same rows."""
    exact: str
    """The texts: equal for the same comparison, prompt or conversation under any id."""
    near: str
    """The texts without case, blanks and punctuation; a comparison's responses unordered."""
    swapped: bool
    """Which of a comparison's responses comes first in `near`: differs for contradicting pairs."""
    prompt: str
    """The first user turn, see `split.prompt_key`."""


def keys_of(record: Record) -> Keys:
    """Return the hashes of a row."""
    row = record.to_json()
    content = digest_json({name: row[name] for name in row if name not in UNHASHED})
    messages = record.messages if isinstance(record, Conversation) else record.prompt
    folded = [[message["role"], fold_text(message["content"])] for message in messages]
    if not isinstance(record, Comparison):
        exact = _hash(_turns(messages))
        return Keys(content, exact, _hash(folded), False, prompt_key(messages))
    pair = [fold_text(record.chosen), fold_text(record.rejected)]
    return Keys(
        content=content,
        exact=_hash([record.axis, _turns(messages), record.chosen, record.rejected]),
        near=_hash([record.axis, folded, *sorted(pair)]),
        swapped=pair[0] > pair[1],
        prompt=prompt_key(messages),
    )


def _turns(messages: list[Message]) -> list[list[str]]:
    return [[message["role"], message["content"]] for message in messages]


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
