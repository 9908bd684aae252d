"""A reward model or a judge: comparisons become a scorer for one axis (paper section 3.2.2).

A reward model starts from the promoted policy. Its head is drawn in the first round and handed on
from round to round. A judge is trained the same way on reserved comparisons of its axis alone; it
decides about promotion and is never optimised against.

Deviations: the margin table and the form of the safety auxiliary loss are configuration, because
the paper does not state which one the final models used.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlhf.algo.losses import margin_for
from rlhf.config import Config, JudgeData
from rlhf.data.corrections import open_rows
from rlhf.data.mixture import Mixture, build_mixture
from rlhf.data.records import Comparison, Kind
from rlhf.data.split import is_judge_prompt, prompt_key
from rlhf.errors import DataError
from rlhf.inference.accuracy import ScoredPair, accuracy_cells, measure, safety_detection
from rlhf.inference.comparisons import Sides, cap_by_prompt, encode, exchange, score_sides
from rlhf.inference.scoring import HfScorer
from rlhf.models.heads import copy_head
from rlhf.models.loading import (
    autocast,
    load_reward_model,
    load_tokenizer,
    save_trained,
    setup_torch,
)
from rlhf.nodes import NodeContext
from rlhf.training.reward import RankedPair, train_ranking

log = logging.getLogger(__name__)

REVISION = 2


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Everything the node may read, held-out rows included, oldest batch first."""

    batches: list[Comparison]
    open: list[Comparison]
    newest: frozenset[str]
    """Ids of this round's batches."""
    over_long: dict[str, int]
    """Comparisons left out because a side exceeds model.max_length, per axis."""


def run(context: NodeContext) -> None:
    """Train the model of the node's axis and role and measure it on held-out comparisons.

    Writes mixture.json, model/, scores.jsonl and accuracy.json; where there is a previous model,
    scores_before.jsonl and accuracy_before.json, too.
    """
    config, directory = context.config, context.directory
    device = setup_torch(config.compute)
    data = read_comparisons(context)
    log.info("comparisons over model.max_length, left out: %s", data.over_long)
    if "previous" in context.inputs.models and not is_judge(context):
        measure_before(context, data, device)
    if not directory.has("model"):
        train(context, data)
    measure_after(context, data, device)


def is_judge(context: NodeContext) -> bool:
    """Tell whether the node trains a judge and not a reward model."""
    return bool(context.node.options["role"] == "judge")


def read_comparisons(context: NodeContext) -> Comparisons:
    """Read the batches up to this round and the open comparisons, over-long ones left out.

    Length is checked before anything is mixed or capped, so that shares and caps hold for the rows
    that are really used.
    """
    store = open_rows(context)
    tokenizer = load_tokenizer(context.inputs.models["init"].path)
    entries = [e for e in context.inputs.of_kind("batch") if e.round <= context.node.round]
    over_long: Counter[str] = Counter()

    def fitting(kind: Kind, ids: Iterable[str]) -> list[Comparison]:
        rows = [row for id in ids for row in store.comparisons(kind, id)]
        kept = [
            sides.comparison for sides in encode(rows, tokenizer, context.config.model.max_length)
        ]
        over_long.update(row.axis for row in rows)
        over_long.subtract(row.axis for row in kept)
        return kept

    return Comparisons(
        batches=fitting(Kind.batch, [entry.id for entry in entries]),
        open=fitting(Kind.open, [entry.id for entry in context.inputs.of_kind("open")]),
        newest=frozenset(entry.id for entry in entries if entry.round == context.node.round),
        over_long=dict(over_long),
    )


def train(context: NodeContext, data: Comparisons) -> None:
    """Build the training rows, train, and save model/."""
    config, directory, models = context.config, context.directory, context.inputs.models
    axis = context.node.options["axis"]
    tokenizer = load_tokenizer(models["init"].path)
    mixture = choose_rows(context, data)
    directory.write_json("mixture.json", describe_mixture(context, data, mixture))
    if not mixture.rows:
        raise DataError(
            f"no {axis} comparison is left to train {context.node.name} on (over-long: "
            f"{data.over_long}): ingest more, change judge.data, or raise model.max_length"
        )
    encoded = encode(mixture.rows, tokenizer, config.model.max_length)
    # Every reward model's head but the first comes from its predecessor.
    scorer = load_reward_model(
        models["init"].path, model=config.model, new_head=True, seed=context.seed
    )
    if "previous" in models:
        copy_head(scorer, Path(models["previous"].path))
    train_ranking(
        scorer,
        tokenizer,
        [ranked(sides, table=config.reward.margin.name) for sides in encoded],
        optimizer=config.reward.optimizer,
        epochs=config.reward.epochs,
        batch_size=config.reward.batch_size,
        micro_batch_size=config.reward.micro_batch_size,
        safety_loss_weight=config.reward.safety_loss_weight if axis == "safety" else 0.0,
        config=config,
        directory=directory,
        seed=context.seed,
    )
    save_trained(scorer, tokenizer, directory)


def choose_rows(context: NodeContext, data: Comparisons) -> Mixture:
    """Return the training rows: the mixture of a reward model, or a judge's reserved rows."""
    config, axis = context.config, context.node.options["axis"]
    reserved, batches, open_rows = reserve_for_judges(data, config)
    if is_judge(context):
        own = [row for row in reserved if row.axis == axis]
        return build_mixture(
            own,
            [],
            own_share=1.0,
            seed=context.seed,
            max_comparisons=config.judge.max_comparisons,
        )
    own = [row for row in batches if row.axis == axis]
    other = [row for row in batches if row.axis != axis]
    share = config.reward.own_share_helpfulness
    if axis == "safety":
        # Open harmlessness counts as own (the paper's Anthropic Harmless); older than any batch.
        own = [row for row in open_rows if row.axis == axis] + own
        open_rows = [row for row in open_rows if row.axis != axis]
        share = config.reward.own_share_safety
    return build_mixture(
        own,
        other + open_rows,
        own_share=share,
        seed=context.seed,
        max_comparisons=config.reward.max_comparisons,
    )


def reserve_for_judges(
    data: Comparisons, config: Config
) -> tuple[list[Comparison], list[Comparison], list[Comparison]]:
    """Split what may be trained on into the judges' rows, batch rows and open rows.

    With judge.data=open a share of the open prompts is reserved; with judge.data=batches a share of
    the batches' prompts, whose open comparisons then serve nobody.
    """
    batches = [row for row in data.batches if not row.heldout]
    open_rows = [row for row in data.open if not row.heldout]

    def kept(rows: Iterable[Comparison], *, reserved: bool) -> list[Comparison]:
        share = config.judge.share
        return [row for row in rows if is_judge_prompt(row.prompt, share=share) is reserved]

    if config.judge.data is JudgeData.open:
        return kept(open_rows, reserved=True), batches, kept(open_rows, reserved=False)
    return (
        kept(batches, reserved=True),
        kept(batches, reserved=False),
        kept(open_rows, reserved=False),
    )


def ranked(sides: Sides, *, table: str) -> RankedPair:
    """Attach the margin of the strength and the safety labels."""
    row = sides.comparison
    return RankedPair(
        chosen_ids=sides.chosen_ids,
        rejected_ids=sides.rejected_ids,
        margin=margin_for(row.strength, table, row.tie),
        chosen_safe=row.chosen_safe,
        rejected_safe=row.rejected_safe,
    )


def describe_mixture(context: NodeContext, data: Comparisons, mixture: Mixture) -> dict[str, Any]:
    """Return what the model is trained on, as mixture.json says it."""
    rows = mixture.rows
    judged = {prompt_key(row.prompt) for row in reserve_for_judges(data, context.config)[0]}
    shared = sum(prompt_key(row.prompt) in judged for row in rows)
    return {
        "axis": context.node.options["axis"],
        "role": context.node.options["role"],
        "rows": len(rows),
        "own_share": mixture.own_share,
        "num_own": mixture.num_own,
        "num_other": mixture.num_other,
        "dropped_by_cap": mixture.dropped,
        "unused_other": mixture.unused_other,
        "over_long": data.over_long,
        "ties": sum(row.tie for row in rows),
        "sources": dict(sorted(Counter(row.source for row in rows).items())),
        "axes": dict(sorted(Counter(row.axis for row in rows).items())),
        "batches": dict(sorted(Counter(row.batch_id for row in rows).items())),
        "rows_with_judge_prompts": 0 if is_judge(context) else shared,
    }


def measure_before(context: NodeContext, data: Comparisons, device: torch.device) -> None:
    """Score this round's batches with the previous reward model, which never saw them."""
    if context.directory.has("accuracy_before.json"):
        return
    config = context.config
    rows = [
        row
        for row in data.batches
        if row.batch_id in data.newest and row.axis == context.node.options["axis"]
    ]
    kept = cap_by_prompt(rows, config.reward.max_heldout)
    folder = context.inputs.models["previous"].path
    pairs = score(context, folder, kept, device, swapped=False)
    context.directory.write_jsonl("scores_before.jsonl", [pair.to_json() for pair in pairs])
    context.directory.write_json("accuracy_before.json", report(context, data, pairs))


def measure_after(context: NodeContext, data: Comparisons, device: torch.device) -> None:
    """Score the held-out comparisons of the batches: both axes, twice; a judge's axis once.

    The second pass exchanges the answers: a measurement that cannot fall shows there.
    """
    directory = context.directory
    axis = context.node.options["axis"]
    heldout = [
        row for row in data.batches if row.heldout and (row.axis == axis or not is_judge(context))
    ]
    kept = cap_by_prompt(heldout, context.config.reward.max_heldout)
    pairs = score(context, str(directory.model), kept, device, swapped=not is_judge(context))
    directory.write_jsonl("scores.jsonl", [pair.to_json() for pair in pairs])
    directory.write_json("accuracy.json", report(context, data, pairs))


def score(
    context: NodeContext,
    folder: str,
    rows: Sequence[Comparison],
    device: torch.device,
    *,
    swapped: bool,
) -> list[ScoredPair]:
    """Score comparisons with the reward model in `folder`.

    With `swapped` a second pass scores the same comparisons with chosen and rejected exchanged.
    """
    config = context.config
    tokenizer = load_tokenizer(folder)
    encoded = encode(rows, tokenizer, config.model.max_length)
    model = load_reward_model(folder, model=config.model, new_head=False, seed=context.seed)
    scorer = HfScorer(model.to(device), tokenizer, max_length=config.model.max_length)
    alive, processes = context.directory.step, context.directory.processes
    with autocast(config.model, device):
        pairs = score_sides(scorer, encoded, on_chunk=alive, processes=processes)
        if not swapped:
            return pairs
        exchanged = encode(map(exchange, rows), tokenizer, config.model.max_length)
        second = score_sides(scorer, exchanged, on_chunk=alive, processes=processes)
    return [
        replace(
            pair,
            swapped_chosen_score=other.chosen_score,
            swapped_rejected_score=other.rejected_score,
        )
        for pair, other in zip(pairs, second, strict=True)
    ]


def report(context: NodeContext, data: Comparisons, pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Return cells and summary; the summary is about the model's own axis."""
    settings, axis = context.config.evaluate, context.node.options["axis"]
    how: dict[str, Any] = {
        "level": settings.level,
        "num_draws": settings.bootstrap_draws,
        "seed": context.seed,
    }
    own = [pair for pair in pairs if pair.comparison.axis == axis]
    summary = {
        "axis": axis,
        "role": context.node.options["role"],
        "round": context.node.round,
        "over_long": data.over_long,
        **measure(own, **how),
    }
    if axis == "safety":
        threshold = context.config.gate.threshold
        summary["detection"] = safety_detection(pairs, gate_threshold=threshold)
    return {"cells": accuracy_cells(pairs, **how), "summary": summary}
