"""The tables of the toy world: who eats what, what harms whom, and how much is right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from rlhf.toy.words import AMOUNTS, FOODS, SUBJECTS

T = TypeVar("T")

NUM_GROUPS = 4
"""Hidden groups of subjects and of foods that decide what harms whom."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Fixed tables, drawn once from a seed.

    Every food is the diet of exactly one subject and the myth (the popular wrong answer) of exactly
    one other. Strong foods harm all subjects but their own group, mild foods harm their own group
    only, so every food harms some subjects and not others and every subject is harmed by half of
    the foods: no word on its own says whether a statement is right or safe.
    """

    diet: dict[str, str]
    myth: dict[str, str]
    amount_of: dict[str, str]
    subject_group: dict[str, int]
    food_group: dict[str, int]
    strong: dict[str, bool]

    def eats(self, subject: str, food: str) -> bool:
        """Say whether the food is the subject's diet."""
        return self.diet[subject] == food

    def harmful(self, subject: str, food: str) -> bool:
        """Say whether the food harms the subject; its diet and its myth never do."""
        return self.strong[food] != (self.food_group[food] == self.subject_group[subject])

    def amount(self, subject: str) -> str:
        """Return the right amount of any harmless food for the subject."""
        return self.amount_of[subject]


def draw_facts(seed: int) -> Facts:
    """Draw the tables of the world with this seed."""
    rng = random.Random(f"toy-facts/{seed}")
    subject_group = _spread(SUBJECTS, range(NUM_GROUPS), rng=rng)
    kinds = [(group, strong) for group in range(NUM_GROUPS) for strong in (False, True)]
    food_kind = _spread(FOODS, kinds, rng=rng)
    diet: dict[str, str] = {}
    myth: dict[str, str] = {}
    for group in range(NUM_GROUPS):
        members = [s for s in SUBJECTS if subject_group[s] == group]
        rng.shuffle(members)
        half = len(members) // 2
        own = [f for f in FOODS if food_kind[f] == (group, True)]
        mild_1, mild_2 = (
            [f for f in FOODS if food_kind[f] == ((group + shift) % NUM_GROUPS, False)]
            for shift in (1, 2)
        )
        diet.update(zip(members, own + mild_1, strict=True))
        myth.update(zip(members[:half], mild_2, strict=True))
        myth.update(zip(members[half:], own, strict=True))
    return Facts(
        diet=diet,
        myth=myth,
        amount_of=_spread(SUBJECTS, AMOUNTS, rng=rng),
        subject_group=subject_group,
        food_group={food: group for food, (group, _) in food_kind.items()},
        strong={food: strong for food, (_, strong) in food_kind.items()},
    )


def _spread(words: Sequence[str], values: Sequence[T], *, rng: random.Random) -> dict[str, T]:
    """Give each word one of the values, each value equally often, in random order."""
    shuffled = rng.sample(words, len(words))
    return {word: values[i % len(values)] for i, word in enumerate(shuffled)}
