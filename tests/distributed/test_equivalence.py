"""Two processes train what one trains, with every strategy: weights and metrics, uneven batches.

Sums are taken in another order, so the last digits differ. Differences are relative to the largest
weight, or to the largest value of a metric; the largest seen stands beside each bound.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainings import Cluster, Outcome, largest_difference, largest_metric_difference

from rlhf.config import Strategy

Alone = Callable[..., Outcome]
BY_DEFAULT = {
    ("sft", Strategy.zero3, 17),
    ("reward", Strategy.ddp, 21),
    ("ppo", Strategy.zero2, 0),
}
PPO = {"iterations": 3, "critic_warmup_iterations": 1, "micro_batch_size": 1, "heldout_every": 1}


def cases(*stages: str, rows: tuple[int, ...]) -> list[Any]:
    return [
        pytest.param(
            stage,
            strategy,
            number,
            id=f"{stage}-{strategy.name}-{number}",
            marks=() if (stage, strategy, number) in BY_DEFAULT else pytest.mark.distributed,
        )
        for stage in stages
        for strategy in Strategy
        for number in rows
    ]


def name_of(strategy: Strategy) -> str:
    return strategy.name


def assert_equal(two: Outcome, one: Outcome, *, weights: float, metrics: float) -> None:
    assert len(set(two.digests)) == 1
    found = largest_difference(two, one), largest_metric_difference(two, one)
    print(f"DIFFERENCE {two.folder} weights {found[0]:.1e} metrics {found[1]:.1e}")
    assert found[0] < weights
    assert found[1] < metrics


@pytest.mark.parametrize(("stage", "strategy", "rows"), cases("sft", "reward", rows=(21, 17)))
def test_two_processes_train_what_one_trains(
    stage: str, strategy: Strategy, rows: int, cluster: Cluster, alone: Alone, tmp_path: Path
) -> None:
    """Batches of 8, 8 and a rest in micro-batches of 2; two epochs.

    A rest of 5 leaves one process a micro-batch short, a rest of 1 leaves it without a row: both
    take part with a ghost.
    """
    one = alone(stage, rows=rows)
    two = cluster.run(tmp_path, stage, processes=2, strategy=strategy, rows=rows).done()
    assert_equal(two, one, weights=2e-6, metrics=1e-5)


@pytest.mark.parametrize(("stage", "strategy", "rows"), cases("ppo", rows=(0,)))
def test_two_processes_do_the_ppo_of_one(
    stage: str, strategy: Strategy, rows: int, cluster: Cluster, alone: Alone, tmp_path: Path
) -> None:
    """A warm-up of the critic, then two iterations of two steps; three held-out prompts."""
    one = alone(stage, ppo=PPO)
    two = cluster.run(tmp_path, stage, processes=2, strategy=strategy, ppo=PPO).done()
    assert [row["response"] for row in two.samples] == [row["response"] for row in one.samples]
    assert_equal(two, one, weights=2e-6, metrics=5e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("strategy", [Strategy.ddp, Strategy.fsdp], ids=name_of)
def test_in_float64_two_processes_are_one(
    stage: str, strategy: Strategy, cluster: Cluster, alone: Alone, tmp_path: Path
) -> None:
    """DeepSpeed takes no float64."""
    how: dict[str, Any] = {"ppo": PPO} if stage == "ppo" else {"rows": 17}
    one = alone(stage, float64=True, **how)
    two = cluster.run(tmp_path, stage, processes=2, strategy=strategy, float64=True, **how).done()
    assert_equal(two, one, weights=1e-10, metrics=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", [Strategy.zero1, Strategy.zero2, Strategy.zero3], ids=name_of)
def test_offloaded_optimizers_train_the_same(
    strategy: Strategy, cluster: Cluster, alone: Alone, tmp_path: Path
) -> None:
    one = alone("sft", rows=21)
    two = cluster.run(tmp_path, "sft", processes=2, strategy=strategy, offload=True, rows=21).done()
    assert_equal(two, one, weights=2e-6, metrics=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", [Strategy.ddp, Strategy.zero2, Strategy.fsdp], ids=name_of)
def test_three_processes_train_what_one_trains(
    strategy: Strategy, cluster: Cluster, alone: Alone, tmp_path: Path
) -> None:
    """Shares of 3, 3 and 2 rows, then a rest of 1."""
    one = alone("sft", rows=17)
    three = cluster.run(tmp_path, "sft", processes=3, strategy=strategy, rows=17).done()
    assert_equal(three, one, weights=2e-6, metrics=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["reward", "ppo"])
@pytest.mark.parametrize("strategy", [Strategy.ddp, Strategy.zero3, Strategy.fsdp], ids=name_of)
def test_bf16_autocast_reaches_the_forward_pass(
    stage: str, strategy: Strategy, cluster: Cluster, alone: Alone, tmp_path: Path
) -> None:
    """Close to one process in bf16, and farther from one process in fp32."""
    how: dict[str, Any] = {"ppo": {**PPO, "iterations": 2}} if stage == "ppo" else {"rows": 21}
    two = cluster.run(tmp_path, stage, processes=2, strategy=strategy, bf16=True, **how).done()
    losses = [
        [row.get("train/loss", row.get("ppo/value_loss")) for row in outcome.rows][1]
        for outcome in (two, alone(stage, bf16=True, **how), alone(stage, **how))
    ]
    print("BF16", stage, strategy.name, losses)
    assert abs(losses[0] - losses[1]) < abs(losses[0] - losses[2])


def test_scores_of_shared_chunks_are_the_same_bits(
    cluster: Cluster, alone: Alone, tmp_path: Path
) -> None:
    """600 comparisons in three chunks: two for the first process, one for the second."""
    one = alone("evaluate")
    two = cluster.run(tmp_path, "evaluate", processes=2).done()
    assert two.weights["scores"].shape == (1200,)
    assert two.weights["scores"].equal(one.weights["scores"])
    assert len(set(two.digests)) == 1
