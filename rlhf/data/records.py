"""Records that cross module boundaries: one dataclass per kind of row in the store."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Literal, TypedDict

STRENGTHS = ("significantly_better", "better", "slightly_better", "negligibly_better")
"""Preference strengths, strongest first (paper section 3.2.1)."""

AXES = ("helpfulness", "safety")
"""The two reward models (paper section 3.2.2)."""

Axis = Literal["helpfulness", "safety"]


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


class Kind(Enum):
    """What an ingested file holds; `open` is never inferred."""

    batch = auto()
    open = auto()
    sft = auto()
    prompts = auto()


@dataclass(slots=True)
class Comparison:
    """A prompt with two responses and the annotator's verdict.

    `strength` is None for ungraded open data (margin 0). `tie` marks equal grades: the order is a
    coin flip, so the margin is 0 and the row is left out of accuracy.
    """

    id: str
    prompt: list[Message]
    chosen: str
    rejected: str
    strength: str | None
    axis: str
    source: str
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None
    annotator: str | None = None
    model_chosen: str | None = None
    model_rejected: str | None = None
    tie: bool = False
    batch_id: str = ""
    heldout: bool = False
    repeat_prompt: bool = False
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the row as it is written to JSONL; nested values are shared, not copied."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Prompt:
    """A prompt to sample responses for; `is_safety` drives the gate (paper section 3.4.2)."""

    id: str
    prompt: list[Message]
    is_safety: bool
    source: str
    heldout: bool = False
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the row as it is written to JSONL; nested values are shared, not copied."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Conversation:
    """A demonstration for supervised fine-tuning: every assistant turn is trained on."""

    id: str
    messages: list[Message]
    source: str
    heldout: bool = False
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the row as it is written to JSONL; nested values are shared, not copied."""
        return {name: getattr(self, name) for name in self.__slots__}


RECORDS: dict[Kind, type[Comparison] | type[Prompt] | type[Conversation]] = {
    Kind.batch: Comparison,
    Kind.open: Comparison,
    Kind.sft: Conversation,
    Kind.prompts: Prompt,
}
"""The record that a row of each kind becomes."""
