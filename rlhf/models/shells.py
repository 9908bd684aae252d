"""Models without weights: what is left of a plain model while an engine trains its twin."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def take_over(model: nn.Module) -> Any:
    """Return a twin that holds the model's weights; the model stays as an empty shell.

    Engines change what they train for good. The shell stays plain, and `fill` makes it a model
    again. There is never a second copy of the weights.
    """
    weights = [parameter.data for parameter in model.parameters()]
    empty(model)
    twin = copy.deepcopy(model)
    for parameter, data in zip(twin.parameters(), weights, strict=True):
        parameter.data = data
    return twin


def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let a shell hold these weights, without a copy; the names are those of its parameters."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys(), "a shell takes the weights of its own twin"
    for name, parameter in parameters.items():
        parameter.data = weights[name]


def empty(model: nn.Module) -> None:
    """Drop the weights of a plain model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
