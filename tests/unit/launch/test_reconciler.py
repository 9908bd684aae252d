"""Following a run: what is retried, what is held, and when it is over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from rlhf import compose
from rlhf.artifacts import write_manifest
from rlhf.config import Config
from rlhf.errors import LauncherError
from rlhf.launch import reconciler
from rlhf.launch.failures import new_exit, note_exit
from rlhf.launch.jobs import ENDED, RUNNING, Job
from rlhf.launch.reconciler import Reconciler, launch_lock
from rlhf.nodes import Node

NODES = [
    Node("a", "sft", 0, (), {}),
    Node("b", "reward", 1, ("a",), {}),
    Node("c", "reward", 1, ("a",), {}),
    Node("d", "ppo", 1, ("b",), {}),
]


class Script:
    """A scheduler that runs each job until the next look, then ends it as the script says."""

    orders_jobs = False

    def __init__(self, folder: Path, ends: dict[str, list[str]]) -> None:
        self.folder, self.ends = folder, ends
        self.queue: dict[str, Job] = {}
        self.history: list[str] = []

    def submit(self, nodes: Sequence[Node], after: Sequence[str]) -> dict[str, str]:
        ids = {}
        for node in nodes:
            self.history.append(node.name)
            ids[node.name] = f"{node.name}-{len(self.history)}"
            self.queue[node.name] = Job(node.name, ids[node.name], RUNNING)
        return ids

    def poll(self) -> dict[str, Job]:
        seen = dict(self.queue)
        for name, job in self.queue.items():
            if job.is_alive:
                failure = self.ends.get(name, []).pop(0) if self.ends.get(name) else ""
                self.queue[name] = Job(name, job.id, ENDED, failure=failure)
                if not failure:
                    (self.folder / name).mkdir(parents=True, exist_ok=True)
                    write_manifest(self.folder / name, {"wall_seconds": 1.0})
        return seen

    def cancel(self, jobs: Sequence[Job]) -> None:
        raise AssertionError("following cancels nothing")

    def render(self, nodes: Sequence[Node], after: Sequence[str]) -> str:
        return ""


@pytest.fixture
def config() -> Config:
    found = compose.load(["recipe=quickstart", "launcher=slurm", "launcher.follow=true"])
    found.launcher.poll_seconds = 0.0
    return found


def follow(config: Config, folder: Path, **ends: list[str]) -> tuple[Script, Reconciler]:
    script = Script(folder, ends)
    followed = Reconciler(config, NODES, folder, script)
    followed.follow(Console(quiet=True))
    return script, followed


def test_everything_runs_once_in_the_plans_order(config: Config, tmp_path: Path) -> None:
    script, followed = follow(config, tmp_path)
    assert script.history == ["a", "b", "c", "d"]
    assert followed.held == {}


def test_a_lost_machine_is_retried_and_an_error_is_not(config: Config, tmp_path: Path) -> None:
    script, followed = follow(config, tmp_path, b=["error"], c=["node_failure", "preempted"])
    assert script.history == ["a", "b", "c", "c", "c"]
    assert followed.held == {"b": "error"}
    assert "node b: error" in followed.failures()


def test_retries_end(config: Config, tmp_path: Path) -> None:
    config.launcher.retries.node_failure = 2
    script, followed = follow(config, tmp_path, a=["node_failure"] * 9)
    assert script.history == ["a", "a", "a"]
    assert followed.held == {"a": "node_failure"}


def test_a_cancelled_node_is_left_alone(config: Config, tmp_path: Path) -> None:
    script, followed = follow(config, tmp_path, c=["cancelled"])
    assert script.history == ["a", "b", "c", "d"]
    assert followed.held == {"c": "cancelled"}


def test_a_jobs_own_word_counts_more_than_the_schedulers(config: Config, tmp_path: Path) -> None:
    judge = Reconciler(config, NODES, tmp_path, Script(tmp_path, {}))
    (tmp_path / "a").mkdir()
    note_exit(tmp_path / "a", new_exit("1", 0, 2, "bad_input"))
    assert judge.failure_of("a", Job("a", "1", ENDED, failure="error")) == "bad_input"
    assert judge.failure_of("b", Job("b", "2", ENDED, failure="time_limit")) == "time_limit"
    assert judge.failure_of("c", None) == "node_failure"


def test_a_scheduler_that_is_silent_for_a_while_ends_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "MAX_SILENCES", 3)
    script = Script(tmp_path, {})
    answers = [True, False, False, True, False, True]
    poll = script.poll

    def moody() -> dict[str, Job]:
        if answers and not answers.pop(0):
            raise LauncherError("no answer")
        return poll()

    monkeypatch.setattr(script, "poll", moody)
    Reconciler(config, NODES, tmp_path, script).follow(Console(quiet=True))
    assert script.history == ["a", "b", "c", "d"]

    answers += [False] * 3
    with pytest.raises(LauncherError, match="no answer"):
        Reconciler(config, NODES, tmp_path, script).follow(Console(quiet=True))


def test_two_launches_do_not_submit_at_once(tmp_path: Path) -> None:
    refused = pytest.raises(LauncherError, match="another `rlhf launch`")
    with launch_lock(tmp_path), refused, launch_lock(tmp_path):
        pass
    with launch_lock(tmp_path):
        pass
