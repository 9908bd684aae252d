"""Norms and rotary positions in few passes over the tensor, with hand-written gradients.

The plain modules make twice as many passes forward and more backward, and keep several tensors of
their input's size. Weights, names and files of a model stay what they are.
"""

from __future__ import annotations

import logging
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Prefixes of the classes of transformers whose norms and rotations are those of Llama."""
ROTATE = "apply_rotary_pos_emb"
"""Global function by which an attention module of transformers rotates queries and keys."""


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


class Rotation(torch.autograd.Function):
    """Queries and keys [B, heads, T, D] with halves x1, x2: (x1 cos - x2 sin, x2 cos + x1 sin).

    The angles of both halves are the same.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate both by the same angles; cos and sin are broadcast over the heads."""
        ctx.save_for_backward(cos, sin)
        return _turn(queries, cos, sin, sign=1.0), _turn(keys, cos, sin, sign=1.0)

    @staticmethod
    def backward(
        ctx: Any, grad_queries: Tensor, grad_keys: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        """Rotate the gradients back."""
        cos, sin = ctx.saved_tensors
        return (
            _turn(grad_queries, cos, sin, sign=-1.0),
            _turn(grad_keys, cos, sin, sign=-1.0),
            None,
            None,
        )


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return turned


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
    known = plain.__module__.startswith("transformers.models.")
    if known and plain.__name__ in [f"{family}RMSNorm" for family in FAMILIES]:
        forward = _norm_forward(plain)
    elif known and plain.__name__ in [f"{family}Attention" for family in FAMILIES]:
        forward = _attention_forward(plain)
    else:
        return None
    return type(f"Fused{plain.__name__}", (plain,), {"forward": forward})


def _norm_forward(plain: Any) -> Any:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype is self.weight.dtype is torch.float32:
            result: Tensor = RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        else:
            result = plain.forward(self, hidden_states)
        return result

    return forward


def _attention_forward(plain: Any) -> Any:
    """Return the plain forward pass, which finds our rotation under the name of its own."""
    rotate = plain.forward.__globals__[ROTATE]

    def rotate_fused(
        queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        if queries.dtype is cos.dtype is torch.float32:
            angles = cos.unsqueeze(1), sin.unsqueeze(1)
            rotated: tuple[Tensor, Tensor] = Rotation.apply(queries, keys, *angles)
        else:
            rotated = rotate(queries, keys, cos, sin)
        return rotated

    names = {**plain.forward.__globals__, ROTATE: rotate_fused}
    forward = FunctionType(plain.forward.__code__, names, "forward", plain.forward.__defaults__)
    forward.__kwdefaults__ = plain.forward.__kwdefaults__
    return forward
