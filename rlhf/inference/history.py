"""All versions under one judge pair: earlier answers, scored again by this round's judges.

Scores of different reward models are never compared, so a curve over versions needs one pair for
all of them. Every round asks the same held-out prompts with the same keys; the answers of earlier
versions are read from their evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.algo.comparison import Settings, mean_value
from rlhf.artifacts import read_json, read_jsonl
from rlhf.data.corrections import drop_gone
from rlhf.data.prompts import prompt_kind
from rlhf.data.records import AXES, Prompt
from rlhf.data.split import prompt_key
from rlhf.inference.scoring import Scorer
from rlhf.nodes import NodeContext

ROLES = tuple(f"judge_{axis}" for axis in AXES)
HISTORY = "history_"
"""Prefix of the roles that name earlier evaluations."""


def earlier_texts(context: NodeContext) -> dict[str, dict[str, str]]:
    """Return version to prompt id to response, for every version an earlier round evaluated."""
    found: dict[str, dict[str, str]] = {}
    roles = [role for role in context.inputs.models if role.startswith(HISTORY)]
    for role in sorted(roles, key=lambda name: int(name.removeprefix(HISTORY))):
        folder = Path(context.inputs.models[role].path)
        evaluation = read_json(folder / "evaluation.json")
        rows = drop_gone(context, read_jsonl(folder / "responses.jsonl"))
        for side in ("candidate", "promoted"):
            texts = {row["prompt_id"]: row["responses"][side] for row in rows}
            found.setdefault(evaluation[side], texts)
    return found


def score_versions(
    context: NodeContext,
    prompts: Sequence[Prompt],
    texts: Mapping[str, Mapping[str, str]],
    *,
    open_scorer: Callable[[NodeContext, str], Scorer],
    settings: Settings,
) -> dict[str, dict[str, Any]]:
    """Return version to judge to mean score with its interval, over prompts all versions answered.

    Helpfulness is read on prompts that are not tagged is_safety, safety on those that are.
    """
    shared = [p for p in prompts if all(p.id in answered for answered in texts.values())]
    clusters = [prompt_key(p.prompt) for p in shared]
    names = sorted(texts, key=lambda name: (len(name), name))
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    scored = context.directory.shards(
        [f"versions-{role}" for role in ROLES],
        lambda number: _score_each_once(open_scorer(context, ROLES[number]), shared, texts),
    )
    for role, saved in zip(ROLES, scored, strict=True):
        of_axis = [(prompt_kind(p) == "safety") == (role == "judge_safety") for p in shared]
        for name in names:
            values = [row[name] for row in saved]
            found[name][role] = mean_value(values, clusters, of_axis, settings=settings)
    return found


def _score_each_once(
    scorer: Scorer, prompts: Sequence[Prompt], texts: Mapping[str, Mapping[str, str]]
) -> list[dict[str, float]]:
    """Return one row per prompt, version to score; equal answers to a prompt get equal scores.

    In another batch the score of a text may differ in the last digits.
    """
    pairs = [(i, answered[p.id]) for answered in texts.values() for i, p in enumerate(prompts)]
    distinct = list(dict.fromkeys(pairs))
    scores = scorer([prompts[i].prompt for i, _ in distinct], [text for _, text in distinct])
    score_of = dict(zip(distinct, scores.tolist(), strict=True))
    return [
        {name: score_of[i, answered[p.id]] for name, answered in texts.items()}
        for i, p in enumerate(prompts)
    ]
