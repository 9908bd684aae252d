"""Root-mean-square norms in few passes over the tensor, with a hand-written gradient.

The plain module makes six passes forward, keeps three tensors of its input's size and needs a dozen
passes backward. Weights, names and files of a model stay what they are.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)

NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
"""Classes of transformers that compute weight * x / sqrt(mean(x^2) + variance_epsilon)."""


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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Return the gradients by x and by the weight, where that one learns."""
        x, weight_H, rstd = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            product = grad * x
            mean = (product @ weight_H).unsqueeze(-1).div_(x.shape[-1])
            grad_x = (grad * weight_H).mul_(rstd).addcmul_(x, rstd.pow(3).mul_(mean), value=-1.0)
            grad_weight_H = None
            if ctx.needs_input_grad[1]:
                grad_weight_H = rstd.flatten() @ product.reshape(-1, x.shape[-1])
        return grad_x, grad_weight_H, None


def fuse_norms(model: nn.Module) -> None:
    """Let the norms of a freshly loaded model compute in few passes; others stay and are logged."""
    found: list[Any] = [module for module in model.modules() if _is_known(type(module))]
    for module in found:
        module.__class__ = _fused(module.__class__)
    if not found:
        log.info("%s has no norm that can be fused: its own are used", type(model).__name__)


def _is_known(kind: type[nn.Module]) -> bool:
    return kind.__name__ in NORMS and kind.__module__.startswith("transformers.models.")


@cache
def _fused(plain: Any) -> Any:
    """Return a subclass of a norm's class: copies, wrappers and hooks treat it like the plain one.

    Half precision is left to the plain module, which rounds where the model was trained to round.
    """

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype is self.weight.dtype is torch.float32:
            result: Tensor = RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)
            return result
        return plain.forward(self, hidden_states)

    return type(f"Fused{plain.__name__}", (plain,), {"forward": forward})
