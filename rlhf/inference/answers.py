"""What both versions answered in an evaluation, with everything that is known of each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.comparison import Settings, mean_value, rate
from rlhf.algo.rewards import below_threshold
from rlhf.data.prompts import prompt_kind
from rlhf.data.records import Prompt
from rlhf.data.refusals import is_refusal
from rlhf.data.split import prompt_key
from rlhf.toy import World
from rlhf.toy.gold import Gold

SIDES = ("candidate", "promoted")
"""The new version and the one it has to beat."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One version's response to one prompt.

    `candidate_logprob` is what this version gives to the *candidate's* response, in nats.
    """

    prompt_id: str
    text: str
    token_ids: list[int]
    finished: bool
    candidate_logprob: float


Answers = Mapping[str, Sequence[Answer]]
"""Answers by side, in the order of the prompts."""

Golds = Mapping[str, Sequence[Gold]]
"""The toy world's true values of the answers, by side."""


def gold_values(seed: int, prompts: Sequence[Prompt], answers: Answers) -> Golds:
    """Return the toy world's true value of every answer."""
    world = World(seed)
    return {
        side: [
            world.gold(prompt.prompt, answer.text)
            for prompt, answer in zip(prompts, answers[side], strict=True)
        ]
        for side in SIDES
    }


def gold_means(prompts: Sequence[Prompt], golds: Golds, settings: Settings) -> dict[str, Any]:
    """Return both versions' true helpfulness, violation rate and over-refusal rate.

    Helpfulness counts on all prompts but the adversarial ones.
    """
    kinds = [prompt_kind(prompt) for prompt in prompts]
    is_safety, is_benign = ([kind == name for kind in kinds] for name in ("safety", "benign"))
    clusters = [prompt_key(prompt.prompt) for prompt in prompts]
    level = settings.level
    return {
        side: {
            "helpfulness": mean_value(
                [gold.helpfulness for gold in golds[side]],
                clusters,
                [not safety for safety in is_safety],
                settings=settings,
            ),
            "violation_rate": rate(
                [gold.violation for gold in golds[side]], clusters, is_safety, level=level
            ),
            "over_refusal_rate": rate(
                [gold.over_refusal for gold in golds[side]], clusters, is_benign, level=level
            ),
        }
        for side in SIDES
    }


def response_rows(
    prompts: Sequence[Prompt],
    answers: Answers,
    scores: Mapping[str, Mapping[str, Tensor]],
    golds: Golds | None,
    *,
    unsafe_threshold: float,
) -> list[dict[str, Any]]:
    """Return the rows of responses.jsonl: a prompt, both responses, and what is known of them.

    `scores` are raw, by role and side. `unsafe` is the safety judge's word, as in the violation
    rate, and None where the prompt is not tagged is_safety.
    """
    unsafe = {
        side: below_threshold(scores["judge_safety"][side], threshold=unsafe_threshold).tolist()
        for side in SIDES
    }
    rows = []
    for i, prompt in enumerate(prompts):
        of_side = {side: answers[side][i] for side in SIDES}
        rows.append(
            {
                "prompt_id": prompt.id,
                "kind": prompt_kind(prompt),
                "source": prompt.source,
                "prompt": prompt.prompt,
                "responses": {side: row.text for side, row in of_side.items()},
                "scores": {
                    role: {side: columns[side][i].item() for side in SIDES}
                    for role, columns in scores.items()
                },
                "num_tokens": {side: len(row.token_ids) for side, row in of_side.items()},
                "finished": {side: row.finished for side, row in of_side.items()},
                "refused": {side: is_refusal(row.text) for side, row in of_side.items()},
                "unsafe": {side: unsafe[side][i] if prompt.is_safety else None for side in SIDES},
                "gold": {
                    side: None if golds is None else _gold_row(golds[side][i]) for side in SIDES
                },
            }
        )
    return rows


def as_tensors(scores: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    """Return raw scores by side as tensors [P]."""
    return {side: torch.tensor(scores[side]) for side in SIDES}


def _gold_row(gold: Gold) -> dict[str, Any]:
    return {
        "helpfulness": gold.helpfulness,
        "violation": gold.violation,
        "over_refusal": gold.over_refusal,
    }
