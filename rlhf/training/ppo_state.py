"""What PPO remembers between iterations, and its checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.config import Ppo
from rlhf.errors import ArtifactError

log = logging.getLogger(__name__)

Weights = Mapping[str, Tensor]


@dataclass(slots=True)
class PpoState:
    """Counters and decisions; plain JSON, so that a checkpoint's marker can hold it."""

    iteration: int = 0
    """Rollout batches done; the prompt position follows from it."""
    kl_to_start: float = 0.0
    """Mean sequence KL to the round's start at the last rollout, in nats."""
    heldout: list[dict[str, float]] = field(default_factory=list)
    """Held-out measurements, oldest first; the first one is the start's."""
    heldout_scale: tuple[float, float] | None = None
    """Mean and standard deviation of the first measurement's gated scores."""
    best_iteration: int = 0
    best_score: float | None = None
    without_improvement: int = 0
    first_length: float | None = None
    """Mean response length in the first iteration."""
    alarms: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the state as a checkpoint's marker holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> PpoState:
        """Read the state from a checkpoint's marker."""
        scale = row["heldout_scale"]
        return cls(**{**row, "heldout_scale": None if scale is None else (scale[0], scale[1])})

    def alarm(self, kind: str, value: float, bound: float, advice: str) -> None:
        """Record and log an alarm, once per kind."""
        if any(alarm["kind"] == kind for alarm in self.alarms):
            return
        self.alarms.append(
            {"kind": kind, "iteration": self.iteration, "value": value, "bound": bound}
        )
        log.warning(
            "alarm %s at iteration %d: %.3g against %.3g; %s",
            kind,
            self.iteration,
            value,
            bound,
            advice,
        )

    def watch(self, *, finished_fraction: float, length: float, settings: Ppo) -> None:
        """Raise the EOS and length alarms for one iteration's responses."""
        if self.first_length is None:
            self.first_length = length
        if finished_fraction < settings.eos_alarm:
            self.alarm(
                "eos",
                finished_fraction,
                settings.eos_alarm,
                "responses run into sampling.max_new_tokens",
            )
        if length > settings.length_alarm * self.first_length:
            self.alarm(
                "length",
                length / self.first_length,
                settings.length_alarm,
                "the reward models may pay for length; read samples.jsonl",
            )


def save_weights(path: Path, weights: Mapping[str, Tensor | nn.Parameter]) -> None:
    """Write tensors by name as safetensors."""
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name."""
    found: dict[str, Tensor] = load_file(path)
    return found


def load_weights(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy saved tensors into the parameters; ArtifactError unless all names and shapes match."""
    restore(read_weights(path), parameters, source=str(path))


def restore(weights: Weights, parameters: Mapping[str, nn.Parameter], *, source: str) -> None:
    """Copy tensors into the parameters; ArtifactError unless all names and shapes match."""
    odd = set(weights) ^ set(parameters)
    odd |= {n for n in weights if n in parameters and weights[n].shape != parameters[n].shape}
    if odd:
        raise ArtifactError(
            f"{source} does not fit this model: {', '.join(sorted(odd)[:5])}; "
            "delete the node's checkpoints to start it over"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return copies of the parameters on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in parameters.items()}
