"""Noisy demonstrations: answers with deliberate mistakes, the material of the first model."""

from __future__ import annotations

import random
from dataclasses import dataclass

from rlhf.toy.facts import Facts
from rlhf.toy.gold import Question
from rlhf.toy.words import AMOUNTS, COMPLY_PHRASES, FOODS, REFUSE_PHRASES, SUBJECTS


@dataclass(frozen=True, slots=True)
class Noise:
    """How often a demonstrator errs; all fields are probabilities.

    Omissions shorten and additions lengthen a bad answer about equally often, so that length says
    next to nothing about quality.
    """

    wrong_fact: float = 0.3
    """A fact, an amount or an alternative is wrong."""
    myth: float = 0.8
    """A wrong fact is the subject's myth, else any other food."""
    omit_subject: float = 0.12
    """An asked subject is left out (never the only one)."""
    add_fact: float = 0.15
    """A fact about a subject that was not asked about."""
    repeat: float = 0.08
    """A sentence is said twice."""
    drop_sentence: float = 0.2
    """One sentence of an answer to a feeding request is missing."""
    harmful_compliance: float = 0.45
    """A harmful request is answered with an amount."""
    over_refusal: float = 0.2
    """A harmless request is refused."""


FLAWLESS = Noise(**dict.fromkeys(Noise.__dataclass_fields__, 0.0))


def answer(
    question: Question, *, facts: Facts, rng: random.Random, noise: Noise | None = None
) -> str:
    """Write one demonstration for a question; with FLAWLESS its gold helpfulness is 1."""
    noise = Noise() if noise is None else noise
    write = _diet if question.plant is None else _feed
    sentences = write(question, facts, rng, noise)
    if rng.random() < noise.add_fact:
        other = rng.choice([s for s in SUBJECTS if s not in question.subjects])
        sentences.insert(rng.randint(1, len(sentences)), _fact(other, facts, rng, noise))
    if rng.random() < noise.repeat:
        position = rng.randrange(len(sentences))
        sentences.insert(position, sentences[position])
    return " ".join(sentences)


def _food(subject: str, facts: Facts, rng: random.Random, noise: Noise) -> str:
    """Name the subject's food, or its myth, or any other food."""
    if rng.random() >= noise.wrong_fact:
        return facts.diet[subject]
    if rng.random() < noise.myth:
        return facts.myth[subject]
    return rng.choice([food for food in FOODS if food != facts.diet[subject]])


def _fact(subject: str, facts: Facts, rng: random.Random, noise: Noise) -> str:
    return f"the {subject} eats {_food(subject, facts, rng, noise)} ."


def _diet(question: Question, facts: Facts, rng: random.Random, noise: Noise) -> list[str]:
    """Answer what the subjects eat, now and then leaving one out."""
    kept = [s for s in question.subjects if rng.random() >= noise.omit_subject]
    kept = kept or [rng.choice(question.subjects)]
    return [_fact(subject, facts, rng, noise) for subject in kept]


def _feed(question: Question, facts: Facts, rng: random.Random, noise: Noise) -> list[str]:
    """Answer a feeding request by an amount or by a refusal with a better food."""
    subject, plant = question.subjects[0], question.plant
    assert plant is not None
    harmful = facts.harmful(plant)
    complies = rng.random() < (noise.harmful_compliance if harmful else 1 - noise.over_refusal)
    if complies:
        amount = facts.amount(subject)
        if rng.random() < noise.wrong_fact:
            amount = rng.choice([other for other in AMOUNTS if other != amount])
        sentences = [
            f"for the {subject} {plant} is fine .",
            rng.choice(COMPLY_PHRASES),
            f"give it {amount} .",
        ]
    else:
        # A wrong alternative is harmless: it makes a refusal unhelpful, not a violation.
        wrong = rng.random() < noise.wrong_fact
        alternative = (facts.myth if wrong else facts.diet)[subject]
        sentences = [
            f"for the {subject} {plant} is bad .",
            rng.choice(REFUSE_PHRASES),
            f"give it {alternative} .",
        ]
    if rng.random() < noise.drop_sentence:
        sentences.pop(rng.choice((1, 2)))
    return sentences
