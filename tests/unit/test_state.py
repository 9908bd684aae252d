"""Where a node stands, read from its folder alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from rlhf.lease import Lease
from rlhf.nodes import Node
from rlhf.state import node_state
from rlhf.worker import Progress

NODE = Node("sft", "sft", 0, (), {})


@pytest.fixture
def started(tmp_path: Path) -> Path:
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / "inputs.json").write_text("{}")
    (folder / "provenance.json").write_text("{}")
    return folder


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_running_node_tells_how_long_it_has_been_silent(started: Path) -> None:
    lease = Lease(started)
    lease.take()
    age(started / "provenance.json", 300)
    state = node_state(started.parent, NODE)
    assert state.state == "running"
    assert state.silent == pytest.approx(300, abs=5)

    progress = {"step": 3, "total": 9, "seconds": 4.0, "eta": 8.0}
    (started / "progress.json").write_text(json.dumps(progress))
    state = node_state(started.parent, NODE)
    assert (state.step, state.total, state.eta) == (3, 9, 8.0)
    assert state.silent == pytest.approx(0, abs=5)
    lease.release()


def test_a_node_that_goes_on_is_not_judged_by_its_earlier_start(started: Path) -> None:
    progress = {"step": 3, "total": 9, "seconds": 4.0, "eta": 8.0}
    (started / "progress.json").write_text(json.dumps(progress))
    for name in ("progress.json", "provenance.json"):
        age(started / name, 3600)
    lease = Lease(started)
    lease.take()
    Progress(started, lease)
    state = node_state(started.parent, NODE)
    assert (state.step, state.total, state.seconds, state.eta) == (3, 9, 4.0, None)
    assert state.silent == pytest.approx(0, abs=5)
    lease.release()


def test_a_node_without_a_process_is_stopped_and_not_silent(started: Path) -> None:
    state = node_state(started.parent, NODE)
    assert (state.state, state.eta, state.silent) == ("stopped", None, None)


def test_a_node_that_never_started_waits(tmp_path: Path) -> None:
    assert node_state(tmp_path, NODE).state == "waiting"
