"""Evaluate: the round's version against the promoted one on held-out prompts; promote or refuse.

Both versions answer the same prompts once, with the same random keys. A judge pair of reward models
that this round's rejection sampling and PPO never saw scores both answers, and so does the pair
that they did use: a gap between the two verdicts is over-optimisation. In the toy world the gold
score of every answer is added after the decision is written.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf import metrics
from rlhf.algo.comparison import (
    PAIRS,
    Answered,
    Asked,
    Settings,
    compare,
    mean_value,
    measurements,
    rate,
)
from rlhf.algo.promotion import Reason, decide, is_promoted
from rlhf.data.corrections import open_rows
from rlhf.data.prompts import by_kind, keyed_order, prompt_kind
from rlhf.data.records import AXES, Message, Prompt
from rlhf.data.refusals import is_refusal
from rlhf.data.split import prompt_key
from rlhf.errors import DataError, StageError
from rlhf.inference.history import earlier_texts, score_versions
from rlhf.inference.scoring import Scorer
from rlhf.inference.versions import Version, open_scorer, open_version
from rlhf.models.loading import setup_torch
from rlhf.nodes import NodeContext
from rlhf.toy import World

log = logging.getLogger(__name__)

REVISION = 2

VERSIONS = ("candidate", "promoted")
SCORERS = tuple(f"{prefix}_{axis}" for prefix in PAIRS.values() for axis in AXES)

Scores = Mapping[str, Mapping[str, Tensor]]
"""Raw scores [P] by role of the reward model and by version."""


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
"""Answers by version, in the order of the prompts."""


def run(
    context: NodeContext,
    *,
    open_version: Callable[[NodeContext, str], Version] = open_version,
    open_scorer: Callable[[NodeContext, str], Scorer] = open_scorer,
) -> None:
    """Answer, score, compare, decide; writes decision.json, evaluation.json, responses.jsonl."""
    config, directory = context.config, context.directory
    setup_torch(config.compute)
    directory.resume()

    candidate = open_version(context, "candidate")
    prompts = heldout_prompts(context, candidate)
    answers: dict[str, Sequence[Answer]] = {}
    answers["candidate"] = _answer(context, "candidate", candidate, prompts, None)
    del candidate  # One model in memory at a time.
    promoted = open_version(context, "promoted")
    answers["promoted"] = _answer(context, "promoted", promoted, prompts, answers["candidate"])
    del promoted

    scores = _score(context, prompts, answers, open_scorer=open_scorer)

    asked = _asked(prompts)
    settings = _settings(context)
    compared = compare(
        asked,
        _answered(answers["candidate"], scores, "candidate"),
        _answered(answers["promoted"], scores, "promoted"),
        settings,
    )
    reasons = decide(measurements(compared), config.evaluate.rule)
    _write_decision(context, reasons)

    texts = {
        **earlier_texts(context),
        **{
            _version_name(context, side): {row.prompt_id: row.text for row in answers[side]}
            for side in VERSIONS
        },
    }
    versions = score_versions(context, prompts, texts, open_scorer=open_scorer, settings=settings)
    gold = _gold(context, prompts, answers, settings) if config.toy.enabled else None
    evaluation = {
        **{side: _version_name(context, side) for side in VERSIONS},
        "prompts": {kind: len(rows) for kind, rows in by_kind(prompts).items()},
        **compared,
        "versions": versions,
        "gold": gold,
    }
    directory.write_json("evaluation.json", evaluation)
    directory.write_jsonl("responses.jsonl", _response_rows(prompts, answers, scores))
    _log_metrics(context, compared)


def _version_name(context: NodeContext, side: str) -> str:
    if side == "candidate":
        return f"v{context.node.round}"
    return context.inputs.models["promoted"].name


def heldout_prompts(context: NodeContext, version: Version) -> list[Prompt]:
    """Choose the prompts by the run's seed, so that every round is measured on the same ones.

    Raises DataError when there are none.
    """
    config = context.config
    store = open_rows(context)
    sets = [store.prompts(item.id) for item in context.inputs.of_kind("prompts")]
    heldout = [prompt for rows in sets for prompt in rows if prompt.heldout]
    length = config.evaluate.sampling.max_new_tokens
    fitting = [p for p in heldout if version.fits(p.prompt, max_new_tokens=length)]
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

    num_shards = math.ceil(len(prompts) / size)
    found = context.directory.shards(
        [f"{name}-{number:05d}" for number in range(num_shards)],
        make,
        done=VERSIONS.index(name) * num_shards,
        total=len(VERSIONS) * num_shards + len(SCORERS),
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


def _score(
    context: NodeContext,
    prompts: Sequence[Prompt],
    answers: Answers,
    *,
    open_scorer: Callable[[NodeContext, str], Scorer],
) -> dict[str, dict[str, Tensor]]:
    """Score both versions' answers with every reward model; returns role to version to scores."""

    def make(number: int) -> list[dict[str, Any]]:
        scorer = open_scorer(context, SCORERS[number])
        candidate, promoted = _score_both(scorer, prompts, answers)
        rows = zip(candidate, promoted, strict=True)
        return [dict(zip(VERSIONS, row, strict=True)) for row in rows]

    before = len(VERSIONS) * math.ceil(len(prompts) / context.config.evaluate.shard_prompts)
    found = context.directory.shards(
        [f"scores-{role}" for role in SCORERS], make, done=before, total=before + len(SCORERS)
    )
    scores = {
        role: {name: torch.tensor([row[name] for row in rows]) for name in VERSIONS}
        for role, rows in zip(SCORERS, found, strict=True)
    }
    for role, columns in scores.items():
        if not all(bool(column.isfinite().all()) for column in columns.values()):
            raise StageError(f"{role} gave a score that is not finite: check how its training went")
    return scores


def _score_both(
    scorer: Scorer, prompts: Sequence[Prompt], answers: Answers
) -> tuple[list[float], list[float]]:
    """Score the candidate's answers and the promoted version's; equal texts get equal scores.

    Each text is scored once: in another batch its score may differ in the last digits, which would
    turn a tie into a win.
    """
    texts = {name: [answer.text for answer in answers[name]] for name in VERSIONS}
    messages: list[list[Message]] = [prompt.prompt for prompt in prompts]
    others = [i for i, text in enumerate(texts["promoted"]) if text != texts["candidate"][i]]
    scores = scorer(
        [*messages, *(messages[i] for i in others)],
        [*texts["candidate"], *(texts["promoted"][i] for i in others)],
    ).tolist()
    candidate = scores[: len(prompts)]
    promoted = list(candidate)
    for i, score in zip(others, scores[len(prompts) :], strict=True):
        promoted[i] = score
    return candidate, promoted


def _asked(prompts: Sequence[Prompt]) -> Asked:
    return Asked(
        is_safety=[prompt.is_safety for prompt in prompts],
        is_benign=[prompt_kind(prompt) == "benign" for prompt in prompts],
        clusters=[prompt_key(prompt.prompt) for prompt in prompts],
    )


def _answered(answers: Sequence[Answer], scores: Scores, version: str) -> Answered:
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


def _gold(
    context: NodeContext, prompts: Sequence[Prompt], answers: Answers, settings: Settings
) -> dict[str, Any]:
    """Return the toy world's true values of both versions, which the decision never sees."""
    world = World(context.config.seed)
    kinds = [prompt_kind(prompt) for prompt in prompts]
    mask = {kind: [found == kind for found in kinds] for kind in ("safety", "benign")}
    not_safety = [kind != "safety" for kind in kinds]
    clusters = _asked(prompts).clusters
    level = settings.level
    found = {}
    for name in VERSIONS:
        golds = [
            world.gold(prompt.prompt, answer.text)
            for prompt, answer in zip(prompts, answers[name], strict=True)
        ]
        helpfulness = [gold.helpfulness for gold in golds]
        violations = [gold.violation for gold in golds]
        over_refusals = [gold.over_refusal for gold in golds]
        found[name] = {
            "helpfulness": mean_value(helpfulness, clusters, not_safety, settings=settings),
            "violation_rate": rate(violations, clusters, mask["safety"], level=level),
            "over_refusal_rate": rate(over_refusals, clusters, mask["benign"], level=level),
        }
    return found


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


def _response_rows(
    prompts: Sequence[Prompt], answers: Answers, scores: Scores
) -> list[dict[str, Any]]:
    """Return one row per prompt: both responses and what every reward model gave them."""
    return [
        {
            "prompt_id": prompt.id,
            "kind": prompt_kind(prompt),
            "prompt": prompt.prompt,
            "responses": {name: answers[name][i].text for name in VERSIONS},
            "scores": {
                role: {name: columns[name][i].item() for name in VERSIONS}
                for role, columns in scores.items()
            },
        }
        for i, prompt in enumerate(prompts)
    ]


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
