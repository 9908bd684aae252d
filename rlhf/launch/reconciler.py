"""`rlhf launch`: submit what is missing, once or until everything is done."""

from __future__ import annotations

import fcntl
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from rlhf.artifacts import NodeDir
from rlhf.config import Config
from rlhf.errors import LauncherError
from rlhf.launch.failures import (
    CANCELLED,
    NODE_FAILURE,
    PARENT_FAILED,
    read_exits,
    remedy,
)
from rlhf.launch.jobs import Job, Launcher, reconcile
from rlhf.nodes import Node
from rlhf.state import log_tail

LOCK = "launch.lock"


class Reconciler:
    """Brings a scheduler into line with the plan of one run, again and again."""

    def __init__(
        self, config: Config, nodes: Sequence[Node], folder: Path, launcher: Launcher
    ) -> None:
        self._config, self._nodes = config, {node.name: node for node in nodes}
        self._folder, self._launcher = folder, launcher
        self._started = time.time()
        self._watched: dict[str, str] = {}
        self._ends: Counter[tuple[str, str]] = Counter()
        self.held: dict[str, str] = {}
        """Nodes that failed and are not to be started again, and how they failed."""

    def once(self) -> tuple[dict[str, Job], dict[str, str]]:
        """Submit what is missing; returns adopted jobs and new job ids, by node."""
        with launch_lock(self._folder):
            nodes = list(self._nodes.values())
            alive, submitted = reconcile(
                nodes, self._launcher, done=self._done(), held=set(self.held)
            )
        self._watched |= {name: job.id for name, job in alive.items()} | submitted
        return alive, submitted

    def follow(self, console: Console) -> None:
        """Submit, wait and retry by the policy until nothing is left that can run."""
        while True:
            alive, submitted = self.once()
            for name, job in submitted.items():
                console.print(f"{name}: job {job}", highlight=False)
            if not alive and not submitted:
                return
            time.sleep(self._config.launcher.poll_seconds)
            self._judge_ended(console)

    def _done(self) -> set[str]:
        return {name for name in self._nodes if NodeDir(self._folder / name).is_done()}

    def _judge_ended(self, console: Console) -> None:
        """Hold the nodes whose job ended without a result more often than the policy allows."""
        jobs, done = self._launcher.poll(), self._done()
        for name in list(self._watched):
            job = jobs.get(name)
            if job is not None and job.is_alive:
                continue
            del self._watched[name]
            if name in done:
                console.print(f"{name} is done", highlight=False)
                continue
            failure = self.failure_of(name, job)
            if failure == PARENT_FAILED:
                continue
            self._ends[name, failure] += 1
            allowed = getattr(self._config.launcher.retries, failure, 0)
            again = failure != CANCELLED and self._ends[name, failure] <= allowed
            console.print(f"{name}: {failure}{', starting it again' if again else ''}")
            if not again:
                self.held[name] = failure

    def failure_of(self, name: str, job: Job | None) -> str:
        """Return why a node's last job ended: its own word, else the scheduler's."""
        exits = read_exits(self._folder / name)
        if exits and exits[-1].time >= self._started:
            return exits[-1].failure
        if job is not None and job.failure:
            return job.failure
        # The scheduler has forgotten the job, or it ended well and its machine lost the files.
        return NODE_FAILURE

    def failures(self) -> str:
        """Say which nodes failed, with the end of their logs and what to do."""
        texts = []
        for name, failure in self.held.items():
            advice = remedy(failure, self._nodes[name].stage)
            tail = "\n".join(f"  {line}" for line in log_tail(self._folder / name))
            texts.append(f"node {name}: {failure}; the end of its log:\n{tail}\n{advice}")
        return "\n".join(texts)


@contextmanager
def launch_lock(folder: Path) -> Iterator[None]:
    """Keep two launches of one run apart; raises LauncherError while another one submits."""
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LauncherError(
                f"another `rlhf launch` of {folder} is submitting: wait until it has ended"
            ) from error
        yield
