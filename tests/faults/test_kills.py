"""kill -9 in every stage, then the same node again: it goes on, and ends with the same bits.

Nodes die by SIGKILL in the middle of the real pipeline: near 25, 50 and 75 % of their steps at
places that a seed chooses, and at every boundary of an atomic write. The default suite takes one
kill per stage; `pytest -m faults` takes them all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import rlhf, rows_without_time
from workbench import NODES, TRAINING, Kept, Workbench, assert_resumed, assert_same, place

from rlhf.artifacts import KILL_VARIABLE, NodeDir
from rlhf.data.records import Kind

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
        assert list(folder.glob("checkpoints/*/optimizer.pt"))
    if stage == "collect":
        found, wanted = run.store, reference.store
        assert found.ids(Kind.batch) == wanted.ids(Kind.batch)
        assert found.digest(Kind.batch, "round-02") == wanted.digest(Kind.batch, "round-02")


def test_another_process_gets_the_same_bits(bench: Workbench) -> None:
    name = NODES["ppo"]
    found = bench.reference(name).folder / name
    wanted = bench.tiny.folder / name
    assert digest(found) == digest(wanted)
    assert (found / "samples.jsonl").read_bytes() == (wanted / "samples.jsonl").read_bytes()
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
