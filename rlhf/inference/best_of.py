"""K responses to each prompt, scored by both reward models, shard by shard; at one temperature
or, for the sweep that chooses it, at several.

A shard is the unit of everything: it is sampled in the same batches whoever samples it, and it is
written by a rename. So its rows are the same bits whether one process makes all shards, several
processes share them, or several jobs do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rlhf.artifacts import read_json
from rlhf.config import Sampling
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


SWEEP = "sweep"
"""Role of the node that chose the round's temperature."""
CHOICE = "temperature.json"


def chosen_temperature(context: NodeContext) -> float:
    """Return the temperature that the round's sweep chose; without a sweep, the configured one."""
    models = context.inputs.models
    if SWEEP not in models:
        return context.config.rejection.sampling.temperature
    return float(read_json(Path(models[SWEEP].path) / CHOICE)["chosen"])


def choose_prompts(
    context: NodeContext, tokenizer: Any, *, seed: int, at_most: int | None = None
) -> tuple[list[Prompt], dict[str, int]]:
    """Return a round's training prompts, safety prompts in the share that the sets have.

    With `at_most`, a smaller draw of the same: its prompts are among the round's, but for the
    rounding of the share.
    """
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
    limits = [n for n in (config.rejection.num_prompts, at_most) if n is not None]
    chosen = stratified(fits, num_prompts=min(limits, default=None), seed=seed)
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
    shards = _shards(context, prompts)
    numbers = list(range(len(shards)))[part.number :: part.of]
    temperature = chosen_temperature(context)
    workers = cache(lambda: _Workers(context, tokenizer, device, seed=seed))
    found = context.directory.shards(
        [f"{number:05d}" for number in numbers],
        lambda index: workers().rows(shards[numbers[index]], temperature=temperature),
        total=len(numbers),
    )
    return [row for rows in found for row in rows]


def sample_at_temperatures(
    context: NodeContext,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    device: torch.device,
    *,
    seed: int,
) -> list[list[Row]]:
    """Return the rows of `sample_and_score` for each temperature of the sweep, in their order.

    Keys are the rejection node's and know no temperature: every temperature draws the same random
    numbers, so that what differs between two of them is the temperature.
    """
    temperatures = context.config.rejection.temperatures
    shards = _shards(context, prompts)
    jobs = [(index, n) for index in range(len(temperatures)) for n in range(len(shards))]
    workers = cache(lambda: _Workers(context, tokenizer, device, seed=seed))
    found = context.directory.shards(
        [f"t{index:02d}-{number:05d}" for index, number in jobs],
        lambda job: workers().rows(shards[jobs[job][1]], temperature=temperatures[jobs[job][0]]),
        total=len(jobs),
    )
    rows: list[list[Row]] = [[] for _ in temperatures]
    for (index, _), of_shard in zip(jobs, found, strict=True):
        rows[index] += of_shard
    return rows


def _shards(context: NodeContext, prompts: Sequence[Prompt]) -> list[Sequence[Prompt]]:
    size = context.config.rejection.shard_prompts
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


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

    def rows(self, prompts: Sequence[Prompt], *, temperature: float) -> list[Row]:
        """Sample and score one shard."""
        config = self._context.config
        sampling: Sampling = replace(config.rejection.sampling, temperature=temperature)
        num_samples = config.rejection.num_samples
        with autocast(config.model, self._device):
            found = self._generator.generate(
                [prompt.prompt for prompt in prompts],
                num_samples=num_samples,
                sampling=sampling,
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
