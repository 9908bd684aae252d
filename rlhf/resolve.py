"""From symbols to files: what a node reads, looked up in its parents' manifests.

| symbol | stands for |
|---|---|
| `model` | the base model, `model.path` |
| `version(k)` | the model that round k made; version 0 is the fine-tuned one |
| `promoted(k)` | the version that counts as promoted after round k |
| `output(NODE)` | the model of a node |
| `node(NODE)` | the whole folder of a node |
| `path(AXIS)` | the existing reward model given by `reward.path` |
| `batches(k)` | the batches of all rounds up to k |
| `set(KIND)` | every set of a kind in the run's stream |

A node resolves once, when it starts; inputs.json keeps the answer, and a resumed node reads it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.artifacts import NodeDir, digest_json, read_json, sha256_file, write_json
from rlhf.config import Config
from rlhf.data.tombstones import digest_as_of
from rlhf.errors import ArtifactError, ConfigError
from rlhf.nodes import DataInput, Inputs, ModelInput, Node
from rlhf.plan import Listing, Plan, parse_symbol
from rlhf.versions import promoted_version

TOY = "toy"
UNREAD = ("adapter/", "shards/")
"""Parts of a node's folder that no other node reads as tables."""
DIGESTS = "external_models.json"
"""Digests of models from outside the run, so that large files are read once."""


class Resolver:
    """Looks up the symbols of one run."""

    def __init__(self, config: Config, plan: Plan, run_dir: Path, listing: Listing) -> None:
        self.config = config
        self.plan = plan
        self.run_dir = run_dir
        self.listing = listing

    def resolve(self, node: Node) -> Inputs:
        """Look up everything a node reads; raises ArtifactError when a parent is not done."""
        models: dict[str, ModelInput] = {}
        data: list[DataInput] = []
        as_of = self.plan.rows_as_of(node.round)
        for role, symbol in node.inputs.items():
            name, argument = parse_symbol(symbol)
            if name == "batches":
                data += self._batches(int(argument), as_of)
            elif name == "set":
                data += [
                    DataInput(argument, key, self._digest(argument, key, as_of))
                    for key in self.listing[argument]
                ]
            else:
                models[role] = self.model(symbol)
        return Inputs(models, tuple(data), as_of)

    def refresh(self, node: Node, recorded: Inputs) -> Inputs:
        """Look up the same inputs again: models anew, batches and sets as they were recorded.

        A set that was ingested after the node started is not part of it, and neither is a later
        correction or withdrawal.
        """
        models = {
            role: self.model(symbol)
            for role, symbol in node.inputs.items()
            if parse_symbol(symbol)[0] not in ("batches", "set")
        }
        data = tuple(
            replace(item, digest=self._digest(item.kind, item.id, recorded.as_of))
            for item in recorded.data
        )
        return Inputs(models, data, recorded.as_of)

    def model(self, symbol: str) -> ModelInput:
        """Look up one model; raises ArtifactError when the node that makes it is not done."""
        name, argument = parse_symbol(symbol)
        if name == "model":
            return self._external(self.config.model.path, "base")
        if name == "path":
            path = getattr(self.config.reward.path, argument)
            return self._external(path, f"reward.path.{argument}")
        if name == "promoted":
            return self.model(f"version({promoted_version(self.run_dir, int(argument))[1:]})")
        if name == "version":
            made_by = self.plan.improves(int(argument))
            if not made_by:
                return self._external(self.config.model.path, "v0")
            return self._node(made_by, label=f"v{argument}", whole=False)
        return self._node(argument, label=argument, whole=name == "node")

    def _node(self, name: str, *, label: str, whole: bool) -> ModelInput:
        folder = NodeDir(self.run_dir / name)
        digest = folder.manifest()["digest"]
        return ModelInput(str(folder.path if whole else folder.model), label, digest)

    def _batches(self, round_: int, as_of: int) -> list[DataInput]:
        return [
            DataInput("batch", key, self._digest("batch", key, as_of), item.round)
            for item in self.plan.rounds
            if item.round <= round_
            for key in item.batches
        ]

    def _digest(self, kind: str, key: str, as_of: int) -> str:
        if key not in self.listing[kind]:
            raise ArtifactError(
                f"{kind} {key} is gone from data.stream={self.config.data.stream} in "
                f"paths.store={self.config.paths.store}: ingest its file again"
            )
        return digest_as_of(self.listing, kind, key, as_of)

    def _external(self, path: str, name: str) -> ModelInput:
        if path == TOY:
            return ModelInput(TOY, name, digest_json({TOY: self.config.seed}))
        return ModelInput(path, name, external_digest(Path(path), self.run_dir / DIGESTS))


def check_external_models(config: Config) -> None:
    """Refuse model folders that do not exist; raises ConfigError naming the key."""
    paths = {
        "model.path": config.model.path,
        "reward.path.helpfulness": config.reward.path.helpfulness,
        "reward.path.safety": config.reward.path.safety,
    }
    for key, path in paths.items():
        if path is None or (path == TOY and key == "model.path"):
            continue
        if not (Path(path) / "config.json").is_file():
            raise ConfigError(
                f"{key}={path} is not a model folder (no config.json in it): "
                "give the folder of a Hugging Face model"
            )


def external_digest(folder: Path, cache: Path) -> str:
    """Return the digest of a model folder from outside the run; the cache spares rereading."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise ArtifactError(f"{folder} holds no model: restore it or correct model.path")
    stats = {str(path.relative_to(folder)): path.stat() for path in files}
    key = digest_json(
        {"folder": str(folder), "files": {n: [s.st_size, s.st_mtime_ns] for n, s in stats.items()}}
    )
    known: dict[str, str] = read_json(cache) if cache.exists() else {}
    if key not in known:
        digest = digest_json({str(path.relative_to(folder)): sha256_file(path) for path in files})
        known[key] = digest
        if cache.parent.exists():
            write_json(cache, known)
    return known[key]


def verify(inputs: Inputs, run_dir: Path) -> None:
    """Check the sha256 of every file a node is about to read from other nodes of its run.

    Raises ArtifactError naming the first file that changed since its manifest was written.
    """
    for model in inputs.models.values():
        path = Path(model.path)
        if not path.is_relative_to(run_dir):
            continue
        is_model = path.name == "model"
        folder = NodeDir(path.parent if is_model else path)
        for name, entry in folder.manifest()["files"].items():
            # Weights are read through a node's model, never through its whole folder.
            is_read = is_model == name.startswith("model/") and not name.startswith(UNREAD)
            if is_read and sha256_file(folder.path / name) != entry["sha256"]:
                raise ArtifactError(
                    f"{folder.path / name} changed after its node was done: restore it, or delete "
                    f"{folder.path} and run again"
                )


def inputs_to_json(inputs: Inputs) -> dict[str, Any]:
    """Return the inputs as they are written to inputs.json."""
    return {
        "models": {
            role: {"path": item.path, "name": item.name, "digest": item.digest}
            for role, item in inputs.models.items()
        },
        "data": [
            {"kind": item.kind, "id": item.id, "digest": item.digest, "round": item.round}
            for item in inputs.data
        ],
        "as_of": inputs.as_of,
    }


def inputs_from_json(tree: dict[str, Any]) -> Inputs:
    """Read inputs.json."""
    models = {role: ModelInput(**row) for role, row in tree["models"].items()}
    data = tuple(DataInput(**row) for row in tree["data"])
    return Inputs(models, data, tree.get("as_of", 0))
