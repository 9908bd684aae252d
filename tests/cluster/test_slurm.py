"""`rlhf launch` on a real Slurm: what the queue does to a node, and what becomes of its result.

Run it alone: pytest -m cluster tests/cluster. It needs Debian's Slurm, which it installs as root.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.lab import SlurmLab
from cluster.launched import SLURM, START, Launched
from tiny_run import SETTINGS, rlhf

from rlhf.artifacts import read_json, sha256_file
from rlhf.launch.failures import read_exits

pytestmark = pytest.mark.cluster

LONG = ("toy.sft_rows=1600", "sft.epochs=4", "checkpoint.every_steps=20")
"""A supervised fine-tuning long enough to be hit in the middle."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose supervised fine-tuning was never disturbed, and its store."""
    root = tmp_path_factory.mktemp("straight")
    paths = [f"paths.runs={root / 'runs'}", f"paths.store={root / 'store'}"]
    made = rlhf("run", "recipe=quickstart", *paths, *SETTINGS, *LONG, "rounds.limit=0", cwd=root)
    assert made.returncode == 0, made.stdout + made.stderr
    return root


@pytest.fixture
def launched(lab: SlurmLab, straight: Path, tmp_path: Path) -> Iterator[Launched]:
    """The same fine-tuning on Slurm, past its first checkpoint and not at its end."""
    shutil.copytree(straight / "store", tmp_path / "store")
    run = Launched(lab, tmp_path)
    run.rlhf("launch", *SETTINGS, *LONG, *SLURM)
    run.wait_for_step("sft", 25)
    assert not run.is_done("sft")
    yield run
    run.rlhf("cancel")


def assert_same_as_straight(run: Launched, straight: Path) -> None:
    """The node went on from a checkpoint, ended once, and its weights are the undisturbed ones."""
    # The log's last line comes after the manifest.
    run.lab.wait(lambda: "sft is done after" in run.log("sft"), "the end of the log")
    log = run.log("sft")
    assert "continuing at step" in log
    assert log.count("sft is done after") == 1
    reference = straight / "runs" / "quickstart" / "sft" / "model" / "model.safetensors"
    assert run.weights("sft") == sha256_file(reference)


def test_preemption_saves_requeues_and_ends_with_the_same_weights(
    launched: Launched, straight: Path
) -> None:
    lab, job = launched.lab, launched.job("sft")
    intruder = lab.call(
        "sbatch",
        "--parsable",
        "-p",
        "urgent",
        "-N2",
        "--exclusive",
        "-o/dev/null",
        "--wrap=sleep 2",
    ).strip()
    lab.wait(lambda: lab.state(intruder) == "COMPLETED", "the urgent job", seconds=90)
    lab.wait(lambda: lab.state(job) == "PENDING", "the requeued job")
    assert [entry.failure for entry in read_exits(launched.folder / "sft")] == ["preempted"]
    # The job after it still waits for the same job.
    assert launched.states()["round-01/collect"] == "PENDING"
    lab.run_again(job)
    launched.wait_until_done("sft")
    assert_same_as_straight(launched, straight)


def test_a_time_limit_saves_requeues_and_ends_with_the_same_weights(
    launched: Launched, straight: Path
) -> None:
    lab, job, folder = launched.lab, launched.job("sft"), launched.folder / "sft"
    # One minute, of which a part is over: Slurm warns at its next look.
    lab.call("scontrol", "update", f"jobid={job}", "TimeLimit=1")
    lab.wait(lambda: read_exits(folder), "the end of the first attempt", seconds=START)
    assert [entry.failure for entry in read_exits(folder)] == ["time_limit"]
    lab.wait(lambda: lab.state(job) == "PENDING", "the requeued job")
    lab.call("scontrol", "update", f"jobid={job}", "TimeLimit=30")
    lab.run_again(job)
    launched.wait_until_done("sft")
    assert_same_as_straight(launched, straight)


def test_cancel_ends_the_jobs_and_launch_goes_on(launched: Launched, straight: Path) -> None:
    lab, job = launched.lab, launched.job("sft")
    assert f"sft (job {job})" in launched.rlhf("cancel")
    lab.wait(lambda: lab.state(job) == "CANCELLED", "the end of the job")
    assert set(launched.states().values()) == {"CANCELLED"}
    status = launched.rlhf("status")
    assert "sft: cancelled; `rlhf launch` starts it again" in status
    launched.rlhf("launch")
    assert launched.job("sft") != job
    launched.wait_until_done("sft")
    assert_same_as_straight(launched, straight)


def test_a_machine_that_dies_costs_no_checkpoint(launched: Launched, straight: Path) -> None:
    lab, job = launched.lab, launched.job("sft")
    machine = lab.call("squeue", "-h", "-j", job, "-o", "%N").strip()
    lab.crash_node(machine, _pid(launched.folder / "sft" / "lease.json"))
    try:
        lab.wait(lambda: lab.state(job) == "PENDING", "the requeued job", seconds=120)
        lab.run_again(job)
        assert lab.call("squeue", "-h", "-j", job, "-o", "%N").strip() != machine
        launched.wait_until_done("sft")
    finally:
        lab.start_node(int(machine.removeprefix("node")))
        lab.wait(lambda: "down" not in lab.call("sinfo", "-h", "-o", "%t"), "the machine")
    assert_same_as_straight(launched, straight)


def test_a_controller_that_dies_loses_nothing(launched: Launched, straight: Path) -> None:
    lab, job = launched.lab, launched.job("sft")
    lab.kill_controller()
    status = launched.rlhf("status")
    assert "jobs unknown: squeue" in status
    assert "running" in status
    refused = launched.rlhf("launch", ok=False)
    assert "no job is submitted twice" in refused or "squeue failed" in refused
    lab.start_controller()
    again = launched.rlhf("launch")
    assert "submitted" not in again
    assert launched.is_done("sft") or f"sft: job {job} is running already" in again
    launched.wait_until_done("sft")
    assert launched.job("sft") == job
    lab.wait(lambda: lab.state(job) == "COMPLETED", "the end of the job")
    reference = straight / "runs" / "quickstart" / "sft" / "model" / "model.safetensors"
    assert launched.weights("sft") == sha256_file(reference)
    assert launched.log("sft").count("sft is done after") == 1


def test_two_launches_submit_every_node_once(launched: Launched) -> None:
    before = launched.lab.call("squeue", "-h", "--states=all", "-o", "%A").split()
    output = launched.rlhf("launch")
    assert "submitted" not in output
    assert launched.lab.call("squeue", "-h", "--states=all", "-o", "%A").split() == before
    plan = read_json(launched.folder / "plan.json")
    assert set(launched.states()) == {node["name"] for node in plan["nodes"]}


def test_a_killed_stage_is_told_apart_from_a_failed_one(launched: Launched) -> None:
    lab, job = launched.lab, launched.job("sft")
    os.kill(_pid(launched.folder / "sft" / "lease.json"), signal.SIGKILL)
    lab.wait(lambda: lab.state(job) == "FAILED", "the end of the job")
    status = launched.rlhf("status")
    assert "sft: out_of_memory" in status
    assert "raise resources.sft.memory" in status
    assert "never started (parent_failed; a node before it failed" in status


def _pid(lease: Path) -> int:
    return int(read_json(lease)["pid"])
