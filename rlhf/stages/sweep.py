"""Sweep: which temperature the round samples at (paper Fig. 8: the best one moves with RLHF).

The round's policy answers the same prompts K times at every temperature, with the same random
numbers, and both reward models score the responses. The temperature with the best best-of-K score
is chosen; the sample and rejection nodes read it. Deviation: the paper reads the optimum off raw
scores of one reward model; here each prompt is valued by the model of its axis, on a standardised
scale, and only by responses that could win.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from rlhf.algo.intervals import clustered_bootstrap, interval_json
from rlhf.algo.selection import best_temperature, sweep_scores
from rlhf.data.split import prompt_key
from rlhf.errors import StageError
from rlhf.inference.best_of import CHOICE, choose_prompts, sample_at_temperatures
from rlhf.inference.winners import Row, diversity, selection_curves, sweep_values
from rlhf.models.loading import load_tokenizer, setup_torch
from rlhf.nodes import NodeContext, node_seed

log = logging.getLogger(__name__)

REVISION = 1

CRITERION = (
    "mean over prompts of the best usable score of K responses, each prompt by the reward model of "
    "its axis, standardised per axis over all temperatures"
)


def run(context: NodeContext) -> None:
    """Write shards/ and temperature.json; StageError when the sets hold no prompt that fits."""
    config = context.config
    device = setup_torch(config.compute)
    context.directory.resume()
    seed = node_seed(config.seed, context.node.options["for"])
    tokenizer = load_tokenizer(context.inputs.models["policy"].path)
    prompts, counts = choose_prompts(
        context, tokenizer, seed=seed, at_most=config.rejection.sweep_prompts
    )
    if not prompts:
        raise StageError(
            f"none of {counts['in_store']} prompts is a training prompt that fits: ingest a prompt "
            "set, or raise model.max_length"
        )
    rows_T = sample_at_temperatures(context, prompts, tokenizer, device, seed=seed)
    context.directory.write_json(CHOICE, compare(context, rows_T))


def compare(context: NodeContext, rows_T: Sequence[Sequence[Row]]) -> Row:
    """Return temperature.json: the choice and what every temperature gave."""
    config = context.config
    temperatures = config.rejection.temperatures
    values_TP, axis_P = sweep_values(rows_T, threshold=config.gate.threshold)
    scores_TP = sweep_scores(values_TP, axis_P)
    means_T = scores_TP.mean(1).tolist()
    best = best_temperature(temperatures, means_T)
    log.info("temperature %g is chosen among %s", temperatures[best], temperatures)
    return {
        "version": context.inputs.models["policy"].name,
        "chosen": temperatures[best],
        "criterion": CRITERION,
        "num_samples": config.rejection.num_samples,
        "prompts": len(axis_P),
        "temperatures": [
            {
                "temperature": temperature,
                "chosen": index == best,
                **_measured(context, rows_T[index], scores_TP[index].tolist()),
            }
            for index, temperature in enumerate(temperatures)
        ],
    }


def _measured(context: NodeContext, rows: Sequence[Row], scores: Sequence[float]) -> dict[str, Any]:
    """Return a temperature's score with its interval, raw curves, diversity and lengths."""
    settings = context.config.evaluate
    how: dict[str, Any] = {
        "level": settings.level,
        "num_draws": settings.bootstrap_draws,
        "seed": context.seed,
    }
    clusters = [prompt_key(row["prompt"]) for row in rows]
    interval = clustered_bootstrap(scores, clusters, **how)
    responses = [response for row in rows for response in row["responses"]]
    limits = interval_json(interval, len(rows))
    return {
        "score": limits["mean"],
        "low": limits["low"],
        "high": limits["high"],
        "axes": selection_curves(rows),
        "self_bleu": diversity(rows, **how),
        "response_length": sum(row["num_tokens"] for row in responses) / len(responses),
        "finished_fraction": sum(row["finished"] for row in responses) / len(responses),
    }
