"""What makes a node's result: which settings, which revision of its stage, which inputs.

A node is done for good only while its fingerprint stays the same. Settings that a stage does not
read are left out, so that changing `ppo.*` does not touch the supervised fine-tuning.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from rlhf.artifacts import digest_json
from rlhf.config import Config, leaves
from rlhf.errors import ArtifactError, ConfigError
from rlhf.nodes import Inputs, Node, node_seed

STAGE_GROUPS: Mapping[str, tuple[str, ...]] = {
    "sft": ("model", "data", "toy", "sft"),
    "reward": (
        "model",
        "data",
        "reward",
        "judge",
        "gate",
        "evaluate.level",
        "evaluate.bootstrap_draws",
        "evaluate.unsafe_threshold",
    ),
    "sweep": (
        "model",
        "data",
        "gate",
        "rejection",
        "generator",
        "evaluate.level",
        "evaluate.bootstrap_draws",
    ),
    "sample": ("model", "data", "rejection", "generator"),
    "rejection": (
        "model",
        "data",
        "sft",
        "gate",
        "rejection",
        "generator",
        "evaluate.level",
        "evaluate.bootstrap_draws",
    ),
    "ppo": ("model", "data", "gate", "ppo", "generator"),
    "evaluate": ("model", "data", "toy", "gate", "evaluate", "generator"),
    "collect": ("model", "data", "toy", "collect", "generator"),
}
"""Groups, or single settings, that a stage may read; every stage also depends on `seed`."""

PLAN_GROUPS = ("rounds",)
"""Groups that shape the plan only; what they change shows in the nodes and their inputs."""

STAGES: Mapping[str, str] = {name: f"rlhf.stages.{name}" for name in STAGE_GROUPS}
"""Module of each stage."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as dotted key to value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def flat_config(config: Config) -> dict[str, Any]:
    """Return every setting as dotted key to a JSON value."""
    return flatten(plain_tree(config))


def plain_tree(group: Any) -> dict[str, Any]:
    """Return a group's settings, or all, as YAML holds them: choices by name."""
    return {name: _plain(value) for name, value in vars(group).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return plain_tree(value) if is_dataclass(value) else value


def read_flat(path: Path) -> dict[str, Any]:
    """Return the settings of a config.yaml or run.yaml as dotted key to a JSON value."""
    return flatten(read_tree(path))


def read_tree(path: Path) -> dict[str, Any]:
    """Return the groups and settings of a config.yaml or run.yaml, values as OmegaConf reads them.

    Raises ArtifactError when there are none, or the file is damaged.
    """
    with path.open("rb") as file:
        try:
            tree = yaml.load(file, Loader=_Loader)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ArtifactError(
                f"{path} is not YAML ({reason}); restore it or start a new run"
            ) from error
    if not isinstance(tree, dict):
        raise ArtifactError(f"{path} does not hold settings; restore it or start a new run")
    return {str(name): value for name, value in tree.items()}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """OmegaConf's reader of YAML on libyaml, where that is there: ten times as fast."""

    yaml_implicit_resolvers = get_yaml_loader().yaml_implicit_resolvers

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        names = [name.value for name, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                line = node.start_mark.line + 1
                raise ConfigError(f"{name} is given twice from line {line} on: keep one of them")
        return super().construct_mapping(node, deep=deep)


@cache
def effects() -> Mapping[str, str]:
    """Return dotted key to `result` or `execution`, for every setting there is."""
    return {key: effect for key, effect, _ in leaves(Config())}


def relevant(stage: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the settings that can change what a stage produces."""
    effect = effects()
    groups = STAGE_GROUPS[stage]
    return {
        key: value
        for key, value in sorted(flat.items())
        if effect.get(key) == "result"
        and (key == "seed" or key in groups or key.partition(".")[0] in groups)
    }


def execution_only(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the settings that only say where and how fast a node runs."""
    effect = effects()
    return {key: value for key, value in sorted(flat.items()) if effect.get(key) == "execution"}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return `key: old -> new` for every setting that differs."""
    keys = sorted(old.keys() | new.keys())
    missing = "(absent)"
    return [
        f"{key}: {old.get(key, missing)} -> {new.get(key, missing)}"
        for key in keys
        if old.get(key, missing) != new.get(key, missing)
    ]


def stage_revision(module: str) -> int:
    """Read REVISION from a stage's source without importing it (stages import torch)."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ArtifactError(f"stage module {module} is missing; reinstall rlhf")
    revision = _revision_in(Path(spec.origin).read_bytes())
    if revision is None:
        raise ArtifactError(f"{spec.origin} declares no REVISION; add `REVISION = 1`")
    return revision


@cache
def _revision_in(source: bytes) -> int | None:
    """Return the REVISION that a source assigns; a process parses each source once."""
    for statement in ast.parse(source).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        if any(isinstance(target, ast.Name) and target.id == "REVISION" for target in targets):
            value = ast.literal_eval(statement.value)  # type: ignore[attr-defined]
            return int(value)
    return None


def fingerprint(config: Config, node: Node, inputs: Inputs, *, module: str) -> str:
    """Return the digest of everything a node's result follows from."""
    return digest_json(
        {
            "stage": node.stage,
            "options": dict(node.options),
            "revision": stage_revision(module),
            "seed": node_seed(config.seed, node.name),
            "config": relevant(node.stage, flat_config(config)),
            "inputs": inputs.digests(),
        }
    )
