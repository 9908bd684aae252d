"""The toy world as one object: what the rest of the system uses."""

from __future__ import annotations

from rlhf.data.records import Comparison, Conversation, Message, Prompt
from rlhf.toy import annotators, gold, sets
from rlhf.toy.annotators import AnnotatorSettings
from rlhf.toy.facts import Facts, draw_facts
from rlhf.toy.gold import Gold

UNBIASED = AnnotatorSettings()


class World:
    """A small, fully known world; everything it makes follows from its seed."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.facts: Facts = draw_facts(seed)

    def gold(self, prompt: list[Message], response: str) -> Gold:
        """Score a response exactly; raises DataError for a prompt from outside the world."""
        return gold.score(prompt, response, facts=self.facts)

    def rate(
        self,
        prompt: list[Message],
        response_a: str,
        response_b: str,
        *,
        axis: str,
        id: str,
        seed: int,
        settings: AnnotatorSettings = UNBIASED,
    ) -> Comparison:
        """Let a simulated annotator compare two responses; depends only on (seed, id) and them."""
        return annotators.rate(
            prompt,
            response_a,
            response_b,
            gold_a=self.gold(prompt, response_a),
            gold_b=self.gold(prompt, response_b),
            axis=axis,
            id=id,
            seed=seed,
            settings=settings,
        )

    def sft_set(self, n: int, *, seed: int | None = None) -> list[Conversation]:
        """Draw `n` noisy demonstrations."""
        return sets.sft_set(self.facts, n, seed=self._seed(seed))

    def prompt_set(
        self, n_helpful: int, n_safety: int, n_benign: int, *, seed: int | None = None
    ) -> list[Prompt]:
        """Draw distinct prompts: ordinary, harmful (is_safety) and harmless look-alikes."""
        return sets.prompt_set(
            self.facts,
            n_helpful=n_helpful,
            n_safety=n_safety,
            n_benign=n_benign,
            seed=self._seed(seed),
        )

    def open_set(self, n: int, seed: int) -> list[Comparison]:
        """Draw `n` ungraded comparisons of noisy demonstrations, half on each axis."""
        return sets.open_set(self.facts, n, seed=seed)

    def comparison_set(
        self, n: int, *, axis: str, seed: int, settings: AnnotatorSettings = UNBIASED
    ) -> list[Comparison]:
        """Draw `n` graded comparisons of noisy demonstrations on one axis."""
        return sets.comparison_set(self.facts, n, axis=axis, seed=seed, settings=settings)

    def _seed(self, seed: int | None) -> int:
        return self.seed if seed is None else seed
