"""Rejection sampling: K responses a prompt, the best one becomes training data (section 3.2.3).

Sample and score shard by shard, choose a winner per prompt, then fine-tune on the winners, mixed
with winners of earlier rounds and demonstrations so that old skills stay.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf import metrics
from rlhf.artifacts import read_jsonl, write_json, write_jsonl
from rlhf.data.chat import Encoded, encode_conversation
from rlhf.data.ledger import Store
from rlhf.data.prompts import keyed_digest
from rlhf.data.records import AXES, Prompt
from rlhf.errors import StageError
from rlhf.inference.generation import HfGenerator, fitting, scoring_length
from rlhf.inference.scoring import HfScorer
from rlhf.inference.winners import (
    Row,
    choose_winner,
    draw_pool,
    ranking_axis,
    response_counts,
    selection_curves,
    stratified,
)
from rlhf.models.loading import (
    autocast,
    load_policy,
    load_reward_model,
    load_tokenizer,
    save_model,
    setup_torch,
)
from rlhf.nodes import NodeContext
from rlhf.training.sft import fine_tune

log = logging.getLogger(__name__)

REVISION = 1
NUM_SAMPLES_SHOWN = 20
"""Winners written to samples.jsonl."""


def run(context: NodeContext) -> None:
    """Write shards/, winners.jsonl, selection.json and model/; StageError without any winner."""
    config, directory = context.config, context.directory
    device = setup_torch(config.compute)
    tokenizer = load_tokenizer(context.inputs.models["policy"].path)
    prompts, counts = _choose_prompts(context, tokenizer)
    rows = _sample_and_score(context, prompts, tokenizer, device)
    threshold = config.gate.threshold
    winners = [
        winner
        for row in rows
        if (winner := _winner(row, threshold=threshold, round=context.node.round)) is not None
    ]
    if not winners:
        raise StageError(
            f"none of {len(rows)} prompts has a response that ends by itself: raise "
            "rejection.sampling.max_new_tokens or train the policy longer"
        )
    write_jsonl(directory.path / "winners.jsonl", winners)
    curves = selection_curves(rows)
    encoded, mixture = _training_rows(context, winners, tokenizer)
    model = load_policy(
        context.inputs.models["init"].path, model=config.model, seed=context.seed
    ).to(device)
    fine_tune(
        model,
        tokenizer,
        encoded,
        optimizer=config.rejection.optimizer,
        epochs=config.rejection.epochs,
        batch_size=config.rejection.batch_size,
        micro_batch_size=config.rejection.micro_batch_size,
        config=config,
        directory=directory,
        seed=context.seed,
    )
    _log_winners(context, winners, curves)
    save_model(model, tokenizer, directory.model)
    without = len(rows) - len(winners)
    selection = {
        "prompts": {**counts, "without_usable_sample": without},
        "responses": response_counts(rows, threshold=threshold),
        "fine_tuning": mixture,
        "against_n": curves,
    }
    write_json(directory.path / "selection.json", selection)


def _winner(row: Row, *, threshold: float, round: int) -> Row | None:
    """Return the winner of a prompt as winners.jsonl holds it; None if no response is usable."""
    index = choose_winner(row, threshold=threshold)
    if index is None:
        return None
    axis = ranking_axis(row, threshold=threshold)
    return {
        "prompt_id": row["prompt_id"],
        "prompt": row["prompt"],
        "response": row["responses"][index]["text"],
        "score": row["responses"][index][axis],
        "axis": axis,
        "round": round,
    }


def _choose_prompts(context: NodeContext, tokenizer: Any) -> tuple[list[Prompt], dict[str, int]]:
    """Return this round's training prompts, safety prompts in the share that the sets have."""
    config = context.config
    store = Store(Path(config.paths.store), config.data.stream)
    every = [p for item in context.inputs.of_kind("prompts") for p in store.prompts(item.id)]
    training = [prompt for prompt in every if not prompt.heldout]
    fits, over_long = fitting(
        training,
        tokenizer,
        max_new_tokens=config.rejection.sampling.max_new_tokens,
        max_length=config.model.max_length,
    )
    chosen = stratified(fits, num_prompts=config.rejection.num_prompts, seed=context.seed)
    counts = {
        "in_store": len(every),
        "heldout": len(every) - len(training),
        "over_long": over_long,
        "sampled": len(chosen),
        "is_safety": sum(prompt.is_safety for prompt in chosen),
    }
    return chosen, counts


def _sample_and_score(
    context: NodeContext, prompts: Sequence[Prompt], tokenizer: Any, device: torch.device
) -> list[Row]:
    """Return one row per prompt with its scored responses; finished shards are read, not redone."""
    size = context.config.rejection.shard_prompts
    shards = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    paths = [context.directory.path / "shards" / f"{n:05d}.jsonl" for n in range(len(shards))]
    workers = None
    for number, (shard, path) in enumerate(zip(shards, paths, strict=True), start=1):
        if not path.exists():
            workers = workers or _Workers(context, tokenizer, device)
            write_jsonl(path, workers.rows(shard))
        context.directory.step(number, len(shards), is_saved=True)
    return [row for path in paths for row in read_jsonl(path)]


@dataclass(slots=True)
class _Workers:
    """The policy and the two reward models; loaded only if a shard is missing."""

    context: NodeContext
    generator: HfGenerator
    scorers: dict[str, HfScorer]
    device: torch.device

    def __init__(self, context: NodeContext, tokenizer: Any, device: torch.device) -> None:
        config, models = context.config, context.inputs.models
        self.context, self.device = context, device
        policy = load_policy(models["policy"].path, model=config.model, seed=context.seed)
        self.generator = HfGenerator(
            policy.to(device), tokenizer, max_length=config.model.max_length
        )
        self.scorers = {}
        for axis in AXES:
            path = models[f"reward_{axis}"].path
            model = load_reward_model(path, model=config.model, new_head=False, seed=context.seed)
            max_length = scoring_length(config.model.max_length, config.rejection.sampling)
            self.scorers[axis] = HfScorer(
                model.to(device), load_tokenizer(path), max_length=max_length
            )

    def rows(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Sample and score one shard."""
        config, seed = self.context.config, self.context.seed
        num_samples = config.rejection.num_samples
        with autocast(config.model, self.device):
            found = self.generator.generate(
                [prompt.prompt for prompt in prompts],
                num_samples=num_samples,
                sampling=config.rejection.sampling,
                keys=[f"{seed}/{prompt.id}" for prompt in prompts],
            )
            texts = [response.text for responses in found for response in responses]
            conversations = [prompt.prompt for prompt in prompts for _ in range(num_samples)]
            scores = {
                axis: scorer(conversations, texts).view(len(prompts), num_samples).tolist()
                for axis, scorer in self.scorers.items()
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


def _training_rows(
    context: NodeContext, winners: Sequence[Row], tokenizer: Any
) -> tuple[list[Encoded], Row]:
    """Return the encoded mixture of winners, earlier winners and demonstrations, and its counts."""
    config, settings = context.config, context.config.rejection
    share = settings.pool_share + settings.sft_share
    per_share = len(winners) / (1.0 - share)
    pool = draw_pool(
        _earlier_winners(context),
        winners,
        num_rows=round(per_share * settings.pool_share),
        seed=context.seed,
    )
    demonstrations = _demonstrations(
        context, num_rows=round(per_share * settings.sft_share), tokenizer=tokenizer
    )
    encoded = [
        encode_conversation(
            tokenizer,
            [*row["prompt"], {"role": "assistant", "content": row["response"]}],
            last_turn_only=True,
        )
        for row in [*winners, *pool]
    ]
    kept = [row for row in encoded if len(row.input_ids) <= config.model.max_length]
    counts = {
        "winners": len(winners),
        "pool": len(pool),
        "demonstrations": len(demonstrations),
        "over_long": len(encoded) - len(kept),
    }
    return [*kept, *demonstrations], counts


def _earlier_winners(context: NodeContext) -> list[Row]:
    """Return the winners of all earlier rounds, oldest round first."""
    models = context.inputs.models
    roles = sorted((role for role in models if role.startswith("pool_")), key=lambda r: int(r[5:]))
    return [row for role in roles for row in read_jsonl(Path(models[role].path) / "winners.jsonl")]


def _demonstrations(context: NodeContext, *, num_rows: int, tokenizer: Any) -> list[Encoded]:
    """Draw encoded training demonstrations that fit."""
    config = context.config
    if num_rows == 0:
        return []
    store = Store(Path(config.paths.store), config.data.stream)
    rows = [
        row
        for item in context.inputs.of_kind("sft")
        for row in store.conversations(item.id)
        if not row.heldout
    ]
    rows.sort(key=lambda row: keyed_digest(f"{context.seed}/sft/{row.id}"))
    found: list[Encoded] = []
    for row in rows:
        if len(found) == num_rows:
            break
        encoded = encode_conversation(
            tokenizer, row.messages, last_turn_only=config.sft.last_turn_only
        )
        if len(encoded.input_ids) <= config.model.max_length:
            found.append(encoded)
    return found


def _log_winners(context: NodeContext, winners: Sequence[Row], curves: Row) -> None:
    """Append the summary row and some winners; after training, whose start clears the logs."""
    row: Row = {"step": 0}
    for axis, curve in curves.items():
        row[f"{metrics.REJECTION_MAX_SCORE}/{axis}"] = curve["max"][-1]
        row[f"{metrics.REJECTION_MEDIAN_SCORE}/{axis}"] = curve["median"][-1]
    context.directory.metrics.append(row)
    for winner in winners[:NUM_SAMPLES_SHOWN]:
        context.directory.samples.append(winner)
