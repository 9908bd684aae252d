"""When right-padded rows need an attention mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor

CAUSAL = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures that use an attention mask for nothing but attention, which is causal."""


def padding_mask(model: Any, attention_mask_BT: Tensor) -> Tensor | None:
    """Return the mask that right-padded rows need: none where attention is causal anyway.

    No token looks ahead there, so padding on the right changes padding only; without a mask the
    faster causal kernels are taken. Sliding windows are causal, too.
    """
    return None if is_causal(model) else attention_mask_BT


def is_causal(model: Any) -> bool:
    """Tell whether no token of a model looks ahead, and no mask is used for anything else."""
    config = getattr(model, "config", None)
    is_known = getattr(config, "model_type", None) in CAUSAL
    return is_known and bool(getattr(config, "is_causal", True))
