"""Evaluate: the round's version against the promoted one on held-out prompts; promote or refuse.

Both versions answer the same prompts once, with the same random keys. A judge pair of reward models
that this round's rejection sampling and PPO never saw scores both answers, and so does the pair
that they did use: a gap between the two verdicts is over-optimisation. What is computed after the
decision is written never reaches it: the gold score of every answer in the toy world, all versions
under this round's judges, and PPO's held-out responses under the judges as a canary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from rlhf import metrics
from rlhf.algo.comparison import (
    PAIRS,
    Answered,
    Asked,
    Settings,
    compare,
    length_controlled_gains,
    measurements,
)
from rlhf.algo.promotion import Reason, decide, is_promoted
from rlhf.data.corrections import open_rows
from rlhf.data.prompts import by_kind, keyed_order, prompt_kind
from rlhf.data.records import AXES, Prompt
from rlhf.data.refusals import is_refusal
from rlhf.data.split import prompt_key
from rlhf.errors import DataError
from rlhf.inference.answers import (
    SIDES,
    Answer,
    Answers,
    as_tensors,
    gold_means,
    gold_values,
    response_rows,
)
from rlhf.inference.canary import PPO, Heldout, over_optimisation, read_heldout
from rlhf.inference.history import (
    ROLES,
    earlier_texts,
    version_means,
    version_rows,
    versions_table,
)
from rlhf.inference.scoring import Scorer
from rlhf.inference.tables import Scores, Table, score_tables
from rlhf.inference.versions import Version, open_scorer, open_version
from rlhf.models.loading import setup_torch
from rlhf.nodes import NodeContext

log = logging.getLogger(__name__)

REVISION = 2

SCORERS = tuple(f"{prefix}_{axis}" for prefix in PAIRS.values() for axis in AXES)

ANSWERS, VERSIONS = "answers", "versions"
"""Tables of responses: both versions' answers, and those of all versions so far."""


def run(
    context: NodeContext,
    *,
    open_version: Callable[[NodeContext, str], Version] = open_version,
    open_scorer: Callable[[NodeContext, str], Scorer] = open_scorer,
) -> None:
    """Answer, score, compare, decide; then measure what the decision does not look at.

    Writes decision.json, evaluation.json, version_scores.jsonl, over_optimisation.json (if the
    round has PPO) and responses.jsonl.
    """
    config, directory = context.config, context.directory
    setup_torch(config.compute)
    directory.resume()

    candidate = open_version(context, "candidate")
    stored = _stored_prompts(context)
    prompts = heldout_prompts(context, candidate, stored)
    answers: dict[str, Sequence[Answer]] = {}
    answers["candidate"] = _answer(context, "candidate", candidate, prompts, None)
    del candidate  # One model in memory at a time.
    promoted = open_version(context, "promoted")
    answers["promoted"] = _answer(context, "promoted", promoted, prompts, answers["candidate"])
    del promoted

    heldout = read_heldout(context, stored)
    tables = _tables(context, prompts, answers, heldout)
    wanted = {role: list(tables) if role in ROLES else [ANSWERS] for role in SCORERS}
    done = len(SIDES) * _num_shards(context, prompts)
    found = score_tables(context, tables, wanted, open_scorer=open_scorer, done=done)
    scores = {role: as_tensors(found[role][ANSWERS]) for role in SCORERS}

    asked, settings = _asked(prompts), _settings(context)
    new, old = (_answered(answers[side], scores, side) for side in SIDES)
    compared = compare(asked, new, old, settings)
    reasons = decide(measurements(compared), config.evaluate.rule)
    _write_decision(context, reasons)

    golds = gold_values(config.seed, prompts, answers) if config.toy.enabled else None
    of_judge = {role: found[role][VERSIONS] for role in ROLES}
    evaluation = {
        **{side: _version_name(context, side) for side in SIDES},
        "prompts": {kind: len(rows) for kind, rows in by_kind(prompts).items()},
        **compared,
        "length_controlled": length_controlled_gains(asked, new, old, settings),
        "versions": version_means(tables[VERSIONS], of_judge, settings),
        "gold": None if golds is None else gold_means(prompts, golds, settings),
    }
    directory.write_json("evaluation.json", evaluation)
    _write_tables(context, tables, found, heldout, settings)
    unsafe_threshold = config.evaluate.unsafe_threshold
    rows = response_rows(prompts, answers, scores, golds, unsafe_threshold=unsafe_threshold)
    directory.write_jsonl("responses.jsonl", rows)
    _log_metrics(context, compared)


def _version_name(context: NodeContext, side: str) -> str:
    if side == "candidate":
        return f"v{context.node.round}"
    return context.inputs.models["promoted"].name


def _stored_prompts(context: NodeContext) -> list[Prompt]:
    """Return the held-out prompts of all sets."""
    store = open_rows(context)
    sets = [store.prompts(item.id) for item in context.inputs.of_kind("prompts")]
    return [prompt for rows in sets for prompt in rows if prompt.heldout]


def heldout_prompts(
    context: NodeContext, version: Version, heldout: Sequence[Prompt]
) -> list[Prompt]:
    """Choose the prompts by the run's seed, so that every round is measured on the same ones.

    Raises DataError when there are none.
    """
    config = context.config
    length = config.evaluate.sampling.max_new_tokens
    fitting = version.fitting(heldout, max_new_tokens=length)
    if not fitting:
        raise DataError(
            f"the prompt sets hold {len(heldout)} held-out prompts, none of them short enough to "
            f"be answered with model.max_length={config.model.max_length}: ingest more prompts "
            "or raise model.max_length"
        )
    if len(fitting) < len(heldout):
        log.warning("left out %d over-long held-out prompts", len(heldout) - len(fitting))
    return choose_prompts(fitting, number=config.evaluate.num_prompts, seed=config.seed)


def choose_prompts(prompts: Sequence[Prompt], *, number: int, seed: int) -> list[Prompt]:
    """Take up to `number` prompts, equally many of each kind; a short kind leaves its share."""
    kinds = sorted(by_kind(prompts).values(), key=len)
    chosen: list[Prompt] = []
    for position, rows in enumerate(kinds):
        quota = (number - len(chosen)) // (len(kinds) - position)
        chosen += keyed_order(rows, seed=seed)[:quota]
    return keyed_order(chosen, seed=seed)


def _num_shards(context: NodeContext, prompts: Sequence[Prompt]) -> int:
    return math.ceil(len(prompts) / context.config.evaluate.shard_prompts)


def _answer(
    context: NodeContext,
    name: str,
    version: Version,
    prompts: Sequence[Prompt],
    candidates: Sequence[Answer] | None,
) -> list[Answer]:
    """Answer shard by shard; `candidates` are the candidate's answers, None for itself."""
    size = context.config.evaluate.shard_prompts

    def make(number: int) -> list[dict[str, Any]]:
        shard = slice(number * size, (number + 1) * size)
        rated = None if candidates is None else candidates[shard]
        return [asdict(row) for row in _answer_shard(context, version, prompts[shard], rated)]

    num_shards = _num_shards(context, prompts)
    found = context.directory.shards(
        [f"{name}-{number:05d}" for number in range(num_shards)],
        make,
        done=SIDES.index(name) * num_shards,
        total=len(SIDES) * num_shards + len(SCORERS),
    )
    return [Answer(**row) for rows in found for row in rows]


def _answer_shard(
    context: NodeContext,
    version: Version,
    prompts: Sequence[Prompt],
    candidates: Sequence[Answer] | None,
) -> list[Answer]:
    """Sample one response per prompt.

    Keys hold the run's seed and no version: both versions draw the same random numbers, and a
    version answers alike in every round.
    """
    sampling = context.config.evaluate.sampling
    messages = [prompt.prompt for prompt in prompts]
    keys = [f"{context.config.seed}/evaluate/{prompt.id}" for prompt in prompts]
    drawn = version.generate(messages, num_samples=1, sampling=sampling, keys=keys)
    responses = [response for [response] in drawn]
    candidate_ids = [row.token_ids for row in (responses if candidates is None else candidates)]
    logprobs = version.logprobs(messages, candidate_ids, temperature=sampling.temperature)
    return [
        Answer(prompt.id, row.text, row.token_ids, row.finished, logprob)
        for prompt, row, logprob in zip(prompts, responses, logprobs, strict=True)
    ]


def _tables(
    context: NodeContext,
    prompts: Sequence[Prompt],
    answers: Answers,
    heldout: Heldout | None,
) -> dict[str, Table]:
    """Return all that reward models score here; the decision rests on the first table alone."""
    texts = {
        **earlier_texts(context),
        **{
            _version_name(context, side): {row.prompt_id: row.text for row in answers[side]}
            for side in SIDES
        },
    }
    found = {
        ANSWERS: Table(prompts, {side: [row.text for row in answers[side]] for side in SIDES}),
        VERSIONS: versions_table(prompts, texts),
    }
    return found if heldout is None else {**found, PPO: heldout.table()}


def _asked(prompts: Sequence[Prompt]) -> Asked:
    return Asked(
        is_safety=[prompt.is_safety for prompt in prompts],
        is_benign=[prompt_kind(prompt) == "benign" for prompt in prompts],
        clusters=[prompt_key(prompt.prompt) for prompt in prompts],
    )


def _answered(
    answers: Sequence[Answer], scores: Mapping[str, Mapping[str, Tensor]], version: str
) -> Answered:
    return Answered(
        num_tokens=[len(answer.token_ids) for answer in answers],
        finished=[answer.finished for answer in answers],
        refused=[is_refusal(answer.text) for answer in answers],
        candidate_logprobs=[answer.candidate_logprob for answer in answers],
        scores={role: columns[version] for role, columns in scores.items()},
    )


def _settings(context: NodeContext) -> Settings:
    config = context.config.evaluate
    return Settings(
        level=config.level,
        num_draws=config.bootstrap_draws,
        seed=context.seed,
        gate_threshold=context.config.gate.threshold,
        unsafe_threshold=config.unsafe_threshold,
    )


def _write_tables(
    context: NodeContext,
    tables: Mapping[str, Table],
    scores: Mapping[str, Mapping[str, Scores]],
    heldout: Heldout | None,
    settings: Settings,
) -> None:
    """Write what is measured beside the decision: all versions, and over-optimisation in PPO."""
    of_judge = {role: scores[role][VERSIONS] for role in ROLES}
    context.directory.write_jsonl("version_scores.jsonl", version_rows(tables[VERSIONS], of_judge))
    if heldout is not None:
        canary = {axis: scores[f"judge_{axis}"][PPO] for axis in AXES}
        found = over_optimisation(context, heldout, canary, settings)
        context.directory.write_json("over_optimisation.json", found)


def _write_decision(context: NodeContext, reasons: Sequence[Reason]) -> None:
    version = f"v{context.node.round}"
    against = context.inputs.models["promoted"].name
    failed = [f"{reason.rule} ({reason.value})" for reason in reasons if not reason.ok]
    if failed:
        log.info("%s is refused: %s does not hold", version, ", ".join(failed))
    else:
        log.info("%s is promoted over %s", version, against)
    decision = {
        "version": version,
        "against": against,
        "promoted": is_promoted(reasons),
        "reasons": [asdict(reason) for reason in reasons],
    }
    context.directory.write_json("decision.json", decision)


def _log_metrics(context: NodeContext, compared: Mapping[str, Any]) -> None:
    values = {
        metrics.EVAL_WIN_RATE: compared["win_rate"]["judge"]["all"]["mean"],
        metrics.EVAL_VIOLATION_RATE: compared["violation_rate"]["candidate"]["mean"],
        metrics.EVAL_OVER_REFUSAL_RATE: compared["over_refusal_rate"]["candidate"]["mean"],
        metrics.EVAL_KL: compared["kl"],
        metrics.EVAL_RESPONSE_LENGTH: compared["response_length"]["candidate"],
    }
    measured = {name: value for name, value in values.items() if value is not None}
    context.directory.metrics.append({"step": context.node.round, **measured})
