"""`rlhf launch`: submit what is missing, once or until everything is done."""

from __future__ import annotations

import fcntl
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from rlhf.artifacts import NodeDir
from rlhf.config import Config
from rlhf.errors import LauncherError
from rlhf.launch.failures import (
    NODE_FAILURE,
    PARENT_FAILED,
    note_submission,
    read_exits,
    remedy,
    why,
)
from rlhf.launch.jobs import Job, Launcher, reconcile
from rlhf.nodes import Node
from rlhf.state import log_tail

LOCK = "launch.lock"
MAX_SILENCES = 40
"""Looks without an answer of the scheduler before following gives up: ten minutes by default."""


class Reconciler:
    """Brings a scheduler into line with the plan of one run, again and again."""

    def __init__(
        self, config: Config, nodes: Sequence[Node], folder: Path, launcher: Launcher
    ) -> None:
        self._config, self._nodes = config, {node.name: node for node in nodes}
        self._folder, self._launcher = folder, launcher
        self._started = time.time()
        self._watched: set[str] = set()
        self._ends: Counter[tuple[str, str]] = Counter()
        self.held: dict[str, str] = {}
        """Nodes that failed and are not to be started again, and how they failed."""

    def once(self) -> tuple[dict[str, Job], dict[str, str]]:
        """Submit what is missing; returns adopted jobs and new job ids, by node."""
        with launch_lock(self._folder):
            return self._submit(self._launcher.poll(), self._done())

    def follow(self, console: Console) -> None:
        """Submit, wait and retry by the policy until nothing is left that can run.

        Raises LauncherError when the scheduler has given no answer MAX_SILENCES times in a row.
        """
        silences = 0
        while True:
            try:
                is_over = self._look(console)
                silences = 0
            except LauncherError as error:
                is_over, silences = False, silences + 1
                if silences == MAX_SILENCES:
                    raise
                console.print(f"[yellow]{error}[/yellow]", highlight=False)
            if is_over:
                return
            time.sleep(self._config.launcher.poll_seconds)

    def _look(self, console: Console) -> bool:
        """Judge what has ended and submit what is missing; tells whether nothing lives any more."""
        with launch_lock(self._folder):
            # One poll for both: a job that ends in between is judged before it is replaced.
            jobs, done = self._launcher.poll(), self._done()
            self._judge_ended(jobs, done, console)
            alive, submitted = self._submit(jobs, done)
        for name, job in submitted.items():
            console.print(f"{name}: job {job}", highlight=False)
        return not alive and not submitted

    def _done(self) -> set[str]:
        return {name for name in self._nodes if NodeDir(self._folder / name).is_done()}

    def _submit(
        self, jobs: Mapping[str, Job], done: set[str]
    ) -> tuple[dict[str, Job], dict[str, str]]:
        nodes = list(self._nodes.values())
        alive, submitted = reconcile(nodes, self._launcher, jobs, done=done, held=set(self.held))
        self._watched |= {*alive, *submitted}
        for name in submitted:
            note_submission(self._folder / name)
        return alive, submitted

    def _judge_ended(self, jobs: Mapping[str, Job], done: set[str], console: Console) -> None:
        """Hold the nodes whose job ended without a result more often than the policy allows."""
        ended = {name for name in self._watched if name not in jobs or not jobs[name].is_alive}
        self._watched -= ended
        for name in (name for name in self._nodes if name in ended):
            if name in done:
                console.print(f"{name} is done", highlight=False)
                continue
            failure = self.failure_of(name, jobs.get(name))
            if failure == PARENT_FAILED:
                continue
            self._ends[name, failure] += 1
            allowed = getattr(self._config.launcher.retries, failure, 0)
            again = self._ends[name, failure] <= allowed
            console.print(f"{name}: {failure}{', starting it again' if again else ''}")
            if not again:
                self.held[name] = failure

    def failure_of(self, name: str, job: Job | None) -> str:
        """Return why a node's last job ended: its own word, else the scheduler's."""
        exits = read_exits(self._folder / name)
        own = exits[-1].failure if exits and exits[-1].time >= self._started else ""
        # With no word at all the scheduler has forgotten the job, or lost the machine's files.
        return why(own, job.failure if job else "") or NODE_FAILURE

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
