"""One trunk with a low-rank adapter per role: PPO's five models in the memory of one.

All adapters were trained on the same merged base, the round's promoted version; whoever comes from
another base is refused. Heads are modules of their own: the language-model head is the base's, the
critic and the reward models bring a score head each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf.artifacts import atomic_folder, read_json
from rlhf.config import Lora
from rlhf.errors import ArtifactError, ConfigError
from rlhf.models.heads import read_head

POLICY = "default"
"""Name of the policy's adapter; peft writes the one with this name without a folder of its own."""
REFERENCE = "reference"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter on disk, beside the merged model that a node saved."""

    path: Path
    base: str

    @classmethod
    def beside(cls, model: str) -> AdapterFolder:
        """Return the adapter of a node's model folder; ConfigError when there is none."""
        path = Path(model).parent / "adapter"
        if not (path / CONFIG).exists():
            raise ConfigError(
                f"model.lora.enabled=true cannot work: {model} has no adapter beside it "
                f"({path}); train it with model.lora.enabled=true or set it to false"
            )
        return cls(path, str(read_json(path / CONFIG)["base_model_name_or_path"]))


def common_base(policy: str, scorers: Mapping[str, AdapterFolder]) -> str:
    """Return the base of all roles: that of the reward models' adapters.

    The policy is the base itself, or brings an adapter on it. Raises ConfigError when two roles
    have different bases.
    """
    bases = {f"{role} ({folder.path})": folder.base for role, folder in scorers.items()}
    base = next(iter(bases.values()))
    if Path(policy).resolve() != Path(base).resolve():
        bases[f"policy ({policy})"] = AdapterFolder.beside(policy).base
    if len({Path(found).resolve() for found in bases.values()}) > 1:
        listed = "; ".join(f"{role}: {found}" for role, found in bases.items())
        raise ConfigError(
            f"model.lora.enabled=true needs one base for all roles of PPO, but found {listed}; "
            "use rejection.init=promoted, or model.lora.enabled=false"
        )
    return base


class AdapterTrunk:
    """A language model whose layers hold one adapter per role, one of them at work at a time."""

    def __init__(self, model: Any, *, lora: Lora, policy: AdapterFolder | None, seed: int) -> None:
        config = _new_config(lora) if policy is None else _read_config(policy)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._wrapped = get_peft_model(model, config, adapter_name=POLICY)
        self.model = model
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._trained = {POLICY}
        if policy is not None:
            self._read(POLICY, policy)

    def add(self, role: str, folder: AdapterFolder) -> None:
        """Add a role's adapter from disk, frozen."""
        self._wrapped.add_adapter(role, _read_config(folder))
        self._read(role, folder)

    def copy(self, source: str, target: str) -> None:
        """Add `target` as a frozen copy of `source`."""
        self._wrapped.add_adapter(target, self._wrapped.peft_config[source])
        weights = self.parameters(source)
        with torch.no_grad():
            for name, parameter in self.parameters(target).items():
                parameter.copy_(weights[name])

    def train(self, *roles: str) -> None:
        """Let exactly these roles learn."""
        self._trained = set(roles)
        self._restore_gradients()

    @contextmanager
    def role(self, role: str) -> Iterator[Any]:
        """Put a role to work and give the language model; afterwards the trained roles may learn.

        peft freezes every adapter but the one at work; a gradient that is taken later would not
        reach the others.
        """
        for layer in self._layers:
            layer.set_adapter(role)
        try:
            yield self.model
        finally:
            self._restore_gradients()

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return a role's adapter weights; the names are the same for every role."""
        return {
            name.replace(f".{role}.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if ".lora_" in name and f".{role}." in name
        }

    def save(self, folder: Path) -> None:
        """Write the policy's adapter."""
        with atomic_folder(folder) as temporary:
            self._wrapped.save_pretrained(temporary, selected_adapters=[POLICY])

    def merged_weights(self, role: str) -> dict[str, Tensor]:
        """Return the plain model's weights with a role's adapter folded in; nothing is changed."""
        with torch.no_grad():
            deltas = {
                f"{name}.base_layer.weight": module.get_delta_weight(role)
                for name, module in self.model.named_modules()
                if isinstance(module, LoraLayer)
            }
            return {
                name.replace(".base_layer.", "."): value + deltas[name] if name in deltas else value
                for name, value in self.model.state_dict().items()
                if ".lora_" not in name
            }

    def merge(self) -> Any:
        """Fold the policy's adapter into the model, drop all others and return the plain model."""
        return self._wrapped.merge_and_unload(adapter_names=[POLICY])

    def _restore_gradients(self) -> None:
        for layer in self._layers:
            for name, parameter in layer.named_parameters():
                if name.startswith("lora_"):
                    parameter.requires_grad_(name.split(".")[1] in self._trained)

    def _read(self, role: str, folder: AdapterFolder) -> None:
        saved = load_file(folder.path / WEIGHTS)
        weights = {name: value for name, value in saved.items() if ".lora_" in name}
        result = set_peft_model_state_dict(self._wrapped, weights, adapter_name=role)
        if result.unexpected_keys or len(weights) != len(self.parameters(role)):
            raise ArtifactError(
                f"{folder.path} has {len(weights)} adapter weights, but the base has room for "
                f"{len(self.parameters(role))}: it belongs to another model"
            )


class AdapterScorer(nn.Module):
    """A reward model made of the trunk, its role's adapter and its own head."""

    def __init__(self, trunk: AdapterTrunk, role: str, head: nn.Module) -> None:
        super().__init__()
        # Not registered: the trunk belongs to the policy.
        self._trunk = [trunk]
        self._role = role
        self.score = head

    @property
    def config(self) -> Any:
        """Return the trunk's configuration."""
        return self._trunk[0].model.config

    @property
    def device(self) -> torch.device:
        """Return where the trunk lives."""
        device: torch.device = self._trunk[0].model.device
        return device

    def forward(self, **inputs: Any) -> Tensor:
        """Return the head's output at every token, [B, L, 1]."""
        with self._trunk[0].role(self._role) as model:
            states_BLH = model.base_model(**inputs).last_hidden_state
        scores_BL1: Tensor = self.score(states_BLH)
        return scores_BL1


def load_head(model: str, *, device: torch.device) -> nn.Linear:
    """Return the score head of a saved reward model as a module of its own."""
    weight = read_head(Path(model))
    head = nn.Linear(weight.shape[1], 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head.to(device)


def _read_config(folder: AdapterFolder) -> LoraConfig:
    config = LoraConfig.from_pretrained(folder.path)
    # Score heads are modules of their own here.
    config.modules_to_save = None
    config.inference_mode = False
    config.task_type = "CAUSAL_LM"
    return config


def _new_config(lora: Lora) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
