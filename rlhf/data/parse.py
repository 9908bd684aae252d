"""One row of a file to one record: our own fields, TRL's formats and hh-rlhf transcripts.

Accepted forms of a comparison:
- ours: `prompt` as messages, `chosen` and `rejected` as texts;
- TRL standard: `prompt` as a text;
- TRL conversational: `chosen` and `rejected` as messages, after `prompt` or, with an implicit
  prompt, as whole conversations that differ in the last turn only;
- hh-rlhf: `chosen` and `rejected` as transcripts with `Human:` and `Assistant:` turns.
Demonstrations: `messages`, or `prompt` with `completion`. Prompts: `prompt`, text or messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.data.files import RowError, quote
from rlhf.data.keys import DERIVED, Record
from rlhf.data.records import AXES, STRENGTHS, Comparison, Conversation, Kind, Message, Prompt
from rlhf.errors import DataError

ROLES = ("system", "user", "assistant")
TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):[ ]?")
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}

COMMON_FIELDS = frozenset({"id", "source", "meta", *DERIVED})
FIELDS = {
    Kind.batch: COMMON_FIELDS
    | {"prompt", "chosen", "rejected", "strength", "axis", "chosen_safe", "rejected_safe"}
    | {"annotator", "model_chosen", "model_rejected", "tie"},
    Kind.sft: COMMON_FIELDS | {"messages", "prompt", "completion"},
    Kind.prompts: COMMON_FIELDS | {"prompt", "is_safety"},
}
FIELDS[Kind.open] = FIELDS[Kind.batch]
"""Fields with a meaning; any other is kept in `meta` and counted."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What rows are given that do not say it themselves."""

    source: str
    axis: str | None
    is_safety: bool
    name: str = ""
    """What their ids begin with, where it is not the source."""

    @property
    def prefix(self) -> str:
        """Beginning of the ids."""
        return self.name or self.source


def infer_kind(row: Mapping[str, Any], name: str) -> Kind:
    """Tell from a row's fields what its file holds; never `open`, which only the user knows."""
    if "chosen" in row and "rejected" in row:
        return Kind.batch
    if "messages" in row or ("prompt" in row and "completion" in row):
        return Kind.sft
    if "prompt" in row and "chosen" not in row and "rejected" not in row:
        return Kind.prompts
    raise DataError(
        f"{name}: cannot tell what it holds from the fields {', '.join(row) or '(none)'}; "
        "comparisons need chosen and rejected, SFT sets need messages, prompt sets need prompt"
    )


def parse_row(kind: Kind, row: Mapping[str, Any], *, line: int, defaults: Defaults) -> Record:
    """Return the record of a row; RowError names the field, its value and what is needed."""
    common: dict[str, Any] = {
        "id": _identity(row, f"{defaults.prefix}/{line}"),
        "source": _optional_text(row, "source") or defaults.source,
        "meta": _meta(row, kind),
    }
    if kind is Kind.sft:
        return Conversation(messages=_demonstration(row), **common)
    if kind is Kind.prompts:
        is_safety = _optional_bool(row, "is_safety")
        return Prompt(
            prompt=_ending_in_user(_prompt(row["prompt"]) if "prompt" in row else None),
            is_safety=defaults.is_safety if is_safety is None else is_safety,
            **common,
        )
    prompt, chosen, rejected = _pair(row)
    return Comparison(
        prompt=_ending_in_user(prompt),
        chosen=chosen,
        rejected=rejected,
        strength=_strength(row),
        axis=_axis(row, defaults.axis),
        chosen_safe=_optional_bool(row, "chosen_safe"),
        rejected_safe=_optional_bool(row, "rejected_safe"),
        annotator=_optional_text(row, "annotator"),
        model_chosen=_optional_text(row, "model_chosen"),
        model_rejected=_optional_text(row, "model_rejected"),
        tie=bool(_optional_bool(row, "tie") or _optional_bool(common["meta"], "tie", "meta.tie")),
        **common,
    )


def unknown_fields(kind: Kind, row: Mapping[str, Any]) -> list[str]:
    """Return the fields that have no meaning for this kind."""
    return sorted(name for name in row if name not in FIELDS[kind])


def _pair(row: Mapping[str, Any]) -> tuple[list[Message] | None, str, str]:
    """Return prompt and both responses, whatever the format."""
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise RowError(f"{name} is missing", None)
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = _prompt(row["prompt"]) if row.get("prompt") is not None else None
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None:
            return prompt, _text(chosen, "chosen"), _text(rejected, "rejected")
        if not TRANSCRIPT_TURN.match(chosen):
            raise RowError("prompt is missing", None)
        sides = (_transcript(chosen, "chosen"), _transcript(rejected, "rejected"))
    else:
        sides = (_messages(chosen, "chosen"), _messages(rejected, "rejected"))
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if side[-1]["role"] != "assistant":
            raise RowError(f"{name} must end in an assistant turn", side[-1]["role"])
    shared, other = sides[0][:-1], sides[1][:-1]
    if shared != other:
        raise RowError("chosen and rejected differ before their last turn", None)
    if shared and prompt is not None and prompt != shared:
        raise RowError("prompt is not the shared beginning of chosen and rejected", None)
    return prompt or shared or None, sides[0][-1]["content"], sides[1][-1]["content"]


def _prompt(value: object) -> list[Message]:
    if isinstance(value, str):
        return [Message(role="user", content=_text(value, "prompt"))]
    return _messages(value, "prompt")


def _ending_in_user(prompt: list[Message] | None) -> list[Message]:
    if prompt is None:
        raise RowError("prompt is missing", None)
    if prompt[-1]["role"] != "user":
        raise RowError("prompt must end in a user turn", prompt[-1]["role"])
    return prompt


def _demonstration(row: Mapping[str, Any]) -> list[Message]:
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
    elif row.get("prompt") is not None and row.get("completion") is not None:
        completion = row["completion"]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        messages = _prompt(row["prompt"]) + _messages(completion, "completion")
    else:
        raise RowError("messages is missing", None)
    if messages[-1]["role"] != "assistant":
        raise RowError("messages must end in an assistant turn", messages[-1]["role"])
    if all(message["role"] != "user" for message in messages):
        raise RowError("messages must hold a user turn", None)
    return messages


def _messages(value: object, name: str) -> list[Message]:
    """Check turns: known roles, system only first, texts. Two turns of one role may follow."""
    if not isinstance(value, list) or not value:
        raise RowError(f"{name}={quote(value)} is not a list of messages", value)
    messages = []
    for position, message in enumerate(value):
        where = f"{name}[{position}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise RowError(f"{where}={quote(message)} needs role and content", message)
        role = message["role"]
        if role not in ROLES:
            raise RowError(f"{where}.role={quote(role)} is not one of {', '.join(ROLES)}", role)
        if role == "system" and position > 0:
            raise RowError(f"{where}.role='system' may only be the first turn's", role)
        messages.append(Message(role=role, content=_text(message["content"], f"{where}.content")))
    return messages


def _transcript(text: str, name: str) -> list[Message]:
    r"""Split `\n\nHuman: ...\n\nAssistant: ...` into messages."""
    parts = TRANSCRIPT_TURN.split(_text(text, name))
    if len(parts) < 3 or parts[0].strip():
        raise RowError(f"{name}={quote(text)} is not a Human/Assistant transcript", text)
    return [
        Message(role=TRANSCRIPT_ROLES[speaker], content=content.strip())
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name}={quote(value)} is not a text", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{name}={quote(value)} holds half a character", quote(value)) from error
    return value


def _optional_text(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    return None if value is None else _text(value, name)


def _optional_bool(row: Mapping[str, Any], name: str, shown: str | None = None) -> bool | None:
    value = row.get(name)
    if value is not None and not isinstance(value, bool):
        raise RowError(f"{shown or name}={quote(value)} is not true, false or null", value)
    return value


def _identity(row: Mapping[str, Any], default: str) -> str:
    value = row.get("id")
    if value is None:
        return default
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not _text(value, "id").strip():
        raise RowError("id='' is empty", value)
    return str(value)


def _strength(row: Mapping[str, Any]) -> str | None:
    value = row.get("strength")
    if value is not None and value not in STRENGTHS:
        raise RowError(f"strength={quote(value)} is not one of {', '.join(STRENGTHS)}", value)
    return value


def _axis(row: Mapping[str, Any], default: str | None) -> str:
    value = row.get("axis")
    if value is None and default is None:
        raise RowError("axis is missing; add it or give ingest.axis=helpfulness|safety", None)
    if value is None:
        return str(default)
    if value not in AXES:
        raise RowError(f"axis={quote(value)} is not one of {', '.join(AXES)}", value)
    return str(value)


def _meta(row: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Return `meta` with the fields that have no meaning of their own; nothing is lost."""
    return {
        **parse_meta(row.get("meta")),
        **{name: row[name] for name in unknown_fields(kind, row)},
    }


def parse_meta(meta: Any) -> dict[str, Any]:
    """Return `meta` as an object: null is an empty one, a text is read as JSON."""
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except json.JSONDecodeError as error:
            raise RowError(f"meta={quote(meta)} is not a JSON object", meta) from error
    if meta is None:
        meta = {}
    if not isinstance(meta, dict):
        raise RowError(f"meta={quote(meta)} is not a JSON object", meta)
    return meta
