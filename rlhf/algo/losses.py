"""Losses of the reward models, the policy and the critic.

Shapes: B comparisons or sequences, T response tokens. Masks are True where the element counts.
Equations and tables are those of the Llama 2 paper (arXiv 2307.09288).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from rlhf.algo.masked import at_least_float32, masked_sum, masked_var
from rlhf.errors import ConfigError, DataError


def _table(
    significantly_better: float, better: float, slightly_better: float, negligibly_better: float
) -> Mapping[str, float]:
    return MappingProxyType(
        {
            "significantly_better": significantly_better,
            "better": better,
            "slightly_better": slightly_better,
            "negligibly_better": negligibly_better,
        }
    )


MARGINS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "none": _table(0.0, 0.0, 0.0, 0.0),
        "small": _table(1.0, 2.0 / 3.0, 1.0 / 3.0, 0.0),
        "large": _table(3.0, 2.0, 1.0, 0.0),
    }
)
"""m(strength) for each margin table (Table 27)."""


def margin_for(strength: str | None, table: str, tie: bool = False) -> float:
    """Return the margin m(r) of a comparison (Table 27).

    Ungraded comparisons (`strength` None) and ties have margin 0. Raises ConfigError for an unknown
    table and DataError for an unknown strength.
    """
    if table not in MARGINS:
        raise ConfigError(f"margin table {table!r} is unknown: use one of {', '.join(MARGINS)}")
    if strength is None:
        return 0.0
    margins = MARGINS[table]
    if strength not in margins:
        raise DataError(
            f"strength {strength!r} is unknown: use one of {', '.join(margins)}, "
            "or null for an ungraded comparison"
        )
    return 0.0 if tie else margins[strength]


def ranking_loss(chosen_scores_B: Tensor, rejected_scores_B: Tensor, margins_B: Tensor) -> Tensor:
    """Return the ranking loss of each comparison, shape [B] (Eq. 2).

    L = -log sigmoid(r(chosen) - r(rejected) - m(strength)); margin 0 gives Eq. 1.
    """
    shapes = [tuple(x.shape) for x in (chosen_scores_B, rejected_scores_B, margins_B)]
    # A [B, 1] score minus a [B] margin would broadcast to [B, B] without an error.
    assert all(len(shape) == 1 and shape == shapes[0] for shape in shapes), (
        f"chosen, rejected and margins must be 1-D and equally long, got {shapes}"
    )
    gaps_B = at_least_float32(chosen_scores_B) - at_least_float32(rejected_scores_B)
    return -logsigmoid(gaps_B - margins_B)


def safety_auxiliary_loss(
    scores_B: Tensor, safe_labels_B: Tensor, labelled_mask_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return sum and count of the safety cross-entropy over labelled responses.

    BCE(sigmoid(score), safe) pins the zero of the safety score. The paper prints only the ablation
    of its auxiliary loss (Table 29), not its formula. `scores_B` are raw; one element per response,
    so chosen and rejected sides are concatenated by the caller.
    """
    shapes = [tuple(x.shape) for x in (scores_B, safe_labels_B, labelled_mask_B)]
    assert all(len(shape) == 1 and shape == shapes[0] for shape in shapes), (
        f"scores, labels and mask must be 1-D and equally long, got {shapes}"
    )
    labelled_B = labelled_mask_B.bool()
    scores_B = at_least_float32(scores_B)
    # A missing label may be any number; 0 keeps the unused element finite.
    targets_B = torch.where(labelled_B, safe_labels_B.to(scores_B.dtype), 0.0)
    losses_B = binary_cross_entropy_with_logits(scores_B, targets_B, reduction="none")
    return masked_sum(losses_B, labelled_B), labelled_B.sum()


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    response_mask_BT: Tensor,
    *,
    clip_range: float,
    normalizer: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return PPO's clipped policy loss, and token sums of clipfrac and approx_kl.

    With ratio = exp(logprobs - old_logprobs) and A the advantage (Schulman et al. 2017, Eq. 7),
    loss = sum over tokens of max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) / normalizer.
    `normalizer` is the number of response tokens of the *global* minibatch, so the losses of its
    micro-batches add up to the same value however it is split. clipfrac counts tokens whose loss
    the clip changes; approx_kl is k3 = ratio - 1 - log ratio. Both are detached.
    """
    mask_BT = response_mask_BT.bool()
    log_ratio_BT = at_least_float32(logprobs_BT) - at_least_float32(old_logprobs_BT)
    # Masked before exp: an overflow at a padded position would put NaN into the gradient.
    log_ratio_BT = torch.where(mask_BT, log_ratio_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = masked_sum(torch.maximum(plain_BT, clipped_BT), mask_BT) / normalizer
    with torch.no_grad():
        clipfrac_sum = masked_sum((clipped_BT > plain_BT).to(ratio_BT.dtype), mask_BT)
        approx_kl_sum = masked_sum(log_ratio_BT.expm1() - log_ratio_BT, mask_BT)
    return loss, clipfrac_sum, approx_kl_sum


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    response_mask_BT: Tensor,
    *,
    value_clip_range: float,
    normalizer: Tensor | float,
) -> Tensor:
    """Return the clipped critic loss, a scalar.

    0.5 * sum of max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / normalizer, with
    `normalizer` as in `policy_loss`. An infinite `value_clip_range` turns the clip off.
    """
    mask_BT = response_mask_BT.bool()
    values_BT, old_values_BT = at_least_float32(values_BT), at_least_float32(old_values_BT)
    clipped_BT = values_BT.clamp(old_values_BT - value_clip_range, old_values_BT + value_clip_range)
    # Masked before the square: NaN at a padded position would put NaN into the gradient.
    error_BT = torch.where(mask_BT, values_BT - returns_BT, 0.0)
    clipped_error_BT = torch.where(mask_BT, clipped_BT - returns_BT, 0.0)
    worse_BT = torch.maximum(error_BT.square(), clipped_error_BT.square())
    return 0.5 * masked_sum(worse_BT, mask_BT) / normalizer


def explained_variance(values_BT: Tensor, returns_BT: Tensor, response_mask_BT: Tensor) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns) over the mask, a scalar.

    1 is a perfect critic, 0 one that knows only the mean; NaN where the returns do not vary.
    """
    spread = masked_var(returns_BT, response_mask_BT)
    unexplained = masked_var(returns_BT - values_BT, response_mask_BT)
    return torch.where(spread > 0, 1.0 - unexplained / spread, torch.nan)
