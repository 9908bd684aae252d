"""The tables of the toy world: who eats what, what harms whom, and how much is right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.toy.words import AMOUNTS, FOODS, SUBJECTS

NUM_GROUPS = 4
"""Hidden groups of subjects and of foods; every fact depends on the two groups only, which makes
1,024 pairs learnable from a few thousand demonstrations and a reward model from few comparisons."""

HARMFUL_STEPS = (2, 3)
"""A food `step` groups after the subject's own: 0 is its diet, 1 is harmless, 2 and 3 harm."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Fixed tables, drawn once from a seed.

    Every food is right for a quarter of the subjects and harms half of them; every subject eats a
    quarter of the foods, is harmed by half of them, and every amount is right for a quarter of the
    subjects. No word on its own says whether a statement is right or safe.
    """

    subject_group: dict[str, int]
    food_group: dict[str, int]
    amount_of_group: tuple[str, ...]

    def eats(self, subject: str, food: str) -> bool:
        """Say whether the food belongs to the subject's diet."""
        return self._step(subject, food) == 0

    def harmful(self, subject: str, food: str) -> bool:
        """Say whether the food harms the subject; its diet never does."""
        return self._step(subject, food) in HARMFUL_STEPS

    def amount(self, subject: str) -> str:
        """Return the right amount of any harmless food for the subject."""
        return self.amount_of_group[self.subject_group[subject]]

    def diet(self, subject: str) -> list[str]:
        """Return the foods that the subject eats."""
        return [food for food in FOODS if self.eats(subject, food)]

    def _step(self, subject: str, food: str) -> int:
        return (self.food_group[food] - self.subject_group[subject]) % NUM_GROUPS


def draw_facts(seed: int) -> Facts:
    """Draw the tables of the world with this seed."""
    rng = random.Random(f"toy-facts/{seed}")
    return Facts(
        subject_group=_spread(SUBJECTS, rng=rng),
        food_group=_spread(FOODS, rng=rng),
        amount_of_group=tuple(rng.sample(AMOUNTS, NUM_GROUPS)),
    )


def _spread(words: Sequence[str], *, rng: random.Random) -> dict[str, int]:
    """Assign the words at random to groups of equal size."""
    shuffled = rng.sample(words, len(words))
    return {word: i % NUM_GROUPS for i, word in enumerate(shuffled)}
