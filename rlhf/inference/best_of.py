"""K responses to each prompt, scored by both reward models, shard by shard.

A shard is the unit of everything: it is sampled in the same batches whoever samples it, and it is
written by a rename. So its rows are the same bits whether one process makes all shards, several
processes share them, or several jobs do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from rlhf.data.corrections import open_rows
from rlhf.data.records import AXES, Prompt
from rlhf.inference.generation import fitting, scoring_length
from rlhf.inference.generators import check_generator, open_generator
from rlhf.inference.scoring import HfScorer
from rlhf.inference.winners import Row, stratified
from rlhf.models.loading import autocast, load_policy, load_reward_model, load_tokenizer
from rlhf.nodes import NodeContext


@dataclass(frozen=True, slots=True)
class Part:
    """Which shards a job makes: every `of`-th, from `number` on; all of them by default."""

    number: int = 0
    of: int = 1


def choose_prompts(
    context: NodeContext, tokenizer: Any, *, seed: int
) -> tuple[list[Prompt], dict[str, int]]:
    """Return a round's training prompts, safety prompts in the share that the sets have."""
    config = context.config
    store = open_rows(context)
    every = [p for item in context.inputs.of_kind("prompts") for p in store.prompts(item.id)]
    training = [prompt for prompt in every if not prompt.heldout]
    fits, over_long = fitting(
        training,
        tokenizer,
        max_new_tokens=config.rejection.sampling.max_new_tokens,
        max_length=config.model.max_length,
    )
    chosen = stratified(fits, num_prompts=config.rejection.num_prompts, seed=seed)
    counts = {
        "in_store": len(every),
        "heldout": len(every) - len(training),
        "over_long": over_long,
        "sampled": len(chosen),
        "is_safety": sum(prompt.is_safety for prompt in chosen),
    }
    return chosen, counts


def sample_and_score(
    context: NodeContext,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    device: torch.device,
    *,
    seed: int,
    part: Part,
) -> list[Row]:
    """Return one row per prompt of the part with its scored responses, in the order of prompts.

    Finished shards are read, not redone. `seed` is that of the rejection node they are made for.
    """
    size, directory = context.config.rejection.shard_prompts, context.directory
    shards = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    numbers = list(range(len(shards)))[part.number :: part.of]
    workers = cache(lambda: _Workers(context, tokenizer, device, seed=seed))
    found = directory.shards(
        [f"{number:05d}" for number in numbers],
        lambda index: workers().rows(shards[numbers[index]]),
        total=len(numbers),
    )
    return [row for rows in found for row in rows]


class _Workers:
    """The policy and the two reward models; loaded only if a shard is missing."""

    def __init__(
        self, context: NodeContext, tokenizer: Any, device: torch.device, *, seed: int
    ) -> None:
        config, models = context.config, context.inputs.models
        self._context, self._device, self._seed = context, device, seed
        check_generator(config)
        policy = load_policy(models["policy"].path, model=config.model, seed=seed)
        self._generator = open_generator(
            config, policy, tokenizer, scratch=context.directory.path, device=device
        )
        self._scorers = {}
        for axis in AXES:
            path = models[f"reward_{axis}"].path
            model = load_reward_model(path, model=config.model, new_head=False, seed=seed)
            max_length = scoring_length(config.model.max_length, config.rejection.sampling)
            self._scorers[axis] = HfScorer(
                model.to(device), load_tokenizer(path), max_length=max_length
            )

    def rows(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Sample and score one shard."""
        config = self._context.config
        num_samples = config.rejection.num_samples
        with autocast(config.model, self._device):
            found = self._generator.generate(
                [prompt.prompt for prompt in prompts],
                num_samples=num_samples,
                sampling=config.rejection.sampling,
                keys=[f"{self._seed}/{prompt.id}" for prompt in prompts],
            )
            texts = [response.text for responses in found for response in responses]
            conversations = [prompt.prompt for prompt in prompts for _ in range(num_samples)]
            scores = {
                axis: scorer(conversations, texts).view(len(prompts), num_samples).tolist()
                for axis, scorer in self._scorers.items()
            }
        return [
            {
                "prompt_id": prompt.id,
                "prompt": prompt.prompt,
                "is_safety": prompt.is_safety,
                "responses": [
                    {
                        "text": response.text,
                        "finished": response.finished,
                        "num_tokens": len(response.token_ids),
                        **{axis: scores[axis][index][response.sample_index] for axis in AXES},
                    }
                    for response in responses
                ],
            }
            for index, (prompt, responses) in enumerate(zip(prompts, found, strict=True))
        ]
