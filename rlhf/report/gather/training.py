"""What rejection sampling and PPO did: their artifacts whole, and metrics as columns."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf import metrics
from rlhf.report.gather.sources import Row, Run

PPO_COLUMNS = (
    "step",
    metrics.ROLLOUT_SCORE,
    metrics.ROLLOUT_SCORE_HELPFULNESS,
    metrics.ROLLOUT_SCORE_SAFETY,
    metrics.ROLLOUT_REWARD,
    metrics.ROLLOUT_KL,
    metrics.ROLLOUT_KL_TO_START,
    metrics.ROLLOUT_RESPONSE_LENGTH,
    metrics.ROLLOUT_FINISHED_FRACTION,
    metrics.ROLLOUT_SAFETY_SELECTED,
    metrics.PPO_ENTROPY,
    metrics.PPO_APPROX_KL,
    metrics.PPO_CLIPFRAC,
    metrics.PPO_EXPLAINED_VARIANCE,
    metrics.PPO_VALUE_LOSS,
    metrics.PPO_HELDOUT_SCORE,
    metrics.TIME_STEP,
)
"""Columns of PPO's metrics.jsonl that the report keeps."""


def columns(rows: Sequence[Row], names: Sequence[str]) -> Row:
    """Turn rows into one list per name that occurs in any of them; None where a row lacks it."""
    return {name: [row.get(name) for row in rows] for name in names if any(name in r for r in rows)}


def ppo(run: Run) -> list[Row]:
    """Return ppo.json of every round with PPO, and its metrics as columns in `curves`."""
    found = run.artifacts("ppo", "ppo.json")
    items = {item.name: item for item in run.of_stage("ppo")}
    for row in found:
        item = items[row["node"]]
        rows = run.rows(item, "metrics.jsonl")
        source = item.at("metrics.jsonl")
        row["curves"] = {**columns(rows, PPO_COLUMNS), "from": source, "how": "columns"}
    return found
