"""Resume, checkpoints, the order of rows and the stop on NaN, over both trainers."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import micro_models as micro
import pytest
import torch
from safetensors.torch import load_file

from rlhf.artifacts import COMPLETE, NodeDir, read_jsonl
from rlhf.config import Lora, Optimizer
from rlhf.errors import ArtifactError, StageError

Train = Callable[..., NodeDir]
SFT = (micro.policy, micro.conversations, micro.train_sft)
REWARD = (micro.scorer, micro.pairs, micro.train_reward)


class Killed(Exception):
    pass


def dies_at(folder: Path, step: int) -> NodeDir:
    def on_step(done: int, _total: int) -> None:
        if done == step:
            raise Killed

    return NodeDir(folder, on_step=on_step)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("model", "data", "train"), [SFT, REWARD], ids=["sft", "reward"])
@pytest.mark.parametrize("step", [3, 6])
def test_resumed_equals_uninterrupted(
    tmp_path: Path, model: Any, data: Any, train: Train, step: int, lora: bool
) -> None:
    """Two epochs of three steps with checkpoints every two; killed at 3, and at the very end."""
    settings = micro.config(every_steps=2)
    settings.model.lora = Lora(enabled=lora, rank=4)
    rows = data(22)
    straight = model()
    whole = train(straight, rows, tmp_path / "whole", epochs=2, config=settings)
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        train(model(), rows, folder, epochs=2, config=settings, directory=dies_at(folder, step))
    saved = NodeDir(folder).last_checkpoint()
    assert saved is not None
    assert saved.step == step - step % 2
    resumed = model(seed=99) if not lora else model()
    started: list[int] = []
    directory = NodeDir(folder, on_step=lambda done, _total: started.append(done))
    train(resumed, rows, folder, epochs=2, config=settings, directory=directory)
    assert started == list(range(saved.step + 1, 7))
    assert micro.largest_difference(micro.weights(straight), micro.weights(resumed)) == 0.0
    assert micro.rows_without_time(directory.metrics) == micro.rows_without_time(whole.metrics)
    for name in ("optimizer.pt", "scheduler.pt"):
        ours, theirs = (
            torch.load(d.last_checkpoint().path / name, weights_only=True)  # type: ignore[union-attr]
            for d in (directory, whole)
        )
        assert_same(ours, theirs)


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, two in zip(a, b, strict=True):
            assert_same(one, two)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    settings, rows = micro.config(every_steps=1), micro.conversations(24)
    straight = micro.policy()
    micro.train_sft(straight, rows, tmp_path / "whole", config=settings)
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        micro.train_sft(micro.policy(), rows, folder, config=settings, directory=dies_at(folder, 2))
    newest = folder / "checkpoints" / "step-00000002"
    (newest / COMPLETE).unlink()
    directory = NodeDir(folder)
    saved = directory.last_checkpoint()
    assert saved is not None
    assert saved.step == 1
    resumed = micro.policy()
    micro.train_sft(resumed, rows, folder, config=settings)
    assert micro.largest_difference(micro.weights(straight), micro.weights(resumed)) == 0.0


def test_checkpoint_is_complete_and_keeps_to_the_limit(tmp_path: Path) -> None:
    directory = micro.train_sft(
        micro.policy(), micro.conversations(24), tmp_path, config=micro.config(every_steps=1)
    )
    names = sorted(path.name for path in directory.checkpoints.iterdir())
    assert names == ["step-00000002", "step-00000003"]
    newest = directory.checkpoints / names[-1]
    held = {path.name for path in newest.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= held
    assert "README.md" not in held
    marker = json.loads((newest / COMPLETE).read_text())
    assert marker["step"] == 3
    assert marker["state"]["num_threads"] == torch.get_num_threads()


def test_checkpoints_come_after_a_time(tmp_path: Path) -> None:
    directory = micro.train_sft(
        micro.policy(), micro.conversations(24), tmp_path, config=micro.config(every_seconds=0.0)
    )
    last = directory.last_checkpoint()
    assert last is not None
    assert last.step == 3
    weights = load_file(last.path / "model.safetensors")
    assert weights


def test_no_checkpoint_before_it_is_due(tmp_path: Path) -> None:
    directory = micro.train_sft(micro.policy(), micro.conversations(24), tmp_path)
    assert directory.last_checkpoint() is None
    assert len(read_jsonl(directory.metrics.path)) == 3


def test_checkpoint_of_other_rows_is_refused(tmp_path: Path) -> None:
    settings = micro.config(every_steps=1)
    micro.train_sft(micro.policy(), micro.conversations(24), tmp_path, config=settings)
    with pytest.raises(ArtifactError, match="other rows or another batch size"):
        micro.train_sft(micro.policy(), micro.conversations(32), tmp_path, config=settings)


def test_other_micro_batches_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings, rows = micro.config(every_steps=1), micro.conversations(24)
    with pytest.raises(Killed):
        micro.train_sft(
            micro.policy(), rows, tmp_path, config=settings, directory=dies_at(tmp_path, 1)
        )
    with caplog.at_level(logging.WARNING, logger="rlhf.training.trainer"):
        micro.train_sft(micro.policy(), rows, tmp_path, config=settings, micro_batch_size=2)
    assert "micro_batch_size was 4 and is now 2" in caplog.text


@pytest.mark.parametrize(("model", "data", "train"), [SFT, REWARD], ids=["sft", "reward"])
def test_nan_stops_the_stage_and_keeps_the_checkpoint(
    tmp_path: Path, model: Any, data: Any, train: Train
) -> None:
    broken = model()
    settings = micro.config(every_steps=1)

    def poison(done: int, _total: int) -> None:
        if done == 2:
            with torch.no_grad():
                broken.model.norm.weight.fill_(torch.nan)

    directory = NodeDir(tmp_path, on_step=poison)
    with pytest.raises(StageError, match="the loss is nan at step 3 of 4"):
        train(broken, data(32), tmp_path, config=settings, directory=directory)
    last = directory.last_checkpoint()
    assert last is not None
    assert last.step == 2
    assert all(torch.isfinite(w).all() for w in load_file(last.path / "model.safetensors").values())
    assert [row["step"] for row in read_jsonl(directory.metrics.path)] == [1, 2]


def test_infinite_gradient_stops_the_stage(tmp_path: Path) -> None:
    model = micro.policy()
    model.model.norm.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(StageError, match=r"gradient norm is (nan|inf) at step 1"):
        micro.train_sft(model, micro.conversations(8), tmp_path)


def test_metrics_count_tokens_and_follow_the_schedule(tmp_path: Path) -> None:
    rows = micro.conversations(22)
    directory = micro.train_sft(
        micro.policy(),
        rows,
        tmp_path,
        optimizer=Optimizer(lr=1.0e-3, warmup_steps_min=2, warmup_fraction=0.0, lr_floor=0.1),
    )
    logged = read_jsonl(directory.metrics.path)
    assert [row["step"] for row in logged] == [1, 2, 3]
    assert [row["train/lr"] for row in logged] == pytest.approx([5e-4, 1e-3, 1e-4])
    assert logged[-1]["train/tokens"] == sum(len(row.input_ids) for row in rows)
    assert all(row["time/step"] > 0 for row in logged)


def test_same_seed_same_bits_other_seed_other_order(tmp_path: Path) -> None:
    rows, found = micro.conversations(24), []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        model = micro.policy()
        micro.train_sft(model, rows, tmp_path / name, seed=seed)
        found.append(micro.weights(model))
    assert micro.largest_difference(found[0], found[1]) == 0.0
    assert micro.largest_difference(found[0], found[2]) > 0.0


def test_every_row_is_trained_once_an_epoch(tmp_path: Path) -> None:
    """The last incomplete batch too: tokens of two epochs are twice the tokens of the rows."""
    rows = micro.conversations(11)
    directory = micro.train_sft(micro.policy(), rows, tmp_path, epochs=2)
    logged = read_jsonl(directory.metrics.path)
    assert len(logged) == 4
    assert logged[-1]["train/tokens"] == 2 * sum(len(row.input_ids) for row in rows)
