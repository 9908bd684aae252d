"""The whole toy recipe as jobs: a failure in the middle, a second launch, the local run's result.

Sampling is an array of two jobs, PPO runs on two machines with one process each.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cluster.lab import SlurmLab
from cluster.launched import SLURM, Launched
from safetensors.torch import load_file
from tiny_run import SETTINGS, rlhf

from rlhf.artifacts import NodeDir, read_json

pytestmark = pytest.mark.cluster

ROUND = ("checkpoint.every_steps=2", "rounds.limit=1", "rounds.schedule=[rejection_ppo]")
SPREAD = ("rounds.sampling_jobs=2", "resources.ppo.nodes=2")
FAULT = "launcher.setup=['export RLHF_KILL_AT=before-temp:reward-safety/mixture.json']"
FAILED = "round-01/reward-safety"
UNHARMED = {
    "sft",
    "round-01/collect",
    "round-01/reward-helpfulness",
    "round-01/judge-helpfulness",
    "round-01/judge-safety",
}
BEHIND = {
    "round-01/sweep",
    "round-01/sample-0",
    "round-01/sample-1",
    "round-01/rejection",
    "round-01/ppo",
    "round-01/evaluate",
}
PIPELINE = 900
TOLERANCE = 1e-4
"""Largest difference of a PPO weight between two machines and one process (fp32, 6 iterations)."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe by `rlhf run`, one process per node; returns the run's folder."""
    root = tmp_path_factory.mktemp("local")
    paths = [f"paths.runs={root / 'runs'}", f"paths.store={root / 'store'}"]
    done = rlhf("run", "recipe=quickstart", *paths, *SETTINGS, *ROUND, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "runs" / "quickstart"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_the_recipe_as_jobs_ends_like_the_local_run(
    lab: SlurmLab, local: Path, tmp_path: Path
) -> None:
    run = Launched(lab, tmp_path)
    run.rlhf("launch", *SETTINGS, *ROUND, *SPREAD, *SLURM, FAULT)
    run.wait_until_idle(seconds=PIPELINE)

    # What failed stops what depends on it and nothing else.
    states = run.states()
    assert states[FAILED] == "FAILED"
    assert {name for name in states if run.is_done(name)} == UNHARMED
    assert {name for name, state in states.items() if state == "CANCELLED"} == BEHIND
    status = run.rlhf("status")
    assert f"{FAILED}: out_of_memory" in status
    never = next(line for line in status.splitlines() if line.startswith("never started"))
    assert {name for name in BEHIND if name in never} == BEHIND

    run.rlhf("launch", "launcher.setup=[]")
    # Reward models side by side: neither waits for the other.
    assert "reward-helpfulness" not in run.dependencies(FAILED)
    run.wait_until_idle(seconds=PIPELINE)
    nodes = UNHARMED | BEHIND | {FAILED}
    assert {name for name in nodes if run.is_done(name)} == nodes
    assert {name: run.log(name).count("is done after") for name in nodes} == dict.fromkeys(nodes, 1)

    for name in (*sorted(UNHARMED), FAILED):
        assert NodeDir(run.folder / name).manifest()["digest"] == digest(local / name), name
    # Samples of two jobs are the local ones bit for bit, and so is what is trained on them.
    name = "round-01/rejection"
    for file in ("winners.jsonl", "model/model.safetensors"):
        assert (run.folder / name / file).read_bytes() == (local / name / file).read_bytes(), file
    assert_close_to_local(run.folder / "round-01" / "ppo", local / "round-01" / "ppo")
    assert (run.folder / "round-01" / "evaluate" / "decision.json").exists()
    assert "v1" in run.rlhf("status")


def assert_close_to_local(found: Path, local: Path) -> None:
    assert read_json(found / "manifest.json")["num_processes"] == 2
    one, two = weights(local), weights(found)
    assert one.keys() == two.keys()
    worst = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert worst <= TOLERANCE
    for key in ("stopped", "iterations", "best_iteration"):
        assert read_json(found / "ppo.json")[key] == read_json(local / "ppo.json")[key]


def digest(folder: Path) -> str:
    return str(NodeDir(folder).manifest()["digest"])
