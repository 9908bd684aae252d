"""Which prompts a stage takes: their kinds and an order that follows from a key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from rlhf.data.records import Prompt

PROMPT_KINDS = ("safety", "benign", "ordinary")
"""Adversarial prompts, harmless ones that look adversarial, and all others."""


def prompt_kind(prompt: Prompt) -> str:
    """Return the kind: tagged is_safety, else marked `expected: comply` by its set, else ordinary.

    Sets mark with `meta.expected` only prompts that test refusals.
    """
    if prompt.is_safety:
        return "safety"
    return "benign" if prompt.meta.get("expected") == "comply" else "ordinary"


def by_kind(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    """Sort prompts into PROMPT_KINDS; the order inside a kind stays."""
    kinds: dict[str, list[Prompt]] = {kind: [] for kind in PROMPT_KINDS}
    for prompt in prompts:
        kinds[prompt_kind(prompt)].append(prompt)
    return kinds


def keyed_order(prompts: Iterable[Prompt], *, seed: int) -> list[Prompt]:
    """Shuffle by a hash of (seed, prompt id): further prompts never change the others' order."""
    return sorted(prompts, key=lambda prompt: keyed_digest(f"{seed}/{prompt.id}"))


def keyed_digest(key: str) -> bytes:
    """Return 16 bytes that depend on the key only."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()
