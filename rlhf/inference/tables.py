"""Tables of responses that reward models score: each model is opened once for all its tables.

A table holds several responses to each of its prompts, one per column. Each table is scored by a
call of its own, so that what is in one table cannot change the last digits of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.records import Prompt
from rlhf.errors import StageError
from rlhf.inference.scoring import Scorer
from rlhf.nodes import NodeContext

Scores = dict[str, list[float]]
"""Raw scores by column, in the order of the table's prompts."""


@dataclass(frozen=True, slots=True)
class Table:
    """Prompts and, by column, one response to each."""

    prompts: Sequence[Prompt]
    columns: Mapping[str, Sequence[str]]


def score_tables(
    context: NodeContext,
    tables: Mapping[str, Table],
    wanted: Mapping[str, Sequence[str]],
    *,
    open_scorer: Callable[[NodeContext, str], Scorer],
    done: int,
) -> dict[str, dict[str, Scores]]:
    """Return role to table to scores; `wanted` names the tables that each role scores.

    One shard per role, after `done` other steps of the node: what a killed node has scored is read.
    Raises StageError for a score that is no number.
    """
    roles = list(wanted)

    def make(number: int) -> list[dict[str, Any]]:
        role = roles[number]
        scorer = open_scorer(context, role)
        found = {name: score_columns(scorer, tables[name]) for name in wanted[role]}
        for name, columns in found.items():
            _refuse_non_finite(role, name, columns)
        return [
            {"table": name, "column": column, "scores": values}
            for name, columns in found.items()
            for column, values in columns.items()
        ]

    shards = context.directory.shards(
        [f"scores-{role}" for role in roles], make, done=done, total=done + len(roles)
    )
    scored: dict[str, dict[str, Scores]] = {}
    for role, rows in zip(roles, shards, strict=True):
        scored[role] = {name: {} for name in wanted[role]}
        for row in rows:
            scored[role][row["table"]][row["column"]] = row["scores"]
    return scored


def score_columns(scorer: Scorer, table: Table) -> Scores:
    """Score each distinct response to a prompt once, so that equal responses get equal scores.

    In another batch the score of a text may differ in the last digits, which would turn a tie into
    a win.
    """
    pairs = [(i, text) for texts in table.columns.values() for i, text in enumerate(texts)]
    distinct = list(dict.fromkeys(pairs))
    if not distinct:
        return {name: [] for name in table.columns}
    scores = scorer([table.prompts[i].prompt for i, _ in distinct], [text for _, text in distinct])
    score_of = dict(zip(distinct, scores.tolist(), strict=True))
    return {
        name: [score_of[i, text] for i, text in enumerate(texts)]
        for name, texts in table.columns.items()
    }


def _refuse_non_finite(role: str, table: str, columns: Scores) -> None:
    for column, values in columns.items():
        bad = sum(not math.isfinite(value) for value in values)
        if bad:
            raise StageError(
                f"{role} gave a score that is not finite to {bad} of {len(values)} responses "
                f"({table}, {column}): check how its training went"
            )
