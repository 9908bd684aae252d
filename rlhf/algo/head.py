"""The language-model head and its loss in one, a block of tokens at a time.

Shapes: N tokens, n tokens of a block, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.algo.masked import at_least_float32

LOGITS_AT_ONCE = 2**25
"""Logits of a block: 128 MB in fp32, 682 tokens of 49,152 words."""


def sum_token_logprobs(
    states_NH: Tensor, weight_VH: Tensor, tokens_N: Tensor, *, bias_V: Tensor | None = None
) -> Tensor:
    """Return the sum of log softmax(states W^T + b) at the tokens, a scalar.

    The same as the sum of `token_logprobs` of all logits, of which only a block exists at a time:
    its gradient is worked out while it does.
    """
    total: Tensor = _SumTokenLogprobs.apply(states_NH, weight_VH, bias_V, tokens_N)
    return total


class _SumTokenLogprobs(torch.autograd.Function):
    """d sum / d logits_nv = [v is token n] - softmax(logits_n)_v, times W, states and 1."""

    @staticmethod
    def forward(
        ctx: Any, states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, tokens_N: Tensor
    ) -> Tensor:
        """Return the sum, and keep its gradients by those inputs that learn."""
        learns = ctx.needs_input_grad
        grads = [
            torch.zeros_like(part) if needed and part is not None else None
            for part, needed in zip((states_NH, weight_VH, bias_V), learns, strict=False)
        ]
        total = at_least_float32(states_NH.new_zeros(()))
        size = max(1, LOGITS_AT_ONCE // len(weight_VH))
        for start in range(0, len(tokens_N), size):
            block = slice(start, start + size)
            tokens_n1 = tokens_N[block].unsqueeze(1)
            logits_nV = at_least_float32(F.linear(states_NH[block], weight_VH, bias_V))
            log_z_n1 = logits_nV.logsumexp(-1, keepdim=True)
            total = total + (logits_nV.gather(1, tokens_n1) - log_z_n1).sum()
            if not any(learns):
                continue
            slope_nV = logits_nV.sub_(log_z_n1).exp_().neg_()
            slope_nV.scatter_add_(1, tokens_n1, torch.ones_like(log_z_n1))
            if grads[0] is not None:
                grads[0][block] = slope_nV @ weight_VH
            if grads[1] is not None:
                grads[1] += slope_nV.mT @ states_NH[block]
            if grads[2] is not None:
                grads[2] += slope_nV.sum(0)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that are there already."""
        return (*(None if part is None else part * grad for part in ctx.saved_tensors), None)
