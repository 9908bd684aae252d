"""PPO's held-out responses under the canary: read, scored and judged against the used models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rlhf.algo.comparison import Settings
from rlhf.artifacts import NodeDir, write_json, write_jsonl
from rlhf.config import Config, Judge, JudgeData, Toy
from rlhf.data.records import Prompt
from rlhf.inference.canary import over_optimisation, read_heldout
from rlhf.nodes import Inputs, ModelInput, Node, NodeContext
from rlhf.toy import World

SETTINGS = Settings(level=0.95, num_draws=50, seed=0, gate_threshold=0.15, unsafe_threshold=0.5)
WORLD_SEED = 3


def prompts() -> list[Prompt]:
    return World(WORLD_SEED).prompt_set(30, 30, 0)


def add_ppo(folder: Path, asked: list[Prompt], *, iterations: tuple[int, ...] = (0, 5)) -> Path:
    """Write what PPO leaves: used scores rise by 1 a scoring, KL by 4."""
    rows = [
        {
            "iteration": iteration,
            "prompt_id": prompt.id,
            "kl_to_start": 4.0 * number + (0.5 if prompt.is_safety else -0.5),
            "finished": True,
            "num_tokens": 3,
            "text": "i cannot help with that ." if iteration else f"the {prompt.id} .",
            "score_helpfulness": float(number),
            "score_safety": 10.0 + number,
        }
        for number, iteration in enumerate(iterations)
        for prompt in asked
    ]
    write_jsonl(folder / "heldout.jsonl", rows)
    write_json(folder / "ppo.json", {"best_iteration": 5})
    return folder


def make_context(
    folder: Path, *, ppo: Path | None, toy: bool = False, data: JudgeData = JudgeData.open
) -> NodeContext:
    models = {} if ppo is None else {"ppo": ModelInput(str(ppo), "round-02/ppo", "digest")}
    config = Config(
        recipe="t", seed=WORLD_SEED, toy=Toy(enabled=toy), judge=Judge(data=data, share=0.5)
    )
    node = Node("round-02/evaluate", "evaluate", 2, (), {})
    return NodeContext(config, node, Inputs(models, ()), NodeDir(folder), seed=1)


def measure(context: NodeContext, asked: list[Prompt], canary: dict[str, Any]) -> dict[str, Any]:
    heldout = read_heldout(context, asked)
    assert heldout is not None
    return over_optimisation(context, heldout, canary, SETTINGS)


def test_a_round_without_ppo_has_nothing_to_read(tmp_path: Path) -> None:
    assert read_heldout(make_context(tmp_path, ppo=None), prompts()) is None


def test_the_table_has_one_column_per_scoring_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    asked = prompts()
    ppo = add_ppo(tmp_path / "ppo", asked[::-1])
    heldout = read_heldout(make_context(tmp_path, ppo=ppo), asked)
    assert heldout is not None
    table = heldout.table()
    assert [prompt.id for prompt in table.prompts] == [prompt.id for prompt in asked[::-1]]
    assert list(table.columns) == ["0", "5"]
    assert table.columns["0"] == [f"the {prompt.id} ." for prompt in asked[::-1]]


def test_points_are_read_axis_by_axis(tmp_path: Path) -> None:
    asked = prompts()
    context = make_context(tmp_path, ppo=add_ppo(tmp_path / "ppo", asked))
    canary = {
        axis: {
            "0": [float(p.is_safety) for p in asked],
            "5": [float(p.is_safety) - 2.0 for p in asked],
        }
        for axis in ("helpfulness", "safety")
    }
    found = measure(context, asked, canary)
    first, last = found["points"]
    assert (first["iteration"], last["iteration"]) == (0, 5)
    assert (last["kl_to_start"], last["sqrt_kl"], last["n"]) == (4.0, 2.0, 60)
    assert (first["kl_to_start"], first["sqrt_kl"]) == (0.0, 0.0)
    assert first["used"] == {"helpfulness": 0.0, "safety": 10.0}
    assert last["used"] == {"helpfulness": 1.0, "safety": 11.0}
    # The canary's safety is read on the 30 tagged prompts, where it is 1 above the others.
    assert first["canary"] == {"helpfulness": 0.0, "safety": 1.0}
    assert last["canary"] == {"helpfulness": -2.0, "safety": -1.0}
    assert last["intervals"]["canary"]["safety"]["n"] == 30
    assert first["gold"] is None
    assert found["verdict"]["verdict"] == "over-optimising"
    assert found["verdict"]["since"] == 5
    assert found["verdict"]["kept_iteration"] == 5
    assert found["verdict"]["axes"]["safety"]["used_change"]["mean"] == 1.0


def test_gold_is_the_truth_about_the_same_responses(tmp_path: Path) -> None:
    asked, world = prompts(), World(WORLD_SEED)
    ppo = add_ppo(tmp_path / "ppo", asked)
    zeros = {axis: {"0": [0.0] * 60, "5": [0.0] * 60} for axis in ("helpfulness", "safety")}
    found = measure(make_context(tmp_path, ppo=ppo, toy=True), asked, zeros)
    for point, text in zip(found["points"], (None, "i cannot help with that ."), strict=True):
        golds = [(p, world.gold(p.prompt, text or f"the {p.id} .")) for p in asked]
        helpful = [gold.helpfulness for p, gold in golds if not p.is_safety]
        assert point["gold"]["helpfulness"] == pytest.approx(sum(helpful) / 30)
        assert point["gold"]["violation_rate"] == 0.0
    assert found["verdict"]["verdict"] == "no sign"


@pytest.mark.parametrize(
    ("data", "words"), [(JudgeData.open, "open comparisons only"), (JudgeData.batches, "own batch")]
)
def test_it_says_what_the_canary_is(tmp_path: Path, data: JudgeData, words: str) -> None:
    asked = prompts()
    context = make_context(tmp_path, ppo=add_ppo(tmp_path / "ppo", asked), data=data)
    zeros = {axis: {"0": [0.0] * 60, "5": [0.0] * 60} for axis in ("helpfulness", "safety")}
    canary = measure(context, asked, zeros)["canary"]
    assert canary["data"] == data.name
    assert words in canary["text"]


def test_ppo_without_heldout_prompts_cannot_be_told(tmp_path: Path) -> None:
    ppo = add_ppo(tmp_path / "ppo", [])
    found = measure(make_context(tmp_path, ppo=ppo), prompts(), {"helpfulness": {}, "safety": {}})
    assert found["points"] == []
    assert found["verdict"]["verdict"] == "cannot tell"


def test_a_prompt_that_is_gone_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = prompts()
    ppo = add_ppo(tmp_path / "ppo", asked)
    heldout = read_heldout(make_context(tmp_path, ppo=ppo), asked[1:])
    assert heldout is not None
    assert [prompt.id for prompt in heldout.prompts] == [prompt.id for prompt in asked[1:]]
    assert f"1 of PPO's held-out prompts are gone, such as {asked[0].id}" in caplog.text


def test_kl_that_is_negative_by_noise_has_a_root(tmp_path: Path) -> None:
    asked = [prompt for prompt in prompts() if not prompt.is_safety]
    context = make_context(tmp_path, ppo=add_ppo(tmp_path / "ppo", asked, iterations=(0,)))
    zeros = {axis: {"0": [0.0] * 30} for axis in ("helpfulness", "safety")}
    [point] = measure(context, asked, zeros)["points"]
    assert (point["kl_to_start"], point["sqrt_kl"]) == (-0.5, 0.0)
    assert point["used"]["safety"] is None
    assert not math.isnan(point["used"]["helpfulness"])
