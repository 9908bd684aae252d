"""AdamW and its learning-rate schedule, from the configuration (paper section 3.2.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rlhf.algo.schedule import cosine_with_floor, warmup_steps
from rlhf.config import Optimizer


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float
) -> list[dict[str, Any]]:
    """Split trainable parameters into matrices, which decay, and vectors, which do not.

    The paper gives the decay only; sparing norms and biases is common practice.
    """
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]], settings: Optimizer, *, lr: float
) -> AdamW:
    """Return AdamW over the trainable ones of these parameters, in one pass over each weight.

    The states are those of any AdamW; which kernel wrote them stands in a checkpoint's groups, and
    a resumed training goes on with the same one.
    """
    return AdamW(
        parameter_groups(named_parameters, weight_decay=settings.weight_decay),
        lr=lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def build_optimizer(model: nn.Module, settings: Optimizer) -> AdamW:
    """Return AdamW over the trainable parameters of `model`."""
    return adamw(model.named_parameters(), settings, lr=settings.lr)


def lr_factor(settings: Optimizer, *, total_steps: int) -> Callable[[int], float]:
    """Return the factor on the peak learning rate for optimizer step 0, 1, ..."""
    warmup = warmup_steps(
        total_steps, fraction=settings.warmup_fraction, minimum=settings.warmup_steps_min
    )

    def factor(step: int) -> float:
        return cosine_with_floor(
            step, total_steps=total_steps, warmup_steps=warmup, floor=settings.lr_floor
        )

    return factor


def build_schedule(optimizer: AdamW, settings: Optimizer, *, total_steps: int) -> LambdaLR:
    """Return the schedule, to be stepped once after every optimizer step."""
    return LambdaLR(optimizer, lr_factor(settings, total_steps=total_steps))
