"""What finished nodes tell about this machine: FLOPs of their estimate over their device-seconds.

A node counts for another one of the same stage and model size that runs on the same kind of device
with as many threads. Estimates err in the same direction for nodes of one stage (expected response
lengths, padding, start-up), so that a measured rate corrects them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.artifacts import MANIFEST
from rlhf.config import Config, LauncherKind
from rlhf.cost.peak import gpu_names, is_gpu
from rlhf.provenance import cpu_model

ESTIMATE = "estimate.json"
NEWEST_RUNS = 20
"""Runs of paths.runs that are looked at, newest first: a folder of many runs stays quick."""

Key = tuple[str, int, str, int]
"""Stage, parameters, device, threads."""


@dataclass(slots=True)
class Rate:
    """Sums over finished nodes of one kind."""

    flops: float = 0.0
    seconds: float = 0.0
    nodes: int = 0

    @property
    def value(self) -> float:
        """Return FLOP/s of a device."""
        return self.flops / self.seconds


@dataclass(slots=True)
class Rates:
    """Measured rates by kind of node."""

    found: dict[Key, Rate] = field(default_factory=dict)

    def of(self, config: Config, stage: str, parameters: int) -> tuple[Rate, str] | None:
        """Return the rate for a node, and on what it was measured; None where there is none.

        Jobs run elsewhere: with another launcher than local any device counts that was measured.
        """
        threads = config.compute.num_threads
        here = device_name(config, stage)
        keys = [key for key in self.found if key[:2] == (stage, parameters) and key[3] == threads]
        if config.launcher.kind is LauncherKind.local:
            keys = [key for key in keys if key[2] == here]
        if not keys:
            return None
        key = max(keys, key=lambda key: self.found[key].nodes)
        return self.found[key], key[2]


def device_name(config: Config, stage: str) -> str:
    """Return the name of what a process of a stage computes on here."""
    names = gpu_names() if is_gpu(config, stage) else []
    return names[0] if names else cpu_model()


def measured_rates(runs: Path) -> Rates:
    """Read estimates and manifests of the newest runs in a folder."""
    rates = Rates()
    for folder in newest_runs(runs):
        for row, manifest in finished(folder):
            key = (
                row["stage"],
                row["parameters"],
                manifest["device_name"],
                manifest["num_threads"],
            )
            rate = rates.found.setdefault(key, Rate())
            rate.flops += row["flops"] * done_share(folder / row["node"], row["stage"])
            rate.seconds += manifest["device_seconds"]
            rate.nodes += 1
    return rates


def newest_runs(runs: Path) -> list[Path]:
    """Return the folders of the runs with an estimate, newest first."""
    found = [(path.stat().st_mtime, path.parent) for path in runs.glob(f"*/{ESTIMATE}")]
    return [folder for _, folder in sorted(found, reverse=True)[:NEWEST_RUNS]]


def finished(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the estimate and the manifest of every finished node of a run that measured its time.

    A file that cannot be read is passed over: a broken run must not stop another one's plan.
    """
    with suppress(OSError, ValueError):
        for row in json.loads((folder / ESTIMATE).read_bytes())["nodes"]:
            path = folder / row["node"] / MANIFEST
            if not path.exists():
                continue
            manifest = json.loads(path.read_bytes())
            if manifest.get("device_seconds", 0.0) > 0:
                yield row, manifest


def done_share(folder: Path, stage: str) -> float:
    """Return the share of the planned work that a finished node did: PPO may stop early."""
    if stage != "ppo":
        return 1.0
    with suppress(OSError, ValueError, KeyError):
        done = json.loads((folder / "ppo.json").read_bytes())["iterations"]
        return float(done / planned_iterations(folder))
    return 1.0


def planned_iterations(folder: Path) -> int:
    """Return ppo.iterations of a node's own configuration; ValueError where it is not there."""
    inside = False
    for line in (folder / "config.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            inside = line == "ppo:"
        elif inside and line.startswith("  iterations:"):
            return int(line.partition(":")[2])
    raise ValueError(f"{folder / 'config.yaml'} has no ppo.iterations")
