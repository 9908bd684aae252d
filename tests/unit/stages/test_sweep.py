"""The sweep: same prompts and random numbers at every temperature, and the choice by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import micro_models as micro
import micro_ppo
import micro_stages
import pytest

from rlhf.artifacts import read_json, read_jsonl
from rlhf.config import Config, Rejection, Sampling
from rlhf.errors import StageError
from rlhf.inference.best_of import choose_prompts
from rlhf.nodes import NodeContext, node_seed
from rlhf.stages import sweep

TEMPERATURES = [0.5, 1.0, 1.5]
FOR = "round-02/rejection"


class Killed(Exception):
    pass


@pytest.fixture
def made(tmp_path: Path) -> Config:
    config = micro_stages.config(tmp_path)
    config.model.max_length = 64
    config.rejection = Rejection(
        sampling=Sampling(temperature=9.0, max_new_tokens=6, batch_size=16),
        num_samples=4,
        num_prompts=12,
        shard_prompts=4,
        temperatures=list(TEMPERATURES),
        sweep_prompts=6,
    )
    rows = [
        {"id": f"p{i}", "prompt": prompt.prompt, "is_safety": prompt.is_safety}
        for i, prompt in enumerate(micro_ppo.prompts(24))
    ]
    micro_stages.add(config, "prompts", "some", rows)
    return config


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    return {
        "policy": micro_ppo.save_finishing_policy(tmp_path / "policy"),
        "reward_helpfulness": micro_stages.save_scorer(tmp_path / "helpfulness", seed=1),
        "reward_safety": micro_stages.save_scorer(tmp_path / "safety", seed=2),
    }


def node(
    config: Config,
    models: dict[str, str],
    *,
    name: str = "round-02/sweep",
    on_step: Callable[[int, int], None] | None = None,
) -> NodeContext:
    return micro_stages.context(
        config,
        name=name,
        stage="sweep",
        models=models,
        data=[("prompts", "some", 0)],
        round=2,
        options={"for": FOR},
        seed=7,
        on_step=on_step,
    )


def shard_rows(context: NodeContext, index: int) -> list[dict[str, Any]]:
    paths = sorted((context.directory.path / "shards").glob(f"t{index:02d}-*.jsonl"))
    return [row for path in paths for row in read_jsonl(path)]


def test_stage_leaves_its_files(made: Config, models: dict[str, str]) -> None:
    steps: list[tuple[int, int]] = []
    context = node(made, models, on_step=lambda step, total: steps.append((step, total)))
    sweep.run(context)
    assert {path.name for path in context.directory.path.iterdir()} == {
        "shards",
        "temperature.json",
    }
    # 6 prompts are shards of 4 and 2, at three temperatures.
    assert steps == [(number, 6) for number in range(1, 7)]
    found = read_json(context.directory.path / "temperature.json")
    assert (found["version"], found["num_samples"], found["prompts"]) == ("policy", 4, 6)
    assert "standardised per axis" in found["criterion"]
    rows = found["temperatures"]
    assert [row["temperature"] for row in rows] == TEMPERATURES
    assert [row["temperature"] for row in rows if row["chosen"]] == [found["chosen"]]
    assert found["chosen"] == max(rows, key=lambda row: row["score"])["temperature"]
    assert sum(row["score"] for row in rows) == pytest.approx(0.0, abs=1e-9)
    for index, row in enumerate(rows):
        assert row["low"] <= row["score"] <= row["high"]
        assert sum(axis["prompts"] for axis in row["axes"].values()) == 6
        assert all(len(axis["max"]) == 4 for axis in row["axes"].values())
        assert row["self_bleu"]["n"] == 6
        responses = [r for shard in shard_rows(context, index) for r in shard["responses"]]
        assert row["finished_fraction"] == sum(r["finished"] for r in responses) / 24
        assert row["response_length"] == sum(r["num_tokens"] for r in responses) / 24


def test_prompts_are_the_rounds_own_and_the_same_at_every_temperature(
    made: Config, models: dict[str, str]
) -> None:
    context = node(made, models)
    sweep.run(context)
    asked = [[row["prompt_id"] for row in shard_rows(context, index)] for index in range(3)]
    assert asked[0] == asked[1] == asked[2]
    assert len(asked[0]) == 6
    made.rejection.num_prompts = None
    seed = node_seed(made.seed, FOR)
    every, _ = choose_prompts(context, micro.tokenizer(), seed=seed)
    few, counts = choose_prompts(context, micro.tokenizer(), seed=seed, at_most=6)
    assert [prompt.id for prompt in few] == asked[0]
    assert set(asked[0]) < {prompt.id for prompt in every}
    assert not any(prompt.heldout for prompt in few)
    assert counts["sampled"] == 6


def test_the_least_temperature_is_nearly_the_most_likely_answer(
    made: Config, models: dict[str, str]
) -> None:
    """At 0.01 all K responses are the same; hotter ones differ more and more."""
    made.rejection.temperatures = [0.01, 1.0, 3.0]
    context = node(made, models)
    sweep.run(context)
    rows = read_json(context.directory.path / "temperature.json")["temperatures"]
    bleus = [row["self_bleu"]["mean"] for row in rows]
    assert bleus[0] == 1.0
    assert bleus[0] > bleus[1] > bleus[2]
    assert rows[0]["axes"]["helpfulness"]["max"][0] == pytest.approx(
        rows[0]["axes"]["helpfulness"]["max"][-1]
    )


def planted(values: list[list[float]], *, is_safety: list[bool]) -> list[list[dict[str, Any]]]:
    """Return rows [T][P] of one finished response with this score of the prompt's axis."""
    return [
        [
            {
                "prompt_id": str(p),
                "prompt": [{"role": "user", "content": f"ask {p}"}],
                "is_safety": is_safety[p],
                "responses": [
                    {
                        "text": "a",
                        "finished": True,
                        "num_tokens": 1,
                        "helpfulness": 0.0 if is_safety[p] else value,
                        "safety": value if is_safety[p] else 9.0,
                    }
                ],
            }
            for p, value in enumerate(of_temperature)
        ]
        for of_temperature in values
    ]


@pytest.mark.parametrize(
    ("values", "is_safety", "best"),
    [
        ([[1, 1], [2, 2], [1, 1]], [False, False], 1.0),
        # Safety is in units of a hundred and prefers 0.5; two helpfulness prompts prefer 1.5.
        ([[0, 0, 200], [1, 1, 150], [2, 2, 100]], [False, False, True], 1.5),
        ([[1, 1], [2, 2], [2, 2]], [False, False], 1.0),  # of equal ones the lower temperature
        ([[5, 5], [5, 5], [5, 5]], [False, True], 0.5),
    ],
)
def test_the_choice_by_hand(
    made: Config,
    models: dict[str, str],
    values: list[list[float]],
    is_safety: list[bool],
    best: float,
) -> None:
    found = sweep.compare(node(made, models), planted(values, is_safety=is_safety))
    assert found["chosen"] == best


def test_temperatures_may_stand_in_any_order(made: Config, models: dict[str, str]) -> None:
    made.rejection.temperatures = [1.5, 0.5]
    rows = planted([[2.0], [2.0]], is_safety=[False])
    assert sweep.compare(node(made, models), rows)["chosen"] == 0.5


@pytest.mark.parametrize("step", [1, 3, 5])
def test_killed_stage_ends_with_the_same_files(
    made: Config, models: dict[str, str], step: int
) -> None:
    straight = node(made, models, name="straight")
    sweep.run(straight)

    def die(done: int, _total: int) -> None:
        if done == step:
            raise Killed

    with pytest.raises(Killed):
        sweep.run(node(made, models, name="broken", on_step=die))
    resumed = node(made, models, name="broken")
    shards = {p: p.stat().st_mtime_ns for p in (resumed.directory.path / "shards").iterdir()}
    assert len(shards) == step
    sweep.run(resumed)
    assert all(p.stat().st_mtime_ns == when for p, when in shards.items())
    for path in straight.directory.path.rglob("*.json*"):
        ours = resumed.directory.path / path.relative_to(straight.directory.path)
        assert ours.read_bytes() == path.read_bytes()


def test_no_prompt_that_fits_is_refused(made: Config, models: dict[str, str]) -> None:
    made.model.max_length = 8
    with pytest.raises(StageError, match=r"none of 24 prompts.*model\.max_length"):
        sweep.run(node(made, models))
