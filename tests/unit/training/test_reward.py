from pathlib import Path
from typing import Any

import micro_models as micro
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl import RewardConfig, RewardTrainer

from rlhf.artifacts import read_jsonl
from rlhf.config import Lora, Optimizer
from rlhf.inference.scoring import HfScorer
from rlhf.models import packing
from rlhf.training.reward import RankedPair


def plain_trl_loss(model: Any, rows: list[RankedPair], folder: Path) -> float:
    """Return the loss that an unchanged RewardTrainer computes for the rows as one batch."""
    data = [
        {"chosen_ids": row.chosen_ids, "rejected_ids": row.rejected_ids, "margin": row.margin}
        for row in rows
    ]
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            max_length=None,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=micro.tokenizer(),
    )
    return trainer.compute_loss(trainer.model, trainer.data_collator(data)).item()


def test_loss_equals_plain_trl(tmp_path: Path) -> None:
    rows = micro.pairs(8)
    expected = plain_trl_loss(micro.scorer(), rows, tmp_path / "trl")
    directory = micro.train_reward(micro.scorer(), rows, tmp_path / "ours", safety_loss_weight=0.0)
    (row,) = micro.rows_without_time(directory.metrics)
    assert row["train/loss"] == pytest.approx(expected, abs=1e-5)
    assert "train/safety_loss" not in row


def test_loss_equals_a_loop_over_pairs(tmp_path: Path) -> None:
    """Slow second implementation, auxiliary loss included: one response at a time."""
    rows, model = micro.pairs(7), micro.scorer()
    model.requires_grad_(False)
    ranking, safety, labelled = 0.0, 0.0, 0
    for row in rows:
        scores = [
            model(torch.tensor([ids])).logits[0, 0] for ids in (row.chosen_ids, row.rejected_ids)
        ]
        ranking -= float(logsigmoid(scores[0] - scores[1] - row.margin))
        for score, safe in zip(scores, (row.chosen_safe, row.rejected_safe), strict=True):
            if safe is not None:
                safety -= float(logsigmoid(score if safe else -score))
                labelled += 1
    assert labelled == 8
    model.requires_grad_(True)
    directory = micro.train_reward(
        model, rows, tmp_path, safety_loss_weight=0.5, micro_batch_size=2
    )
    (row,) = micro.rows_without_time(directory.metrics)
    assert row["train/safety_loss"] == pytest.approx(safety / labelled, abs=1e-5)
    assert row["train/loss"] == pytest.approx(ranking / 7 + 0.5 * safety / labelled, abs=1e-5)


def test_margins_do_not_broadcast(tmp_path: Path) -> None:
    """With a head of zeros every score is 0, so the loss is the mean of log(1 + exp(margin))."""
    model = micro.scorer()
    torch.nn.init.zeros_(model.score.weight)
    margins = [3.0, 2.0, 1.0, 0.0]
    lists = micro.token_lists(8)
    rows = [RankedPair(lists[i], lists[i + 4], margins[i]) for i in range(4)]
    directory = micro.train_reward(model, rows, tmp_path)
    (row,) = micro.rows_without_time(directory.metrics)
    by_hand = (3.048587 + 2.126928 + 1.313262 + 0.693147) / 4
    assert row["train/loss"] == pytest.approx(by_hand, abs=1e-5)
    assert row["reward/accuracy"] == 0.5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_micro_batching_changes_nothing(tmp_path: Path, dtype: torch.dtype, bound: float) -> None:
    """Safety labels are spread unevenly and the last step holds 6 of 8 pairs."""
    rows, trained, logged = micro.pairs(22), [], []
    for size in (8, 1, 5):
        model = micro.scorer(dtype=dtype)
        directory = micro.train_reward(model, rows, tmp_path / str(size), micro_batch_size=size)
        trained.append(micro.weights(model))
        logged.append(micro.rows_without_time(directory.metrics))
    start = micro.weights(micro.scorer(dtype=dtype))
    assert len(logged[0]) == 3
    assert micro.largest_difference(trained[0], start) > 1e-4
    for other in (1, 2):
        assert micro.largest_difference(trained[0], trained[other]) < bound
        for one, two in zip(logged[0], logged[other], strict=True):
            assert one == pytest.approx(two, abs=1e-5)


def test_packed_pairs_train_what_a_rectangle_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, trained, logged = micro.pairs(22), [], []
    for packs in (True, False):
        monkeypatch.setattr(packing, "can_pack", lambda model, packs=packs: packs)
        model = micro.scorer(dtype=torch.float64)
        directory = micro.train_reward(model, rows, tmp_path / str(packs))
        trained.append(micro.weights(model))
        logged.append(micro.rows_without_time(directory.metrics))
    assert micro.largest_difference(*trained) < 1e-10
    for one, two in zip(*logged, strict=True):
        assert one == pytest.approx(two, abs=1e-10)


def scores_of(model: Any, rows: list[RankedPair]) -> tuple[torch.Tensor, torch.Tensor]:
    scorer = HfScorer(model, micro.tokenizer(), max_length=256)
    return (
        scorer.score_ids([row.chosen_ids for row in rows]),
        scorer.score_ids([row.rejected_ids for row in rows]),
    )


def task(number: int, *, seed: int) -> list[RankedPair]:
    """Return pairs in which the chosen side holds token 7 and the rejected side token 8."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for ids in micro.token_lists(number, seed=seed):
        place = int(torch.randint(len(ids) - 1, (1,), generator=generator))
        good, bad = ([*ids[:place], token, *ids[place + 1 :]] for token in (7, 8))
        rows.append(RankedPair(good, bad, 0.0))
    return rows


def accuracy_on_fresh_pairs(rows: list[RankedPair], fresh: list[RankedPair], folder: Path) -> float:
    model = micro.scorer()
    micro.train_reward(
        model,
        rows,
        folder,
        epochs=2,
        batch_size=16,
        micro_batch_size=16,
        optimizer=Optimizer(lr=5e-3),
    )
    chosen, rejected = scores_of(model, fresh)
    return float((chosen > rejected).float().mean())


def test_learns_a_task(tmp_path: Path) -> None:
    accuracy = accuracy_on_fresh_pairs(task(256, seed=1), task(400, seed=2), tmp_path)
    assert accuracy > 0.95


def test_shuffled_labels_teach_nothing(tmp_path: Path) -> None:
    """Which of two random responses is chosen is a coin flip, so fresh pairs are one as well.

    The bound is three standard errors of a fair coin over 800 independent pairs.
    """
    lists, unseen = micro.token_lists(512, seed=5), micro.token_lists(1600, seed=6)
    accuracy = accuracy_on_fresh_pairs(
        [RankedPair(lists[i], lists[i + 256], 0.0) for i in range(256)],
        [RankedPair(unseen[i], unseen[i + 800], 0.0) for i in range(800)],
        tmp_path,
    )
    assert accuracy == pytest.approx(0.5, abs=0.054)


def test_safety_loss_pins_the_zero_of_the_score(tmp_path: Path) -> None:
    """Both sides of every pair are safe: ranking alone leaves the level open, the labels do not."""
    lists = micro.token_lists(64)
    rows = [RankedPair(lists[i], lists[i + 32], 0.0, True, True) for i in range(32)]
    model = micro.scorer()
    micro.train_reward(model, rows, tmp_path, epochs=10, optimizer=Optimizer(lr=1e-2))
    chosen, rejected = scores_of(model, rows)
    assert float(torch.sigmoid(torch.cat([chosen, rejected])).min()) > 0.5


def test_lora_trains_adapter_and_head(tmp_path: Path) -> None:
    settings = micro.config()
    settings.model.lora = Lora(enabled=True, rank=4)
    model = micro.scorer()
    before = micro.weights(model)
    directory = micro.train_reward(model, micro.pairs(16), tmp_path, config=settings)
    after = micro.weights(model)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "score.weight" in changed
    assert any("_proj" in name for name in changed)
    assert "model.embed_tokens.weight" not in changed
    assert (directory.path / "adapter" / "adapter_model.safetensors").is_file()


def test_training_metrics(tmp_path: Path) -> None:
    directory = micro.train_reward(micro.scorer(), micro.pairs(8), tmp_path)
    (row,) = read_jsonl(directory.metrics.path)
    assert set(row) == {
        "step",
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/tokens",
        "train/safety_loss",
        "reward/accuracy",
        "reward/gap",
        "time/step",
        "time/tokens_per_second",
    }
    assert row["train/tokens"] == sum(
        len(p.chosen_ids) + len(p.rejected_ids) for p in micro.pairs(8)
    )
