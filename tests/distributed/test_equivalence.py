"""Two processes train what one trains, with every strategy: weights and metrics, uneven batches.

Sums are taken in another order, so the last digits differ; every tolerance stands beside the
largest difference that was seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, Outcome, largest_difference, largest_metric_difference

from rlhf.config import Strategy

Alone = Callable[..., Outcome]


@pytest.mark.parametrize("strategy", list(Strategy), ids=lambda found: found.name)
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_two_processes_train_what_one_trains(
    stage: str, strategy: Strategy, cluster: Cluster, alone: Alone, tmp_path: Path
) -> None:
    """Batches of 8, 8 and 5 rows in micro-batches of 2: the last one needs a ghost."""
    one = alone(stage)
    two = cluster.run(tmp_path, stage, processes=2, strategy=strategy).done()
    assert len(set(two.digests)) == 1
    print(
        "DIFF",
        stage,
        strategy.name,
        largest_difference(two, one),
        largest_metric_difference(two, one),
    )
    assert largest_difference(two, one) < 1e-5
    assert largest_metric_difference(two, one) < 1e-4


PPO = {"iterations": 3, "critic_warmup_iterations": 1, "micro_batch_size": 1, "heldout_every": 1}


@pytest.mark.parametrize("strategy", list(Strategy), ids=lambda found: found.name)
def test_two_processes_do_the_ppo_of_one(
    strategy: Strategy, cluster: Cluster, alone: Alone, tmp_path: Path
) -> None:
    """A warm-up of the critic, then two iterations of two steps; three held-out prompts."""
    one = alone("ppo", ppo=PPO)
    two = cluster.run(tmp_path, "ppo", processes=2, strategy=strategy, ppo=PPO).done()
    assert len(set(two.digests)) == 1
    assert [row["response"] for row in two.samples] == [row["response"] for row in one.samples]
    print(
        "DIFF ppo", strategy.name, largest_difference(two, one), largest_metric_difference(two, one)
    )
    assert largest_difference(two, one) < 1e-5
    assert largest_metric_difference(two, one) < 1e-4
