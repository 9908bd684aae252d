"""Generalised advantage estimation. Shapes: B sequences, T response tokens."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def gae(
    token_rewards_BT: Tensor,
    values_BT: Tensor,
    response_mask_BT: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, both [B, T], 0 outside the mask and without gradient.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}
    (Schulman et al. 2016, Eq. 16); returns = A + V. `values_BT[:, t]` is the critic's value of the
    state in which token t is chosen. After the last response token the value is 0, whether the
    response ended by EOS or by the length limit. Rows are right-padded: the mask of a row is one
    run of True.
    """
    mask_BT = response_mask_BT.bool()
    assert token_rewards_BT.shape == values_BT.shape == mask_BT.shape, (
        f"rewards {token_rewards_BT.shape}, values {values_BT.shape} and mask {mask_BT.shape} "
        "must match"
    )
    run_starts_B = (mask_BT[:, 1:] & ~mask_BT[:, :-1]).sum(1) + mask_BT[:, :1].sum(1)
    assert bool((run_starts_B <= 1).all()), "the mask of a row must be one run of True"
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B = torch.zeros_like(values_BT[:, 0])
    next_advantage_B = torch.zeros_like(next_value_B)
    for t in reversed(range(values_BT.shape[1])):
        delta_B = token_rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = delta_B + gamma * gae_lambda * next_advantage_B
        # Padding carries nothing back; a leading prompt part gets nothing forward.
        next_advantage_B = torch.where(mask_BT[:, t], next_advantage_B, 0.0)
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = next_advantage_B
    return advantages_BT, advantages_BT + values_BT
