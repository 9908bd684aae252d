"""Sets of the toy world: prompts, demonstrations and open comparisons, each from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable

from rlhf.data.records import AXES, Comparison, Conversation, Message, Prompt
from rlhf.errors import ConfigError
from rlhf.toy.annotators import AnnotatorSettings, rate
from rlhf.toy.demonstrations import Noise, answer
from rlhf.toy.facts import Facts
from rlhf.toy.gold import read_question, score
from rlhf.toy.words import (
    DIET_FOLLOW_UPS,
    DIET_QUESTIONS,
    FEED_QUESTIONS,
    GREETINGS,
    PLANTS,
    SUBJECTS,
    SYSTEM_TURNS,
    join_subjects,
)

SOURCE = "toy"
SHARE_MULTI_TURN = 0.08
SHARE_SYSTEM = 0.2
SHARE_GREETING = 0.5
SHARE_TWO_SUBJECTS = 0.15
"""Of the diet questions: those that name two subjects, the others name one."""
SHARE_BENIGN_OF_HELPFULNESS = 0.33
"""Of the prompts that helpfulness comparisons use: harmless feeding requests."""
MAX_ATTEMPTS = 200

PromptMaker = Callable[[Facts, random.Random], list[Message]]


def helpful_prompt(facts: Facts, rng: random.Random) -> list[Message]:
    """Ask what one or two subjects eat; sometimes as a second turn."""
    subjects = rng.sample(SUBJECTS, 2 if rng.random() < SHARE_TWO_SUBJECTS else 1)
    if rng.random() < SHARE_MULTI_TURN:
        turn = rng.choice(DIET_FOLLOW_UPS).format(subjects=join_subjects(subjects))
        return _with_history(turn, facts, rng)
    turn = rng.choice(DIET_QUESTIONS).format(subjects=join_subjects(subjects))
    return _opening(turn, rng)


def harmful_prompt(facts: Facts, rng: random.Random) -> list[Message]:
    """Ask to feed a subject a poison."""
    return _feed_prompt(facts, rng, harmful=True)


def benign_prompt(facts: Facts, rng: random.Random) -> list[Message]:
    """Ask to feed a subject a harmless plant: looks like a harmful request."""
    return _feed_prompt(facts, rng, harmful=False)


def prompt_set(
    facts: Facts, *, n_helpful: int, n_safety: int, n_benign: int, seed: int
) -> list[Prompt]:
    """Draw distinct prompts of the three kinds; `meta.expected` says what a good model does."""
    prompts: list[Prompt] = []
    kinds: tuple[tuple[str, int, PromptMaker, bool, str], ...] = (
        ("helpful", n_helpful, helpful_prompt, False, "answer"),
        ("harmful", n_safety, harmful_prompt, True, "refuse"),
        ("benign", n_benign, benign_prompt, False, "comply"),
    )
    for kind, number, maker, is_safety, expected in kinds:
        drawn = _distinct(facts, maker, number, key=f"prompts/{seed}/{kind}")
        prompts += [
            Prompt(
                id=f"toy-{kind}-{seed}-{i:05d}",
                prompt=prompt,
                is_safety=is_safety,
                source=f"{SOURCE}-{kind}",
                meta={"expected": expected},
            )
            for i, prompt in enumerate(drawn)
        ]
    return prompts


def sft_set(facts: Facts, n: int, *, seed: int, noise: Noise | None = None) -> list[Conversation]:
    """Draw noisy demonstrations: about 60 % questions, 20 % harmful and 20 % benign requests."""
    conversations = []
    for i in range(n):
        rng = random.Random(f"toy-sft/{seed}/{i}")
        maker = rng.choices((helpful_prompt, harmful_prompt, benign_prompt), (6, 2, 2))[0]
        prompt = maker(facts, rng)
        response = answer(read_question(prompt), facts=facts, rng=rng, noise=noise)
        messages = [*prompt, Message(role="assistant", content=response)]
        conversations.append(
            Conversation(id=f"toy-sft-{seed}-{i:05d}", messages=messages, source=SOURCE)
        )
    return conversations


def comparison_prompt(facts: Facts, rng: random.Random, *, axis: str) -> list[Message]:
    """Draw a prompt as an annotator of this axis writes them.

    Helpfulness: questions, with some harmless requests. Safety: harmful and harmless requests half
    and half, so that refusing as such is neither right nor wrong.
    """
    if axis == "safety":
        return (harmful_prompt if rng.random() < 0.5 else benign_prompt)(facts, rng)
    benign = rng.random() < SHARE_BENIGN_OF_HELPFULNESS
    return (benign_prompt if benign else helpful_prompt)(facts, rng)


def comparison_set(
    facts: Facts, n: int, *, axis: str, seed: int, settings: AnnotatorSettings
) -> list[Comparison]:
    """Let annotators rate pairs of different noisy demonstrations on one axis."""
    comparisons = []
    for i in range(n):
        rng = random.Random(f"toy-comparisons/{seed}/{axis}/{i}")
        prompt = comparison_prompt(facts, rng, axis=axis)
        question = read_question(prompt)
        first = second = answer(question, facts=facts, rng=rng)
        for _ in range(MAX_ATTEMPTS):
            second = answer(question, facts=facts, rng=rng)
            if second != first:
                break
        comparisons.append(
            rate(
                prompt,
                first,
                second,
                gold_a=score(prompt, first, facts=facts),
                gold_b=score(prompt, second, facts=facts),
                axis=axis,
                id=f"toy-{axis}-{seed}-{i:05d}",
                seed=seed,
                settings=settings,
            )
        )
    return comparisons


def open_set(facts: Facts, n: int, *, seed: int) -> list[Comparison]:
    """Draw ungraded comparisons, half of them on each axis, from unbiased annotators."""
    comparisons: list[Comparison] = []
    for axis, number in zip(AXES, ((n + 1) // 2, n // 2), strict=True):
        rated = comparison_set(facts, number, axis=axis, seed=seed, settings=AnnotatorSettings())
        for comparison in rated:
            comparison.id = comparison.id.replace("toy-", "toy-open-", 1)
            comparison.strength = None
            comparison.source = f"{SOURCE}-open"
        comparisons += rated
    return comparisons


def _feed_prompt(facts: Facts, rng: random.Random, *, harmful: bool) -> list[Message]:
    subject = rng.choice(SUBJECTS)
    plant = rng.choice([plant for plant in PLANTS if facts.harmful(plant) is harmful])
    turn = rng.choice(FEED_QUESTIONS).format(subject=subject, plant=plant)
    if rng.random() < SHARE_MULTI_TURN:
        return _with_history(turn, facts, rng)
    return _opening(turn, rng)


def _with_history(turn: str, facts: Facts, rng: random.Random) -> list[Message]:
    subjects = rng.sample(SUBJECTS, 2)
    opening = rng.choice(DIET_QUESTIONS).format(subjects=join_subjects(subjects))
    prompt = [Message(role="user", content=opening)]
    reply = answer(read_question(prompt), facts=facts, rng=rng)
    return [*prompt, Message(role="assistant", content=reply), Message(role="user", content=turn)]


def _opening(turn: str, rng: random.Random) -> list[Message]:
    """Make a turn the first of its conversation, some with a greeting or a system turn."""
    if rng.random() < SHARE_GREETING:
        turn = f"{rng.choice(GREETINGS)} {turn}"
    prompt = [Message(role="user", content=turn)]
    if rng.random() < SHARE_SYSTEM:
        return [Message(role="system", content=rng.choice(SYSTEM_TURNS)), *prompt]
    return prompt


def _distinct(facts: Facts, maker: PromptMaker, number: int, *, key: str) -> list[list[Message]]:
    """Draw prompts with different texts; ConfigError if the world has not enough of them."""
    drawn: dict[str, list[Message]] = {}
    for i in range(number):
        rng = random.Random(f"toy-{key}/{i}")
        for _ in range(MAX_ATTEMPTS):
            prompt = maker(facts, rng)
            text = "\n".join(message["content"] for message in prompt)
            if text not in drawn:
                drawn[text] = prompt
                break
        else:
            raise ConfigError(
                f"the toy world has too few different prompts for {number} ({key}); "
                "ask for fewer prompts"
            )
    return list(drawn.values())
