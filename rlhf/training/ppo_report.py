"""Rows of metrics.jsonl, samples.jsonl and heldout.jsonl for one PPO iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlhf import metrics
from rlhf.algo.losses import explained_variance
from rlhf.algo.masked import masked_mean
from rlhf.training.rollout import Experience, Rollout

SAMPLES_PER_ITERATION = 4


def rollout_row(experience: Experience) -> dict[str, float]:
    """Return the metrics of an iteration's rollouts, means over the batch."""
    mask_BT = experience.response_mask_BT
    rollouts = experience.rollouts
    return {
        metrics.ROLLOUT_SCORE_HELPFULNESS: mean([r.score_helpfulness for r in rollouts]),
        metrics.ROLLOUT_SCORE_SAFETY: mean([r.score_safety for r in rollouts]),
        metrics.ROLLOUT_SCORE: float(experience.gated_scores_B.mean()),
        metrics.ROLLOUT_SAFETY_SELECTED: float(experience.safety_selected_B.float().mean()),
        metrics.ROLLOUT_REWARD: float(experience.token_rewards_BT.sum(1).mean()),
        metrics.ROLLOUT_KL: float(experience.kl_B.mean()),
        metrics.ROLLOUT_KL_TO_START: float(experience.kl_to_start_B.mean()),
        metrics.ROLLOUT_RESPONSE_LENGTH: float(mask_BT.sum(1).float().mean()),
        metrics.ROLLOUT_FINISHED_FRACTION: mean([r.response.finished for r in rollouts]),
        metrics.PPO_ENTROPY: float(masked_mean(experience.measured.entropies_BT, mask_BT)),
    }


def update_row(
    steps: list[dict[str, float]], experience: Experience, *, with_policy: bool
) -> dict[str, float]:
    """Return the metrics of an iteration's optimizer steps.

    Losses and gradient norms are means over the steps, clipfrac and approx_kl over their tokens.
    Policy metrics are left out while only the critic learns.
    """
    row = {metrics.PPO_VALUE_LOSS: mean([step["value_loss"] for step in steps])}
    found = explained_variance(
        experience.measured.values_BT, experience.returns_BT, experience.response_mask_BT
    )
    if math.isfinite(found):
        row[metrics.PPO_EXPLAINED_VARIANCE] = float(found)
    row[metrics.TRAIN_LR] = steps[-1]["lr"]
    if with_policy:
        tokens = sum(step["tokens"] for step in steps)
        row[metrics.PPO_POLICY_LOSS] = mean([step["policy_loss"] for step in steps])
        row[metrics.PPO_CLIPFRAC] = sum(step["clipfrac"] for step in steps) / tokens
        row[metrics.PPO_APPROX_KL] = sum(step["approx_kl"] for step in steps) / tokens
        row[metrics.PPO_FIRST_RATIO] = steps[0]["ratio"] / steps[0]["tokens"]
        row[metrics.TRAIN_GRAD_NORM] = mean([step["policy_grad_norm"] for step in steps])
    return row


def sample_rows(experience: Experience, *, iteration: int) -> list[dict[str, Any]]:
    """Return the first rollouts of an iteration, for reading."""
    return [
        {
            "step": iteration,
            "prompt_id": rollout.prompt.id,
            "prompt": rollout.prompt.prompt,
            "response": rollout.response.text,
            "finished": rollout.response.finished,
            "is_safety": rollout.prompt.is_safety,
            "score_helpfulness": rollout.score_helpfulness,
            "score_safety": rollout.score_safety,
            "kl": kl,
        }
        for rollout, kl in list(zip(experience.rollouts, experience.kl_B.tolist(), strict=True))[
            :SAMPLES_PER_ITERATION
        ]
    ]


def heldout_rows(
    rollouts: Sequence[Rollout], kls: Sequence[float], *, iteration: int
) -> list[dict[str, Any]]:
    """Return every held-out response of one scoring; `kls` are log p - log p_start, in nats."""
    return [
        {
            "iteration": iteration,
            "prompt_id": rollout.prompt.id,
            "kl_to_start": kl,
            "finished": rollout.response.finished,
            "num_tokens": len(rollout.response.token_ids),
            "text": rollout.response.text,
            "score_helpfulness": rollout.score_helpfulness,
            "score_safety": rollout.score_safety,
        }
        for rollout, kl in zip(rollouts, kls, strict=True)
    ]


def mean(values: Sequence[float]) -> float:
    """Return the plain mean."""
    return sum(values) / len(values)
