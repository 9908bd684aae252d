"""What a node is, and what its stage receives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.artifacts import NodeDir
from rlhf.config import Config


@dataclass(frozen=True, slots=True)
class Node:
    """One stage in a run's plan.

    `inputs` maps a role to a symbol that is resolved when the node starts: `model` (the base),
    `promoted(k)`, `version(k)`, `output(NODE)`, `batches(k)` (all batches up to round k),
    `set(KIND)`. `options` are the stage's own switches, for example `{"axis": "safety"}`.
    """

    name: str
    stage: str
    round: int
    after: tuple[str, ...]
    inputs: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the node as it is written to plan.json."""
        return {
            "name": self.name,
            "stage": self.stage,
            "round": self.round,
            "after": list(self.after),
            "inputs": dict(self.inputs),
            "options": dict(self.options),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Node:
        """Read a node from plan.json."""
        return cls(
            name=row["name"],
            stage=row["stage"],
            round=row["round"],
            after=tuple(row["after"]),
            inputs=dict(row["inputs"]),
            options=dict(row["options"]),
        )


@dataclass(frozen=True, slots=True)
class ModelInput:
    """A model a node reads: its folder, the version or node it came from, its manifest digest."""

    path: str
    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class DataInput:
    """An ingested batch or set a node reads; `digest` covers the accepted rows."""

    kind: str
    id: str
    digest: str
    round: int = 0


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything a node reads, resolved; written to inputs.json and reused on resume."""

    models: Mapping[str, ModelInput]
    data: tuple[DataInput, ...]
    as_of: int = 0
    """Number of the stream as of which the rows are read: later corrections do not count."""

    def digests(self) -> dict[str, str]:
        """Return role or kind/id to digest, as recorded in the manifest."""
        found = {role: model.digest for role, model in self.models.items()}
        found.update({f"{item.kind}/{item.id}": item.digest for item in self.data})
        return dict(sorted(found.items()))

    def of_kind(self, kind: str) -> tuple[DataInput, ...]:
        """Return the batches or sets of one kind, in plan order."""
        return tuple(item for item in self.data if item.kind == kind)


@dataclass(frozen=True, slots=True)
class NodeContext:
    """What the runner hands to `stages.<stage>.run`."""

    config: Config
    node: Node
    inputs: Inputs
    directory: NodeDir
    seed: int


def node_seed(seed: int, name: str) -> int:
    """Derive a node's seed from the run's seed and the node's name (stable over processes)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=6).digest(), "big")
