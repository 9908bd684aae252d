"""The score head of reward models, drawn once and copied ever after; what a policy's head is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import ArtifactError

HEAD = "score.weight"
"""Name of the head's only weight, shape [1, hidden]; the head has no bias."""


PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures whose logits are what the output layer gives: neither scaled nor capped."""


def has_plain_head(model: Any) -> bool:
    """Tell whether a language model's logits are its states times a matrix, plus perhaps a bias."""
    is_linear = type(model.get_output_embeddings()) is nn.Linear
    return is_linear and model.config.model_type in PLAIN


def init_head(model: PreTrainedModel, *, seed: int) -> None:
    """Draw the head from N(0, 1 / (hidden + 1)), as Stiennon et al. (2020) do; Llama 2 is silent.

    The draw depends on the seed alone and leaves the global RNG untouched.
    """
    weight = model.score.weight
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(weight.shape, generator=generator) * (weight.shape[1] + 1) ** -0.5
    with torch.no_grad():
        weight.copy_(drawn)


def copy_head(model: PreTrainedModel, folder: Path) -> None:
    """Replace the head by the one of the reward model in `folder`.

    Raises ArtifactError when that folder has none or its shape differs.
    """
    head = read_head(folder)
    if head.shape != model.score.weight.shape:
        raise ArtifactError(
            f"the score head of {folder} has shape {tuple(head.shape)}, the model needs "
            f"{tuple(model.score.weight.shape)}; both must come from the same base model"
        )
    with torch.no_grad():
        model.score.weight.copy_(head)


def read_head(folder: Path) -> Tensor:
    """Return the head [1, hidden] that a saved reward model holds."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            if HEAD in weights.keys():  # noqa: SIM118  (not a mapping)
                head: Tensor = weights.get_tensor(HEAD)
                return head
    raise ArtifactError(f"{folder} holds no {HEAD}; give the folder of a trained reward model")
