"""From reward-model scores to what PPO maximises, and the judge of two responses.

Shapes: B sequences, T response tokens. Scores are raw, before the sigmoid: the score columns equal
logit(R) of the paper's R in (0, 1), so no logit is ever taken (logit(sigmoid(x)) saturates).
Equations are those of the Llama 2 paper (arXiv 2307.09288), section 3.4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algo.masked import at_least_float32, whiten
from rlhf.errors import ConfigError

KL_ESTIMATORS = ("k1", "k2", "k3")
"""Schulman's names: log ratio, half its square, and ratio - 1 - log ratio."""


def below_threshold(scores_safety_B: Tensor, *, threshold: float) -> Tensor:
    """Return True where sigmoid(score) < threshold, shape [B]; NaN counts as below.

    A NaN score is thereby selected by the gate and stays visible instead of being skipped.
    """
    return ~(torch.sigmoid(at_least_float32(scores_safety_B)) >= threshold)


def gate(
    scores_helpfulness_B: Tensor,
    scores_safety_B: Tensor,
    is_safety_B: Tensor,
    *,
    threshold: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Select the raw score that counts for each response (Eq. 4, R_c).

    R_c = R_s if is_safety(p) or R_s < threshold else R_h. Returns the selected raw scores [B]
    and the mask `safety_selected_B`.
    """
    assert scores_helpfulness_B.shape == scores_safety_B.shape == is_safety_B.shape, (
        f"helpfulness {scores_helpfulness_B.shape}, safety {scores_safety_B.shape} and "
        f"is_safety {is_safety_B.shape} must match"
    )
    safety_selected_B = is_safety_B.bool() | below_threshold(scores_safety_B, threshold=threshold)
    return torch.where(safety_selected_B, scores_safety_B, scores_helpfulness_B), safety_selected_B


def combined_reward(
    scores_helpfulness_B: Tensor,
    scores_safety_B: Tensor,
    is_safety_B: Tensor,
    *,
    threshold: float = 0.15,
) -> Tensor:
    """Return whiten(logit(R_c)) over the responses that are passed, shape [B] (Eq. 4, R~_c).

    Pass the global rollout batch; a process that holds a part of it uses `gate`, `masked_moments`
    and `whiten_with` instead.
    """
    gated_B, _ = gate(scores_helpfulness_B, scores_safety_B, is_safety_B, threshold=threshold)
    return whiten(gated_B)


def no_eos_penalty(scores_B: Tensor, finished_B: Tensor, penalty: float) -> Tensor:
    """Subtract `penalty` (>= 0) from the score of every response that ended without EOS."""
    return torch.where(finished_B.bool(), scores_B, scores_B - penalty)


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) at each sampled token, same shape as `logprobs`.

    With d = log p - log p_ref: k1 = d (unbiased, may be negative), k2 = d^2 / 2 (biased),
    k3 = exp(-d) - 1 + d (unbiased, never negative).
    """
    assert logprobs.shape == ref_logprobs.shape, (
        f"logprobs {logprobs.shape} and ref_logprobs {ref_logprobs.shape} must match"
    )
    difference = at_least_float32(logprobs) - at_least_float32(ref_logprobs)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ConfigError(
        f"kl_estimator {estimator!r} is unknown: use one of {', '.join(KL_ESTIMATORS)}"
    )


def token_rewards(
    whitened_scores_B: Tensor,
    kl_per_token_BT: Tensor,
    response_mask_BT: Tensor,
    *,
    kl_coef: float,
) -> Tensor:
    """Return the reward of each response token, shape [B, T] (Eq. 4, R).

    -kl_coef * KL at every response token, plus the score at the last one (the EOS of a finished
    response). 0 outside the mask; a row without any response token stays 0 everywhere.
    """
    mask_BT = response_mask_BT.bool()
    assert kl_per_token_BT.shape == mask_BT.shape, (
        f"kl_per_token {kl_per_token_BT.shape} and mask {mask_BT.shape} must match"
    )
    assert whitened_scores_B.shape == mask_BT.shape[:1], (
        f"scores {whitened_scores_B.shape} must be one per row of the mask {mask_BT.shape}"
    )
    remaining_BT = mask_BT.flip(1).cumsum(1).flip(1)
    last_token_BT = mask_BT & (remaining_BT == 1)
    penalties_BT = torch.where(mask_BT, -kl_coef * kl_per_token_BT, 0.0)
    return torch.where(last_token_BT, penalties_BT + whitened_scores_B.unsqueeze(1), penalties_BT)


def judge_prefers(
    *,
    helpfulness_a_B: Tensor,
    helpfulness_b_B: Tensor,
    safety_a_B: Tensor,
    safety_b_B: Tensor,
    is_safety_B: Tensor,
    threshold: float = 0.15,
) -> Tensor:
    """Return 1.0 where response a wins against b, 0.5 for a tie, 0.0 where it loses, shape [B].

    Both responses answer the same prompt and are compared on one axis, by one model: safety if the
    prompt is tagged or either response falls below the gate's threshold, else helpfulness. Scores
    of different reward models are never compared with each other. NaN scores give NaN.
    """
    on_safety_B = (
        is_safety_B.bool()
        | below_threshold(safety_a_B, threshold=threshold)
        | below_threshold(safety_b_B, threshold=threshold)
    )
    a_B = at_least_float32(torch.where(on_safety_B, safety_a_B, helpfulness_a_B))
    b_B = at_least_float32(torch.where(on_safety_B, safety_b_B, helpfulness_b_B))
    verdict_B = torch.where(a_B > b_B, 1.0, torch.where(a_B < b_B, 0.0, 0.5))
    return torch.where(a_B.isnan() | b_B.isnan(), torch.nan, verdict_B)
