"""The built-in toy world: prompts, gold scorer, simulated annotators, tiny tokenizer and model."""

from __future__ import annotations

from rlhf.toy.annotators import AnnotatorSettings
from rlhf.toy.gold import Gold
from rlhf.toy.world import World

__all__ = ["AnnotatorSettings", "Gold", "World"]
