"""Jobs and launchers: bring the scheduler's queue into line with the plan.

Files are the truth: a node is done when its manifest says so. What a scheduler says is a hint about
jobs that wait or run. `reconcile` may be repeated at any time: it leaves done nodes alone, adopts
jobs that wait or run, and submits the rest after the jobs they depend on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlhf.nodes import Node

PENDING, RUNNING, ENDED = "pending", "running", "ended"


@dataclass(frozen=True, slots=True)
class Job:
    """A node's newest job as the scheduler knows it.

    `state` is pending, running or ended; `reason` is the scheduler's own word for why it waits or
    how it ended; `start` is when it may start, as the scheduler writes it; `failure` is a kind of
    launch/failures.py, "" for success or while it lives.
    """

    node: str
    id: str
    state: str
    reason: str = ""
    start: str = ""
    failure: str = ""

    @property
    def is_alive(self) -> bool:
        """Tell whether the job waits or runs."""
        return self.state != ENDED


class Launcher(Protocol):
    """A scheduler of one run's jobs; every call has a time limit and raises LauncherError."""

    orders_jobs: bool
    """Whether a job can be submitted ahead of the jobs that it has to wait for."""

    def submit(self, nodes: Sequence[Node], after: Sequence[str]) -> dict[str, str]:
        """Submit one node, or the shards of one sampling; returns the job id per node."""
        ...

    def poll(self) -> dict[str, Job]:
        """Return the newest known job of each node of the run."""
        ...

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs that wait or run."""
        ...

    def render(self, nodes: Sequence[Node], after: Sequence[str]) -> str:
        """Return what `submit` would hand to the scheduler."""
        ...


@dataclass(frozen=True, slots=True)
class Submission:
    """Nodes to submit together, and the nodes whose jobs they wait for."""

    nodes: tuple[Node, ...]
    after: tuple[str, ...]


def next_submissions(
    nodes: Sequence[Node], *, done: set[str], alive: set[str], held: set[str], orders_jobs: bool
) -> list[Submission]:
    """Return what to submit now, in plan order.

    `alive` nodes have a job; `held` ones failed and are not to be started again, and neither is
    what depends on them. Without `orders_jobs` a node waits until its parents are done.
    """
    ready = set(done) if not orders_jobs else done | alive
    blocked = set(held)
    found: list[Submission] = []
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        if node.name in done | alive:
            continue
        if node.name in blocked or blocked & set(node.after):
            blocked.add(node.name)
        elif ready >= set(node.after):
            groups.setdefault(group_name(node), []).append(node)
            if orders_jobs:
                ready.add(node.name)
    for members in groups.values():
        parents = {name for node in members for name in node.after}
        found.append(Submission(tuple(members), tuple(sorted(parents - done))))
    return found


def group_name(node: Node) -> str:
    """Return what nodes of one array job have in common: a sampling shard's name has a number."""
    if "shard" in node.options:
        return node.name.rpartition("-")[0]
    return node.name


def reconcile(
    nodes: Sequence[Node],
    launcher: Launcher,
    jobs: Mapping[str, Job],
    *,
    done: set[str],
    held: set[str],
) -> tuple[dict[str, Job], dict[str, str]]:
    """Submit what is missing; returns the adopted jobs and the new job ids, by node.

    `jobs` is what the launcher's last poll said.
    """
    names = [node.name for node in nodes if node.name in jobs and node.name not in done]
    alive = {name: jobs[name] for name in names if jobs[name].is_alive}
    ids = {name: job.id for name, job in alive.items()}
    submitted: dict[str, str] = {}
    for item in next_submissions(
        nodes, done=done, alive=set(alive), held=held, orders_jobs=launcher.orders_jobs
    ):
        waits_for = list(dict.fromkeys(ids[name] for name in item.after))
        new = launcher.submit(item.nodes, waits_for)
        ids |= new
        submitted |= new
    return alive, submitted
