"""Which prompts are held out: decided by the text of the first user turn alone.

One rule for every kind of data, so that a held-out prompt is held out as a comparison, as a
demonstration and as a prompt to sample from.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from rlhf.data.records import Message
from rlhf.errors import DataError

JUDGE_SALT = "judge"
"""Independent of the held-out salt: judges and held-out prompts must not coincide."""

FOLDED = re.compile(r"""[\s.,;:!?'"`\u2018\u2019\u201c\u201d\u2026]+""")
"""Blanks and sentence punctuation; signs that carry meaning (+ - * / = < >) stay."""


def fold_text(text: str) -> str:
    """Normalise a text for comparison: case, blanks, sentence punctuation, Unicode forms."""
    folded = FOLDED.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return folded or " ".join(text.split())


def prompt_key(messages: Sequence[Message]) -> str:
    """Return a hash of the normalised first user turn: the cluster of intervals and splits."""
    for message in messages:
        if message["role"] == "user":
            return _key_of(message["content"])
    raise DataError("a conversation without a user turn has no prompt; add one")


@lru_cache(maxsize=16384)
def _key_of(text: str) -> str:
    """Return a text's key; stages ask for the same prompts many times over."""
    return hashlib.blake2b(fold_text(text).encode(), digest_size=16).hexdigest()


def is_heldout(messages: Sequence[Message], *, share: float, salt: str) -> bool:
    """Tell whether the prompt is never trained or sampled on."""
    return key_is_heldout(prompt_key(messages), share=share, salt=salt)


def key_is_heldout(key: str, *, share: float, salt: str) -> bool:
    """Decide from a `prompt_key`; a larger share holds out the same prompts and more."""
    hashed = hashlib.blake2b(f"{salt}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") < share * 2**64


def is_judge_prompt(messages: Sequence[Message], *, share: float) -> bool:
    """Tell whether the prompt is reserved for the judges, independently of the held-out split."""
    return key_is_heldout(prompt_key(messages), share=share, salt=JUDGE_SALT)
