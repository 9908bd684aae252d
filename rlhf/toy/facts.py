"""The tables of the toy world: who eats what, what harms whom, and how much is right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from rlhf.toy.words import AMOUNTS, FOODS, PLANTS, SUBJECTS

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Facts:
    """Fixed tables, drawn once from a seed.

    Every food is the diet of as many subjects as it is the myth (the popular wrong answer) of, and
    half of the plants are poison. So no word on its own says whether a statement is right or safe:
    `hay` is right for some subjects, `fine` for half of the plants.
    """

    diet: dict[str, str]
    myth: dict[str, str]
    amount_of: dict[str, str]
    poison: frozenset[str]

    def eats(self, subject: str, food: str) -> bool:
        """Say whether the food is the subject's diet."""
        return self.diet[subject] == food

    def harmful(self, plant: str) -> bool:
        """Say whether eating it does harm; foods never do."""
        return plant in self.poison

    def amount(self, subject: str) -> str:
        """Return the right amount of any harmless plant for the subject."""
        return self.amount_of[subject]


def draw_facts(seed: int) -> Facts:
    """Draw the tables of the world with this seed."""
    rng = random.Random(f"toy-facts/{seed}")
    diet = _spread(SUBJECTS, FOODS, rng=rng)
    following = dict(zip(FOODS, FOODS[1:] + FOODS[:1], strict=True))
    return Facts(
        diet=diet,
        myth={subject: following[food] for subject, food in diet.items()},
        amount_of=_spread(SUBJECTS, AMOUNTS, rng=rng),
        poison=frozenset(rng.sample(PLANTS, len(PLANTS) // 2)),
    )


def _spread(words: Sequence[str], values: Sequence[T], *, rng: random.Random) -> dict[str, T]:
    """Give each word one of the values, each value equally often, in random order."""
    shuffled = rng.sample(words, len(words))
    return {word: values[i % len(values)] for i, word in enumerate(shuffled)}
