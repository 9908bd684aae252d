"""Where each node of a run stands, read from its folder alone."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.artifacts import NodeDir, read_json
from rlhf.config import Config
from rlhf.errors import ArtifactError
from rlhf.fingerprint import (
    differences,
    fingerprint,
    flat_config,
    read_flat,
    relevant,
    stage_revision,
)
from rlhf.lease import Lease, is_gone
from rlhf.nodes import Node
from rlhf.resolve import Resolver, inputs_from_json

CONFIG = "config.yaml"
PROVENANCE = "provenance.json"
INPUTS = "inputs.json"
PROGRESS = "progress.json"
LOG = "log.txt"


@dataclass(frozen=True, slots=True)
class NodeState:
    """`state` is done, running, stopped (started, then ended early) or waiting.

    `silent` is how long a running node has not reported a step, in seconds.
    """

    name: str
    state: str
    step: int
    total: int
    seconds: float
    eta: float | None
    silent: float | None = None
    peak_memory_mb: float | None = None
    """Of a finished node's largest process."""

    def to_json(self) -> dict[str, Any]:
        """Return the state as a JSON row."""
        return {name: getattr(self, name) for name in self.__slots__}


def is_started(folder: Path) -> bool:
    """Tell whether a node has resolved its inputs."""
    return (folder / INPUTS).exists()


def node_state(run_dir: Path, node: Node) -> NodeState:
    """Return where a node stands."""
    folder = run_dir / node.name
    progress = read_progress(folder)
    if NodeDir(folder).is_done():
        manifest = read_json(folder / "manifest.json")
        return NodeState(
            node.name,
            "done",
            progress["total"],
            progress["total"],
            float(manifest["wall_seconds"]),
            None,
            peak_memory_mb=manifest.get("peak_memory_mb"),
        )
    holder = Lease(folder).read() if folder.exists() else None
    running = holder is not None and not is_gone(holder, now=time.time())
    state = "running" if running else "stopped" if is_started(folder) else "waiting"
    eta, silent = (progress["eta"], _silence(folder)) if running else (None, None)
    return NodeState(
        node.name, state, progress["step"], progress["total"], progress["seconds"], eta, silent
    )


def _silence(folder: Path) -> float:
    """Return the seconds since a node's last step, or since its start where it has taken none."""
    reports = [folder / name for name in (PROGRESS, PROVENANCE)]
    times = [path.stat().st_mtime for path in reports if path.exists()]
    return max(0.0, time.time() - max(times)) if times else 0.0


def read_progress(folder: Path) -> dict[str, Any]:
    """Return progress.json; zeros when it is absent or half-written."""
    progress = {"step": 0, "total": 0, "seconds": 0.0, "eta": None}
    with suppress(FileNotFoundError, ValueError):
        progress.update(json.loads((folder / PROGRESS).read_bytes()))
    return progress


def log_tail(folder: Path, lines: int = 12) -> list[str]:
    """Return the last lines of a node's log."""
    try:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def what_changed(
    config: Config, node: Node, resolver: Resolver, *, stages: Mapping[str, str]
) -> list[str]:
    """Return how the configuration or the inputs differ from those a started node began with."""
    folder = resolver.run_dir / node.name
    provenance = read_json(folder / PROVENANCE)
    recorded = inputs_from_json(read_json(folder / INPUTS))
    module = stages[node.stage]
    try:
        inputs = resolver.refresh(node, recorded)
    except ArtifactError as error:
        return [f"inputs: {error}"]
    if fingerprint(config, node, inputs, module=module) == provenance["fingerprint"]:
        return []
    old = relevant(node.stage, read_flat(folder / CONFIG))
    found = differences(old, relevant(node.stage, flat_config(config)))
    found += [f"input {text}" for text in differences(recorded.digests(), inputs.digests())]
    revision = {"revision": stage_revision(module)}
    found += differences({"revision": provenance["revision"]}, revision)
    return found or ["the node's options or seed"]
