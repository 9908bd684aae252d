"""Reductions over masked tensors, whitening, and per-token log-probabilities.

Shapes: B sequences, T tokens, V vocabulary. Every mask is True where the element counts. What lies
outside a mask may be anything, NaN included: it never reaches a result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return `values` in float32, or unchanged where they are float64.

    Half precision has too few bits for sums over a batch; float64 stays for exact tests.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum the elements of `values` where `mask` is True; a scalar, 0 for an empty mask."""
    assert values.shape == mask.shape, f"values {values.shape} and mask {mask.shape} must match"
    # where, not a product: NaN * 0 is NaN.
    return at_least_float32(torch.where(mask.bool(), values, 0.0)).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average the elements of `values` where `mask` is True; a scalar, NaN for an empty mask."""
    return masked_sum(values, mask) / mask.bool().sum()


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Return the population variance (divisor n) of `values` where `mask` is True; a scalar."""
    values = at_least_float32(values)
    return masked_mean((values - masked_mean(values, mask)).square(), mask)


def masked_moments(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return [count, sum, sum of squares] in float64, shape [3].

    Moments of the parts of a batch add up to the moments of the batch, so a distributed caller sums
    them over its processes and whitens over the global batch with `mean_and_std` and `whiten_with`.
    """
    counted = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    assert values.shape == counted.shape, f"values {values.shape}, mask {counted.shape} must match"
    # float64 makes the mean of equal values exact, so that whitening them gives 0 and not noise.
    kept = torch.where(counted, values.detach(), 0.0).double()
    return torch.stack([counted.sum().double(), kept.sum(), kept.square().sum()])


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Turn `masked_moments` into mean and population standard deviation, float64 scalars."""
    count, total, total_of_squares = moments.unbind()
    mean = total / count
    return mean, (total_of_squares / count - mean.square()).clamp(min=0.0).sqrt()


def whiten_with(
    x: Tensor,
    mean: Tensor | float,
    std: Tensor | float,
    *,
    center: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Divide `x` by a given standard deviation; subtract the given mean iff `center`.

    `eps` is added to the variance, which keeps a batch of equal values at 0. Same shape as `x`.
    """
    wide = x.double()
    shifted = wide - mean if center else wide
    scale = (torch.as_tensor(std, dtype=torch.float64, device=x.device).square() + eps).sqrt()
    return (shifted / scale).to(at_least_float32(x).dtype)


def whiten(
    x: Tensor, mask: Tensor | None = None, *, center: bool = True, eps: float = 1e-8
) -> Tensor:
    """Scale `x` to unit variance over everything that is passed; mean 0 iff `center`.

    Same shape as `x`; 0 outside `mask`. With `center=False` the scaled mean stays in the result.
    """
    mean, std = mean_and_std(masked_moments(x, mask))
    whitened = whiten_with(x, mean, std, center=center, eps=eps)
    return whitened if mask is None else torch.where(mask.bool(), whitened, 0.0)


def token_logprobs(logits_BTV: Tensor, tokens_BT: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / temperature) at the given tokens, shape [B, T].

    `logits_BTV[:, t]` must be the logits that predict `tokens_BT[:, t]`: the caller shifts.
    """
    assert logits_BTV.shape[:-1] == tokens_BT.shape, (
        f"logits {logits_BTV.shape} must be tokens {tokens_BT.shape} plus a vocabulary dimension"
    )
    logprobs_BT: Tensor = _TokenLogprobs.apply(_scaled(logits_BTV, temperature), tokens_BT)
    return logprobs_BT


class _TokenLogprobs(torch.autograd.Function):
    """Log-probabilities with one gradient tensor; a gather and a logsumexp make three of them.

    d logprob(token) / d logits_v = [v is the token] - softmax(logits)_v.
    """

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
        """Return the log-probabilities, shape [B, T]."""
        log_z_BT = logits_BTV.logsumexp(-1)
        ctx.save_for_backward(logits_BTV, tokens_BT, log_z_BT)
        return logits_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1) - log_z_BT

    @staticmethod
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None]:
        """Return the gradient by the logits."""
        logits_BTV, tokens_BT, log_z_BT = ctx.saved_tensors
        grad_BT1 = grad_BT.unsqueeze(-1)
        grad_BTV = (logits_BTV - log_z_BT.unsqueeze(-1)).exp_().mul_(-grad_BT1)
        return grad_BTV.scatter_add_(-1, tokens_BT.unsqueeze(-1), grad_BT1), None


@torch.no_grad()
def logprobs_and_entropies(
    logits_BTV: Tensor, tokens_BT: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return `token_logprobs` and the entropy in nats of the same softmax, both [B, T].

    Both come from one normaliser. Logits of minus infinity (tokens excluded from sampling)
    contribute 0. Without gradient.
    """
    scaled_BTV = _scaled(logits_BTV, temperature)
    log_z_BT = scaled_BTV.logsumexp(-1)
    picked_BT = scaled_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1)
    logprobs_BTV = scaled_BTV - log_z_BT.unsqueeze(-1)
    probabilities_BTV = logprobs_BTV.exp()
    # 0 times the lowest number is 0, but 0 times minus infinity is NaN.
    logprobs_BTV.clamp_min_(torch.finfo(logprobs_BTV.dtype).min)
    return picked_BT - log_z_BT, -probabilities_BTV.mul_(logprobs_BTV).sum(-1)


def _scaled(logits_BTV: Tensor, temperature: float) -> Tensor:
    assert temperature > 0.0, f"temperature {temperature} must be positive"
    wide_BTV = at_least_float32(logits_BTV)
    # Dividing by 1 would cost one more copy of the largest tensor there is.
    return wide_BTV if temperature == 1.0 else wide_BTV / temperature
