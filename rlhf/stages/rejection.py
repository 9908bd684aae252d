"""Rejection sampling: K responses a prompt, the best one becomes training data (section 3.2.3).

Sample and score shard by shard, choose a winner per prompt, then fine-tune on the winners, mixed
with winners of earlier rounds and demonstrations so that old skills stay.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf import metrics
from rlhf.artifacts import read_jsonl
from rlhf.data.chat import Encoded, encode_conversation, encode_conversations
from rlhf.data.corrections import drop_gone, open_rows
from rlhf.data.prompts import keyed_digest
from rlhf.data.records import Prompt
from rlhf.errors import StageError
from rlhf.inference.best_of import (
    Part,
    choose_prompts,
    chosen_temperature,
    sample_and_score,
)
from rlhf.inference.winners import (
    Row,
    choose_winner,
    diversity,
    draw_pool,
    ranking_axis,
    response_counts,
    selection_curves,
    winners_from,
)
from rlhf.models.loading import (
    load_policy,
    load_tokenizer,
    save_trained,
    setup_torch,
)
from rlhf.nodes import NodeContext
from rlhf.training.sft import fine_tune

log = logging.getLogger(__name__)

REVISION = 2
NUM_SAMPLES_SHOWN = 20
"""Winners written to samples.jsonl."""


def run(context: NodeContext) -> None:
    """Write shards/, winners.jsonl, selection.json and model/; StageError without any winner."""
    config, directory = context.config, context.directory
    device = setup_torch(config.compute)
    tokenizer = load_tokenizer(context.inputs.models["policy"].path)
    prompts, counts = choose_prompts(context, tokenizer, seed=context.seed)
    rows = _scored_rows(context, prompts, tokenizer, device)
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
    directory.write_jsonl("winners.jsonl", winners)
    curves = selection_curves(rows)
    pool = _pool(context, winners)
    encoded, mixture = _training_rows(context, winners, pool, tokenizer)
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
    save_trained(model, tokenizer, directory)
    without = len(rows) - len(winners)
    selection = {
        "prompts": {**counts, "without_usable_sample": without},
        "responses": response_counts(rows, threshold=threshold),
        "fine_tuning": mixture,
        "against_n": curves,
        **_origin(context, rows, prompts, pool),
    }
    directory.write_json("selection.json", selection)


def _origin(
    context: NodeContext, rows: Sequence[Row], prompts: Sequence[Prompt], pool: Sequence[Row]
) -> Row:
    """Return who sampled how, how different the samples are, and where the winners come from."""
    config, settings = context.config, context.config.evaluate
    return {
        "version": context.inputs.models["policy"].name,
        "temperature": chosen_temperature(context),
        "diversity": {
            "self_bleu": diversity(
                rows, level=settings.level, num_draws=settings.bootstrap_draws, seed=context.seed
            )
        },
        "winners_from": winners_from(
            rows,
            sources={prompt.id: prompt.source for prompt in prompts},
            pool=pool,
            num_samples=config.rejection.num_samples,
            threshold=config.gate.threshold,
        ),
    }


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


def _scored_rows(
    context: NodeContext, prompts: Sequence[Prompt], tokenizer: Any, device: torch.device
) -> list[Row]:
    """Return one row per prompt: merged from the sample nodes, or sampled here without them.

    Raises StageError when a prompt's row is missing.
    """
    models = context.inputs.models
    parts = [Path(models[role].path) for role in models if role.startswith("sampled_")]
    if not parts:
        return sample_and_score(context, prompts, tokenizer, device, seed=context.seed, part=Part())
    rows = {row["prompt_id"]: row for part in parts for row in read_jsonl(part / "responses.jsonl")}
    missing = [prompt.id for prompt in prompts if prompt.id not in rows]
    if missing:
        raise StageError(
            f"the sample nodes hold no responses to {len(missing)} of {len(prompts)} prompts, such "
            f"as {missing[0]}: delete their folders and run again"
        )
    return [rows[prompt.id] for prompt in prompts]


def _per_share(context: NodeContext, winners: Sequence[Row]) -> float:
    """Return the fine-tuning rows of which this round's winners leave the shares of the others."""
    settings = context.config.rejection
    return len(winners) / (1.0 - (settings.pool_share + settings.sft_share))


def _pool(context: NodeContext, winners: Sequence[Row]) -> list[Row]:
    """Draw earlier rounds' winners in their share."""
    share = context.config.rejection.pool_share
    return draw_pool(
        _earlier_winners(context),
        winners,
        num_rows=round(_per_share(context, winners) * share),
        seed=context.seed,
    )


def _training_rows(
    context: NodeContext, winners: Sequence[Row], pool: Sequence[Row], tokenizer: Any
) -> tuple[list[Encoded], Row]:
    """Return the encoded mixture of winners, earlier winners and demonstrations, and its counts."""
    config = context.config
    share = config.rejection.sft_share
    demonstrations = _demonstrations(
        context, num_rows=round(_per_share(context, winners) * share), tokenizer=tokenizer
    )
    answered = (
        [*row["prompt"], {"role": "assistant", "content": row["response"]}]
        for row in [*winners, *pool]
    )
    encoded = encode_conversations(tokenizer, answered, last_turn_only=True)
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
    rows = [row for role in roles for row in read_jsonl(Path(models[role].path) / "winners.jsonl")]
    return drop_gone(context, rows)


def _demonstrations(context: NodeContext, *, num_rows: int, tokenizer: Any) -> list[Encoded]:
    """Draw encoded training demonstrations that fit."""
    config = context.config
    if num_rows == 0:
        return []
    store = open_rows(context)
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
