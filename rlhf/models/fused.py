"""Norms in few passes over the tensor, with a hand-written gradient.

The plain modules make twice as many passes forward and more backward, and keep several tensors of
their input's size. Weights, names and files of a model stay what they are.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Prefixes of the classes of transformers whose norms are those of Llama."""


class RmsNorm(torch.autograd.Function):
    """y = w x r with r = (mean(x^2) + eps)^-1/2 over the last dimension, of size H.

    Its gradient: with g = dL/dy, dL/dx = r w g - x r^3 mean(w g x) and dL/dw = sum of r g x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """Return y, of the shape of x."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, rstd)
        return (x * rstd).mul_(weight_H)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Return the gradients by x and by the weight, where that one learns."""
        x, weight_H, rstd = ctx.saved_tensors
        product = grad * x
        mean = (product @ weight_H).unsqueeze(-1).div_(x.shape[-1])
        grad_x = (grad * weight_H).mul_(rstd).addcmul_(x, rstd.pow(3).mul_(mean), value=-1.0)
        grad_weight_H = None
        if ctx.needs_input_grad[1]:
            grad_weight_H = rstd.flatten() @ product.reshape(-1, x.shape[-1])
        return grad_x, grad_weight_H, None


def fuse(model: nn.Module) -> None:
    """Let a freshly loaded model of a known family compute in few passes; logs who stays plain.

    Half precision is left to the plain modules, which round where the model was trained to round.
    """
    fused = 0
    for module in model.modules():
        kind: Any = type(module)
        found = _fused(kind)
        if found is not None:
            module.__class__ = found
            fused += 1
    if not fused:
        log.info("%s is of no family that can be fused: it stays plain", type(model).__name__)


@cache
def _fused(plain: Any) -> Any:
    """Return a subclass of a module's class, or None where nothing can be fused.

    To copies, wrappers and hooks its instances are what they were: nothing hangs on the instance.
    """
    is_known = plain.__name__ in [f"{family}RMSNorm" for family in FAMILIES]
    if not is_known or not plain.__module__.startswith("transformers.models."):
        return None
    return type(f"Fused{plain.__name__}", (plain,), {"forward": _norm_forward(plain)})


def _norm_forward(plain: Any) -> Any:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype is self.weight.dtype is torch.float32:
            result: Tensor = RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        else:
            result = plain.forward(self, hidden_states)
        return result

    return forward
