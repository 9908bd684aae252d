"""Nodes with several processes, started as the runner starts them, and what came out of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import micro_models as micro
import micro_ppo
import torch
from safetensors.torch import load_file
from shared_nodes import FAULT, WEIGHTS

from rlhf.artifacts import NodeDir, read_json, read_jsonl, write_json, write_text
from rlhf.compose import freeze
from rlhf.config import Config, Paths, Precision, StageResources, Strategy, Tracking, TrackingMode
from rlhf.launch.local import PLAN, NodeServer
from rlhf.nodes import Node
from rlhf.plan import Plan
from rlhf.state import LOG
from rlhf.worker import process_environment

STAGES = dict.fromkeys(("sft", "reward", "ppo", "evaluate"), "shared_nodes")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A node that has ended, whichever way."""

    folder: Path
    code: int

    @property
    def log(self) -> str:
        """What the first process wrote."""
        return (self.folder / LOG).read_text(encoding="utf-8")

    @property
    def logs(self) -> str:
        """What all processes wrote."""
        others = sorted((self.folder / "processes").glob("*.log"))
        return self.log + "".join(path.read_text(encoding="utf-8") for path in others)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights."""
        return dict(load_file(self.folder / WEIGHTS))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metrics, without what the clock decides."""
        return [
            {name: value for name, value in row.items() if not name.startswith("time/")}
            for row in read_jsonl(self.folder / "metrics.jsonl")
        ]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The responses that PPO wrote down."""
        return read_jsonl(self.folder / "samples.jsonl")

    @property
    def directory(self) -> NodeDir:
        """The node's folder."""
        return NodeDir(self.folder)

    @property
    def digests(self) -> list[str]:
        """Each process's digest of the trained weights."""
        found: list[str] = read_json(self.folder / "digests.json")
        return found

    def done(self) -> Outcome:
        """Return this, after a look that it ended well."""
        assert self.code == 0, self.logs[-6000:]
        return self


class Cluster:
    """Starts nodes one after the other; imports are paid once."""

    def __init__(self, server: NodeServer) -> None:
        self._server = server

    def run(
        self,
        folder: Path,
        stage: str,
        *,
        processes: int,
        strategy: Strategy = Strategy.ddp,
        every_steps: int | None = None,
        fault: str = "",
        timeout_seconds: float = 60.0,
        offload: bool = False,
        bf16: bool = False,
        ppo: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Outcome:
        """Run the node of a stage in `folder`, again if it has run there before."""
        config = micro_ppo.config(**(ppo or {})) if stage == "ppo" else micro.config()
        for group in (config.rejection, config.evaluate):
            group.sampling.max_new_tokens = 6
        config.checkpoint.every_steps = every_steps
        config.paths = Paths(runs=str(folder), store=str(folder / "store"))
        config.tracking = Tracking(mode=TrackingMode.none)
        config.model.precision = Precision.bf16 if bf16 else Precision.fp32
        config.distributed.strategy = strategy
        config.distributed.offload_optimizer = offload
        config.distributed.timeout_seconds = timeout_seconds
        setattr(config.resources, stage, StageResources(processes=processes))
        run_dir = folder / config.run.replace("${recipe}", config.recipe)
        self._write(config, run_dir, Node(stage, stage, 0, (), {}, options))
        self._server.run_dir = run_dir
        self._server.start(stage, environment={FAULT: fault} if fault else {})
        ended, code = self._server.wait(lambda: None)
        assert ended == stage
        return Outcome(run_dir / stage, code)

    def _write(self, config: Config, run_dir: Path, node: Node) -> None:
        write_text(run_dir / "run.yaml", freeze(config))
        write_json(run_dir / PLAN, Plan("test", "test", (), (node,)).to_json())


def environment() -> dict[str, str]:
    """Return what the server's process needs from its start."""
    return process_environment(micro.config())


def largest_difference(a: Outcome, b: Outcome) -> float:
    """Return the largest difference between two trainings' weights, over the largest weight."""
    ours, theirs = a.weights, b.weights
    assert ours.keys() == theirs.keys()
    gap = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    return gap / max(float(value.abs().max()) for value in theirs.values())


def largest_metric_difference(a: Outcome, b: Outcome) -> float:
    """Return the largest difference between metrics, each over its largest value in a column."""
    assert [row.keys() for row in a.rows] == [row.keys() for row in b.rows]
    assert len(a.rows) > 0
    names = {name for row in a.rows for name in row}
    gaps = []
    for name in names:
        pairs = [(x[name], y[name]) for x, y in zip(a.rows, b.rows, strict=True) if name in x]
        scale = max(abs(y) for _, y in pairs) or 1.0
        gaps.append(max(abs(x - y) for x, y in pairs) / scale)
    return max(gaps)
