"""A run on the virtual cluster, driven through the command line as its users do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.lab import SlurmLab
from tiny_run import ROOT, rlhf

from rlhf.artifacts import NodeDir, sha256_file
from rlhf.compose import load_frozen
from rlhf.launch.slurm import SlurmLauncher
from rlhf.state import read_progress

SLURM = ("launcher=slurm", "launcher.grace_seconds=30", "launcher.slurm.call_seconds=5")
START = 180
"""Longest wait for a node to import its libraries and take its first steps, in seconds."""


@dataclass
class Launched:
    """A run on the virtual cluster."""

    lab: SlurmLab
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "runs" / "quickstart"

    def rlhf(self, command: str, *overrides: str, ok: bool = True) -> str:
        """Run the command line as a user of the cluster would; returns what it printed."""
        place = [f"paths.runs={self.root / 'runs'}", f"paths.store={self.root / 'store'}"]
        if command in ("launch", "run") and not self.folder.exists():
            place.append("recipe=quickstart")
        else:
            place.append("run=quickstart")
        environment = {**self.lab.environment, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        done = rlhf(command, *place, *overrides, cwd=self.root, environment=environment)
        assert not ok or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def job(self, node: str) -> str:
        """Return a node's newest job."""
        rows = self.lab.call("squeue", "-h", "--states=all", "--array", "-o", "%A %k").splitlines()
        found = [row.split()[0] for row in rows if row.endswith(f":{node}") and self.key in row]
        return max(found, key=int)

    @property
    def key(self) -> str:
        """The mark that the run's jobs carry in their comments."""
        return SlurmLauncher(load_frozen(self.folder)).key

    def states(self) -> dict[str, str]:
        """Return the state of every node's newest job."""
        rows = self.lab.call("squeue", "-h", "--states=all", "--array", "-o", "%A %K %T %k")
        found: dict[str, tuple[int, str]] = {}
        for row in rows.splitlines():
            number, index, state, comment = row.split()
            if self.key not in comment:
                continue
            node = comment.rpartition(":")[2] + (f"-{index}" if index.isdigit() else "")
            if node not in found or int(number) > found[node][0]:
                found[node] = (int(number), state)
        return {node: state for node, (_, state) in found.items()}

    def step(self, node: str) -> int:
        return int(read_progress(self.folder / node)["step"])

    def wait_for_step(self, node: str, step: int) -> None:
        self.lab.wait(lambda: self.step(node) >= step, f"step {step} of {node}", seconds=START)

    def is_done(self, node: str) -> bool:
        return NodeDir(self.folder / node).is_done()

    def wait_until_done(self, node: str) -> None:
        self.lab.wait(lambda: self.is_done(node), f"the end of {node}", seconds=START)

    def wait_until_idle(self, *, seconds: float) -> None:
        """Wait until no job of the run waits or runs."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}
        self.lab.wait(lambda: set(self.states().values()) <= ended, "all jobs", seconds=seconds)

    def dependencies(self, node: str) -> str:
        """Return the nodes whose jobs a node's job has to wait for, joined."""
        text = self.lab.call("scontrol", "show", "job", self.job(node), "-o")
        waits = next(field for field in text.split() if field.startswith("Dependency="))
        rows = self.lab.call("squeue", "-h", "--states=all", "--array", "-o", "%A %k").splitlines()
        return " ".join(row.split()[1] for row in rows if row.split()[0] in waits)

    def weights(self, node: str) -> str:
        return sha256_file(self.folder / node / "model" / "model.safetensors")

    def log(self, node: str) -> str:
        return (self.folder / node / "log.txt").read_text()
