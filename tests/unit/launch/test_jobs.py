"""What `launch` submits: every case of done, alive, held and missing parents, by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rlhf.launch.jobs import ENDED, PENDING, RUNNING, Job, group_name, next_submissions, reconcile
from rlhf.nodes import Node


def node(name: str, *after: str, **options: int) -> Node:
    return Node(name, "sft", 1, after, {}, options)


CHAIN = [node("a"), node("b", "a"), node("c", "a"), node("d", "b", "c")]


def submitted(**changes: object) -> list[tuple[list[str], list[str]]]:
    settings = {"done": set(), "alive": set(), "held": set(), "orders_jobs": True, **changes}
    nodes = settings.pop("nodes", CHAIN)
    found = next_submissions(nodes, **settings)  # type: ignore[arg-type]
    return [([n.name for n in item.nodes], list(item.after)) for item in found]


def test_everything_is_submitted_ahead_behind_its_parents() -> None:
    assert submitted() == [(["a"], []), (["b"], ["a"]), (["c"], ["a"]), (["d"], ["b", "c"])]


def test_done_parents_are_not_waited_for() -> None:
    assert submitted(done={"a", "b"}) == [(["c"], []), (["d"], ["c"])]


def test_nodes_with_a_job_are_adopted_and_waited_for() -> None:
    assert submitted(done={"a"}, alive={"b"}) == [(["c"], []), (["d"], ["b", "c"])]


def test_a_held_node_blocks_what_depends_on_it_and_nothing_else() -> None:
    assert submitted(done={"a"}, held={"b"}) == [(["c"], [])]


def test_a_scheduler_without_dependencies_gets_only_what_can_start() -> None:
    assert submitted(orders_jobs=False) == [(["a"], [])]
    assert submitted(orders_jobs=False, done={"a"}, alive={"b"}) == [(["c"], [])]
    assert submitted(orders_jobs=False, done={"a", "b"}, alive={"c"}) == []


def test_shards_of_a_sampling_go_together_without_those_that_are_done() -> None:
    shards = [node(f"r/sample-{i}", "a", shard=i) for i in range(3)]
    nodes = [node("a"), *shards, node("r/rejection", *(s.name for s in shards))]
    assert submitted(nodes=nodes, done={"a", "r/sample-1"}) == [
        (["r/sample-0", "r/sample-2"], []),
        (["r/rejection"], ["r/sample-0", "r/sample-2"]),
    ]
    assert {group_name(shard) for shard in shards} == {"r/sample"}


class FakeLauncher:
    """Remembers what it was given; its queue is a plain table."""

    orders_jobs = True

    def __init__(self, jobs: dict[str, Job]) -> None:
        self.jobs = jobs
        self.calls: list[tuple[list[str], list[str]]] = []

    def submit(self, nodes: Sequence[Node], after: Sequence[str]) -> dict[str, str]:
        self.calls.append(([n.name for n in nodes], list(after)))
        return {n.name: f"new-{n.name}" for n in nodes}

    def poll(self) -> dict[str, Job]:
        return self.jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        raise AssertionError("launch cancels nothing")

    def render(self, nodes: Sequence[Node], after: Sequence[str]) -> str:
        return ""


@pytest.mark.parametrize("state", [PENDING, RUNNING])
def test_a_living_job_is_waited_for_by_its_id(state: str) -> None:
    launcher = FakeLauncher({"b": Job("b", "17", state), "c": Job("c", "18", ENDED)})
    alive, new = reconcile(CHAIN, launcher, launcher.jobs, done={"a"}, held=set())
    assert list(alive) == ["b"]
    assert launcher.calls == [(["c"], []), (["d"], ["17", "new-c"])]
    assert new == {"c": "new-c", "d": "new-d"}


def test_a_job_of_a_done_node_is_never_named() -> None:
    launcher = FakeLauncher({"a": Job("a", "16", RUNNING)})
    alive, _ = reconcile(CHAIN, launcher, launcher.jobs, done={"a"}, held=set())
    assert alive == {}
    assert launcher.calls[0] == (["b"], [])


def test_a_second_launch_submits_nothing() -> None:
    jobs = {n.name: Job(n.name, str(i), PENDING) for i, n in enumerate(CHAIN)}
    launcher = FakeLauncher(jobs)
    alive, new = reconcile(CHAIN, launcher, launcher.jobs, done=set(), held=set())
    assert (len(alive), new, launcher.calls) == (4, {}, [])
