"""kill -9 in every stage, then the same node again: it goes on, and ends with the same bits.

Nodes die by SIGKILL in the middle of the real pipeline: near 25, 50 and 75 % of their steps at
places that a seed chooses, and at every boundary of an atomic write. The default suite takes one
kill per stage; `pytest -m faults` takes them all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import ROOT, rlhf, rows_without_time
from workbench import NODES, TRAINING, Kept, Workbench, assert_resumed, assert_same, place

from rlhf.artifacts import NodeDir
from rlhf.data.records import Kind
from rlhf.errors import STOPPED_EXIT
from rlhf.faults import KILL_VARIABLE
from rlhf.state import LOG, read_progress

pytestmark = pytest.mark.faults

KINDS = (
    "step-25",
    "step-50",
    "step-75",
    "before-temp:unit",
    "before-rename:unit",
    "after-rename:unit",
    "after-rename:last",
    "before-rename:manifest.json",
)
MORE = {"collect": ("before-rename:batches/round-02", "after-rename:batches/round-02")}
BY_DEFAULT = {
    ("sft", "step-50"),
    ("reward", "before-rename:unit"),
    ("sweep", "step-50"),
    ("rejection", "step-75"),
    ("ppo", "step-50"),
    ("evaluate", "before-rename:unit"),
    ("collect", "step-75"),
}

CASES = [
    pytest.param(stage, kind, marks=() if (stage, kind) in BY_DEFAULT else pytest.mark.slow)
    for stage in NODES
    for kind in (*KINDS, *MORE.get(stage, ()))
]


@pytest.mark.parametrize(("stage", "kind"), CASES)
def test_a_killed_node_goes_on_and_ends_with_the_same_bits(
    stage: str, kind: str, bench: Workbench, tmp_path: Path
) -> None:
    name = NODES[stage]
    reference = bench.reference(name)
    run = bench.prepare(name, tmp_path)
    folder = run.folder / name

    assert bench.run(run, name, kill=place(stage, kind, reference)) == -9
    assert not NodeDir(folder).is_done()
    kept = Kept.of(folder)
    bench.finish(run, name)

    assert_resumed(stage, folder, kept)
    assert_same(name, run, reference)
    if stage in TRAINING:
        assert list(folder.glob("checkpoints/*/optimizer*.pt"))
    if stage == "collect":
        found, wanted = run.store, reference.store
        assert found.ids(Kind.batch) == wanted.ids(Kind.batch)
        assert found.digest(Kind.batch, "round-02") == wanted.digest(Kind.batch, "round-02")


@pytest.mark.parametrize(
    "stage",
    [pytest.param(stage, marks=() if stage == "sft" else pytest.mark.slow) for stage in NODES],
)
def test_a_stopped_node_saves_at_once_and_ends_with_the_same_bits(
    stage: str, bench: Workbench, tmp_path: Path
) -> None:
    """The request comes between two of the checkpoints that the settings ask for."""
    name = NODES[stage]
    reference = bench.reference(name)
    run = bench.prepare(name, tmp_path)
    folder = run.folder / name
    at = place(stage, "step-50", reference)

    assert bench.run(run, name, stop=at) == STOPPED_EXIT
    assert not NodeDir(folder).is_done()
    assert "its state is saved" in (folder / LOG).read_text()
    kept = Kept.of(folder)
    if stage in ("sft", "reward", "ppo"):
        # The stop lets its step end and the next one save.
        assert kept.step in (step_of(at), step_of(at) + 1)
    bench.finish(run, name)

    assert_resumed(stage, folder, kept)
    assert_same(name, run, reference)


def step_of(where: str) -> int:
    return int(where.partition(":")[0].removeprefix("step-"))


@pytest.mark.slow
def test_rlhf_run_saves_on_a_signal_and_goes_on(bench: Workbench, tmp_path: Path) -> None:
    name = NODES["ppo"]
    run = bench.prepare(name, tmp_path)
    running = start_rlhf("run", *run.paths(), cwd=tmp_path)
    wait_for(lambda: read_progress(run.folder / name)["step"] >= 1)
    running.send_signal(signal.SIGTERM)
    output, errors = running.communicate(timeout=120)
    assert running.returncode == STOPPED_EXIT, output + errors
    assert f"{name} saved and stopped" in output
    kept = Kept.of(run.folder / name)
    assert 0 < kept.step < 6

    again = rlhf("run", *run.paths(), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert_resumed("ppo", run.folder / name, kept)
    assert_same(name, run, bench.tiny)


def start_rlhf(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rlhf.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_another_process_gets_the_same_bits(bench: Workbench) -> None:
    name = NODES["ppo"]
    found = bench.reference(name).folder / name
    wanted = bench.tiny.folder / name
    assert digest(found) == digest(wanted)
    for file in ("samples.jsonl", "heldout.jsonl"):
        assert (found / file).read_bytes() == (wanted / file).read_bytes()
    metrics = rows_without_time(found / "metrics.jsonl")
    assert metrics == rows_without_time(wanted / "metrics.jsonl")


@pytest.mark.slow
def test_rlhf_run_goes_on_after_its_node_was_killed(bench: Workbench, tmp_path: Path) -> None:
    name = NODES["evaluate"]
    run = bench.prepare(name, tmp_path)
    where = {KILL_VARIABLE: place("evaluate", "step-50", bench.tiny)}
    killed = rlhf("run", *run.paths(), cwd=tmp_path, environment=where)
    assert killed.returncode == 1
    assert f"node {name} was ended by signal 9" in killed.stderr
    kept = Kept.of(run.folder / name)

    again = rlhf("run", *run.paths(), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"[1/1] {name} done in" in again.stdout
    assert_resumed("evaluate", run.folder / name, kept)
    assert_same(name, run, bench.tiny)


def digest(folder: Path) -> str:
    return str(NodeDir(folder).manifest()["digest"])
