"""Real stages of the tiny run on two processes: what is sampled and scored is the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import TinyRun
from workbench import NODES, Workbench

from rlhf.artifacts import NodeDir, read_json
from rlhf.compose import freeze
from rlhf.config import Config, StageResources, Strategy
from rlhf.state import LOG


def run(bench: Workbench, name: str, root: Path, *, strategy: Strategy = Strategy.ddp) -> Path:
    """Run a node of the tiny run on two processes; returns its folder."""
    copy = bench.prepare(name, root)
    config = copy.config
    use_two_processes(config, bench.tiny.plan.node(name).stage)
    config.distributed.strategy = strategy
    (copy.folder / "run.yaml").write_text(freeze(config), encoding="utf-8")
    code = bench.run(copy, name)
    folder = copy.folder / name
    assert code == 0, (folder / LOG).read_text(encoding="utf-8")[-6000:]
    manifest = NodeDir(folder).manifest()
    assert manifest["num_processes"] == 2
    # Both processes work from beginning to end, and both count.
    assert manifest["device_seconds"] > 1.2 * manifest["wall_seconds"]
    return folder


def use_two_processes(config: Config, stage: str) -> None:
    setattr(config.resources, stage, StageResources(processes=2))


def assert_same_files(folder: Path, tiny: TinyRun, name: str, *patterns: str) -> None:
    wanted = tiny.folder / name
    for pattern in patterns:
        files = sorted(wanted.glob(pattern))
        assert files, pattern
        for file in files:
            path = file.relative_to(wanted)
            assert (folder / path).read_bytes() == file.read_bytes(), path


def test_evaluate_on_two_processes_is_the_same_bits(bench: Workbench, tmp_path: Path) -> None:
    name = NODES["evaluate"]
    folder = run(bench, name, tmp_path)
    files = ("shards/*", "evaluation.json", "decision.json", "over_optimisation.json")
    files += ("responses.jsonl", "version_scores.jsonl")
    assert_same_files(folder, bench.tiny, name, *files)


@pytest.mark.distributed
def test_sweep_on_two_processes_is_the_same_bits(bench: Workbench, tmp_path: Path) -> None:
    name = NODES["sweep"]
    folder = run(bench, name, tmp_path)
    assert_same_files(folder, bench.tiny, name, "shards/*", "temperature.json")


@pytest.mark.distributed
def test_collect_on_two_processes_is_the_same_bits(bench: Workbench, tmp_path: Path) -> None:
    name = NODES["collect"]
    folder = run(bench, name, tmp_path)
    files = ("shards/*", "pairs.jsonl", "rated.jsonl", "batch.json")
    assert_same_files(folder, bench.tiny, name, *files)


@pytest.mark.distributed
def test_rejection_on_two_processes_samples_the_same_bits(bench: Workbench, tmp_path: Path) -> None:
    name = NODES["rejection"]
    folder = run(bench, name, tmp_path, strategy=Strategy.zero3)
    assert_same_files(folder, bench.tiny, name, "shards/*", "winners.jsonl", "selection.json")
    assert (folder / "model" / "model.safetensors").is_file()


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("strategy", [Strategy.zero2, Strategy.fsdp], ids=["zero2", "fsdp"])
def test_training_stages_write_what_one_process_writes(
    stage: str, strategy: Strategy, bench: Workbench, tmp_path: Path
) -> None:
    """The same files; a reward model's pair counts do not hang on the last digits."""
    name = NODES[stage]
    folder = run(bench, name, tmp_path, strategy=strategy)
    ours, wanted = (
        read_json(path / "manifest.json") for path in (folder, bench.tiny.folder / name)
    )
    assert ours["files"].keys() == wanted["files"].keys()
    if stage == "reward":
        files = ("mixture.json", "accuracy_before.json", "scores_before.jsonl")
        assert_same_files(folder, bench.tiny, name, *files)
