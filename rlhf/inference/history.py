"""All versions under one judge pair: earlier answers, scored again by this round's judges.

Scores of different reward models are never compared, so a curve over versions needs one pair for
all of them. Every round asks the same held-out prompts with the same keys; the answers of earlier
versions are read from their evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.algo.comparison import Settings, mean_value
from rlhf.artifacts import read_json, read_jsonl
from rlhf.data.corrections import drop_gone
from rlhf.data.prompts import prompt_kind
from rlhf.data.records import AXES, Prompt
from rlhf.data.split import prompt_key
from rlhf.inference.tables import Scores, Table
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


def versions_table(prompts: Sequence[Prompt], texts: Mapping[str, Mapping[str, str]]) -> Table:
    """Return every version's responses to the prompts that all of them answered."""
    shared = [p for p in prompts if all(p.id in answered for answered in texts.values())]
    names = sorted(texts, key=lambda name: (len(name), name))
    return Table(shared, {name: [texts[name][p.id] for p in shared] for name in names})


def version_means(
    table: Table, scores: Mapping[str, Scores], settings: Settings
) -> dict[str, dict[str, Any]]:
    """Return version to judge to mean score with its interval.

    `scores` are those of the table by judge. Helpfulness is read on prompts that are not tagged
    is_safety, safety on those that are.
    """
    clusters = [prompt_key(p.prompt) for p in table.prompts]
    found: dict[str, dict[str, Any]] = {name: {} for name in table.columns}
    for role in ROLES:
        of_axis = [(prompt_kind(p) == "safety") == (role == "judge_safety") for p in table.prompts]
        for name in table.columns:
            values = scores[role][name]
            found[name][role] = mean_value(values, clusters, of_axis, settings=settings)
    return found


def version_rows(table: Table, scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """Return the rows of version_scores.jsonl: every version on every prompt, under both judges."""
    return [
        {
            "version": name,
            "prompt_id": prompt.id,
            "kind": prompt_kind(prompt),
            **{role: scores[role][name][index] for role in ROLES},
        }
        for name in table.columns
        for index, prompt in enumerate(table.prompts)
    ]
