"""Stopped, killed, hung or diverged: what is kept, what is said, and with whom a node goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainings import Cluster, Outcome, largest_difference

from rlhf.artifacts import read_json, read_jsonl
from rlhf.config import Strategy
from rlhf.errors import STOPPED_EXIT

ROWS = 61
"""16 steps of SFT: time enough for a signal to arrive in the middle."""
PPO = {"iterations": 6, "heldout_every": 2, "micro_batch_size": 1}
MORE = pytest.mark.distributed


def saved_step(outcome: Outcome) -> int:
    saved = outcome.directory.last_checkpoint()
    assert saved is not None
    return saved.step


def settings(stage: str) -> dict[str, Any]:
    return {"ppo": PPO} if stage == "ppo" else {"rows": ROWS}


@pytest.mark.parametrize(
    ("stage", "strategy"),
    [
        pytest.param("sft", Strategy.zero2, id="sft-zero2"),
        pytest.param("sft", Strategy.ddp, id="sft-ddp", marks=MORE),
        pytest.param("sft", Strategy.fsdp, id="sft-fsdp", marks=MORE),
        pytest.param("reward", Strategy.zero3, id="reward-zero3", marks=MORE),
        pytest.param("ppo", Strategy.ddp, id="ppo-ddp"),
        pytest.param("ppo", Strategy.zero1, id="ppo-zero1", marks=MORE),
        pytest.param("ppo", Strategy.zero2, id="ppo-zero2", marks=MORE),
        pytest.param("ppo", Strategy.zero3, id="ppo-zero3", marks=MORE),
        pytest.param("ppo", Strategy.fsdp, id="ppo-fsdp", marks=MORE),
    ],
)
def test_a_stopped_node_goes_on_to_the_same_bits(
    stage: str, strategy: Strategy, cluster: Cluster, tmp_path: Path
) -> None:
    """One process sends SIGUSR1 to the supervisor; all save after the same step and end with 75."""
    how: dict[str, Any] = {"processes": 2, "strategy": strategy, **settings(stage)}
    straight = cluster.run(tmp_path / "straight", stage, **how).done()
    stopped = cluster.run(tmp_path / "stopped", stage, fault="stop:1:3", **how)
    assert stopped.code == STOPPED_EXIT, stopped.logs[-6000:]
    assert 3 <= saved_step(stopped) < straight.rows[-1]["step"]

    resumed = cluster.run(tmp_path / "stopped", stage, **how).done()
    assert largest_difference(resumed, straight) == 0.0
    assert resumed.rows == straight.rows
    assert resumed.digests == straight.digests
    assert read_json(resumed.folder / "manifest.json")["exact"] is True


@pytest.mark.parametrize(
    "strategy", [Strategy.ddp, pytest.param(Strategy.zero2, marks=MORE)], ids=["ddp", "zero2"]
)
def test_a_killed_process_is_named_and_nothing_is_lost(
    strategy: Strategy, cluster: Cluster, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"processes": 2, "strategy": strategy, "every_steps": 2}
    straight = cluster.run(tmp_path / "straight", "sft", **how).done()
    killed = cluster.run(tmp_path / "killed", "sft", fault="kill:1:5", **how)
    assert killed.code not in (0, STOPPED_EXIT)
    assert saved_step(killed) == 4
    assert "StageError" in killed.log
    report = [line for line in killed.log.splitlines() if line.startswith("rank 1 ")]
    assert "at `step 5` for" in report[-1]

    resumed = cluster.run(tmp_path / "killed", "sft", **how).done()
    assert "continuing at step 4" in resumed.log
    assert largest_difference(resumed, straight) == 0.0
    assert resumed.rows == straight.rows


@MORE
@pytest.mark.parametrize("strategy", list(Strategy), ids=lambda found: found.name)
def test_a_hanging_process_and_its_place_are_named(
    strategy: Strategy, cluster: Cluster, tmp_path: Path
) -> None:
    hung = cluster.run(
        tmp_path, "sft", processes=2, strategy=strategy, fault="hang:1:3", timeout_seconds=5
    )
    assert hung.code == 1
    report = [line for line in hung.log.splitlines() if line.startswith("rank ")]
    assert "at `step 3` for" in next(line for line in report if line.startswith("rank 1 "))
    assert "of step 4` for" in next(line for line in report if line.startswith("rank 0 "))


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy.ddp,
        pytest.param(Strategy.zero2, marks=MORE),
        pytest.param(Strategy.fsdp, marks=MORE),
    ],
    ids=["ddp", "zero2", "fsdp"],
)
def test_divergence_stops_every_process_and_keeps_the_checkpoint(
    strategy: Strategy, cluster: Cluster, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"processes": 2, "strategy": strategy, "every_steps": 1, "lr": 1e30}
    failed = cluster.run(tmp_path, "sft", **how)
    assert failed.code == 1
    kept = saved_step(failed)
    for rank in ("log.txt", "processes/1.log"):
        log = (failed.folder / rank).read_text(encoding="utf-8")
        assert f"at step {kept + 1} of 6; the last checkpoint" in log
    assert [row["step"] for row in read_jsonl(failed.folder / "metrics.jsonl")] == [
        *range(1, kept + 1)
    ]


@MORE
@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize(
    ("strategy", "others"),
    [
        (Strategy.ddp, [(1, Strategy.ddp), (2, Strategy.fsdp)]),
        (Strategy.fsdp, [(1, Strategy.fsdp), (2, Strategy.zero0)]),
        (Strategy.zero0, [(1, Strategy.zero0), (2, Strategy.ddp)]),
    ],
    ids=["ddp", "fsdp", "zero0"],
)
def test_whole_states_go_on_with_others(
    stage: str,
    strategy: Strategy,
    others: list[tuple[int, Strategy]],
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    """With another number of processes or strategy: not the same bits, but the same training."""
    how = settings(stage)
    straight = cluster.run(tmp_path / "straight", stage, processes=2, **how).done()
    for number, (processes, other) in enumerate(others):
        folder = tmp_path / str(number)
        stopped = cluster.run(
            folder, stage, processes=2, strategy=strategy, fault="stop:1:3", **how
        )
        assert stopped.code == STOPPED_EXIT, stopped.logs[-6000:]
        resumed = cluster.run(folder, stage, processes=processes, strategy=other, **how).done()
        assert "the last digits may differ" in resumed.log
        assert read_json(resumed.folder / "manifest.json")["exact"] is False
        assert [row["step"] for row in resumed.rows] == [row["step"] for row in straight.rows]
        print("DIFF", stage, strategy.name, other.name, largest_difference(resumed, straight))
        assert largest_difference(resumed, straight) < 1e-5


@pytest.mark.parametrize(
    ("stage", "processes", "other"),
    [
        pytest.param("sft", 1, Strategy.zero2, id="sft-alone"),
        pytest.param("sft", 2, Strategy.zero3, id="sft-zero3", marks=MORE),
        pytest.param("ppo", 2, Strategy.ddp, id="ppo-ddp", marks=MORE),
    ],
)
def test_parts_of_zero_are_refused_by_others(
    stage: str, processes: int, other: Strategy, cluster: Cluster, tmp_path: Path
) -> None:
    how = settings(stage)
    stopped = cluster.run(
        tmp_path, stage, processes=2, strategy=Strategy.zero2, fault="stop:1:3", **how
    )
    assert stopped.code == STOPPED_EXIT, stopped.logs[-6000:]
    kept = saved_step(stopped)
    refused = cluster.run(tmp_path, stage, processes=processes, strategy=other, **how)
    assert refused.code == 1
    assert "its optimizer state is cut into 2 parts by zero2" in refused.log
    assert "go on with distributed.strategy=zero2 and 2 processes" in refused.log
    assert saved_step(refused) == kept
