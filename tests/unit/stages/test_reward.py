from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import micro_models as micro
import micro_stages
import pytest
import torch

from rlhf.artifacts import read_json, read_jsonl
from rlhf.config import Config, Judge, JudgeData, Reward
from rlhf.data.ledger import Store
from rlhf.data.records import Comparison, Kind
from rlhf.data.split import is_judge_prompt, prompt_key
from rlhf.errors import DataError
from rlhf.inference.scoring import HfScorer
from rlhf.models.heads import read_head
from rlhf.nodes import NodeContext
from rlhf.stages import reward
from rlhf.toy import World


class Killed(Exception):
    pass


def comparison(number: int, **changes: Any) -> Comparison:
    prompt: Any = [{"role": "user", "content": f"question {number}"}]
    row = Comparison(f"id-{number}", prompt, "fish", "hay", "better", "helpfulness", "vendor")
    return replace(row, **{"batch_id": "week-1", **changes})


@pytest.fixture
def made(tmp_path: Path) -> Config:
    settings = micro_stages.config(tmp_path, every_steps=2)
    world = World(0)
    for week in (1, 2):
        rows = [
            row.to_json()
            for axis in ("helpfulness", "safety")
            for row in world.comparison_set(40, axis=axis, seed=week)
        ]
        micro_stages.add(settings, "batch", f"week-{week}", rows)
    micro_stages.add(settings, "open", "public", [row.to_json() for row in world.open_set(60, 7)])
    micro_stages.save_policy(tmp_path / "v0")
    return settings


def node(
    made: Config,
    name: str = "reward",
    *,
    axis: str = "helpfulness",
    role: str = "reward",
    round: int = 1,
    previous: str | None = None,
    **changes: Any,
) -> NodeContext:
    models = {"init": str(Path(made.paths.store).parent / "v0")}
    if previous is not None:
        models["previous"] = previous
    return micro_stages.context(
        made,
        name=name,
        stage="reward",
        models=models,
        data=[("batch", f"week-{k}", k) for k in (1, 2)] + [("open", "public", 0)],
        round=round,
        options={"axis": axis, "role": role},
        **changes,
    )


def choose(context: NodeContext, batches: Sequence[Comparison], open_: Sequence[Comparison]) -> Any:
    return reward.choose_rows(
        context, reward.Comparisons(list(batches), list(open_), frozenset({"week-1"}), {})
    )


def test_stage_leaves_its_files(made: Config) -> None:
    context = node(made)
    reward.run(context)
    names = {path.name for path in context.directory.path.iterdir()}
    assert names == {
        "accuracy.json",
        "checkpoints",
        "metrics.jsonl",
        "mixture.json",
        "model",
        "scores.jsonl",
    }
    mixture = read_json(context.directory.path / "mixture.json")
    assert mixture["rows"] == sum(mixture["sources"].values()) == sum(mixture["axes"].values())
    assert set(mixture["batches"]) == {"week-1"}, "week 2 is not there yet, open goes to judges"
    scores = read_jsonl(context.directory.path / "scores.jsonl")
    assert scores
    assert all(row["heldout"] and row["batch"] == "week-1" for row in scores)


def test_swapped_control_is_the_complement(made: Config) -> None:
    context = node(made)
    reward.run(context)
    report = read_json(context.directory.path / "accuracy.json")
    for cell in [*report["cells"], report["summary"]]:
        if cell["n"]:
            assert cell["control_swapped"] == pytest.approx(1 - cell["accuracy"])
            assert cell["low"] <= cell["accuracy"] <= cell["high"]
    for row in read_jsonl(context.directory.path / "scores.jsonl"):
        assert row["swapped_chosen_score"] == pytest.approx(row["rejected_score"], abs=1e-5)


def test_cells_cover_both_axes_and_add_up(made: Config) -> None:
    context = node(made, axis="safety")
    reward.run(context)
    report = read_json(context.directory.path / "accuracy.json")
    cells = report["cells"]
    for axis in ("helpfulness", "safety"):
        own = [cell for cell in cells if cell["axis"] == axis]
        (total,) = [c for c in own if c["source"] is None and c["strength"] is None]
        per_strength = [c for c in own if c["source"] is None and c["strength"] is not None]
        fine = [c for c in own if c["source"] is not None]
        assert total["n"] == sum(c["n"] for c in per_strength) == sum(c["n"] for c in fine)
    detection = report["summary"]["detection"]
    assert detection["gate_threshold"] == made.gate.threshold
    assert 0 <= detection["unsafe_recall"] <= 1


def test_judge_has_one_pass_and_no_mixture(made: Config) -> None:
    context = node(made, role="judge", axis="safety")
    reward.run(context)
    report = read_json(context.directory.path / "accuracy.json")
    assert report["summary"]["control_swapped"] is None
    mixture = read_json(context.directory.path / "mixture.json")
    assert mixture["axes"] == {"safety": mixture["rows"]}
    assert set(mixture["batches"]) == {"public"}


def test_second_round_keeps_the_head_and_measures_before(made: Config, tmp_path: Path) -> None:
    previous = micro_stages.save_scorer(tmp_path / "previous", seed=5)
    made.reward.optimizer.lr = 1e-12
    context = node(made, round=2, previous=previous)
    reward.run(context)
    torch.testing.assert_close(
        read_head(context.directory.model), read_head(Path(previous)), atol=1e-6, rtol=0.0
    )
    before = read_json(context.directory.path / "accuracy_before.json")
    assert {c["batch"] for c in before["cells"]} == {"week-2", None}
    assert {c["axis"] for c in before["cells"]} == {"helpfulness"}
    after = read_json(context.directory.path / "accuracy.json")
    assert {c["batch"] for c in after["cells"]} == {"week-1", "week-2", None}


def test_scores_on_arrival_are_those_of_the_previous_model(made: Config, tmp_path: Path) -> None:
    """This round's batch, all rows of the axis, trained on or held out, before any training."""
    previous = micro_stages.save_scorer(tmp_path / "previous", seed=5)
    made.reward.optimizer.lr = 1e-2
    context = node(made, round=2, previous=previous)
    reward.run(context)
    rows = read_jsonl(context.directory.path / "scores_before.jsonl")
    store = Store(Path(made.paths.store), made.data.stream)
    batch = {row.id: row for row in store.comparisons(Kind.batch, "week-2")}
    assert {row["id"] for row in rows} == {
        id for id, row in batch.items() if row.axis == "helpfulness"
    }
    assert {row["heldout"] for row in rows} == {True, False}
    scorer = HfScorer(micro.scorer(5), micro.tokenizer(), max_length=256)
    prompts = [batch[row["id"]].prompt for row in rows]
    expected = scorer(prompts, [batch[row["id"]].chosen for row in rows])
    assert [row["chosen_score"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    for row in rows:
        assert row["swapped_chosen_score"] is row["swapped_rejected_score"] is None
        assert row["annotator"] == batch[row["id"]].annotator
    counted = [row for row in rows if not row["tie"]]
    right = sum(row["chosen_score"] > row["rejected_score"] for row in counted)
    summary = read_json(context.directory.path / "accuracy_before.json")["summary"]
    assert summary["n"] == len(counted)
    assert summary["accuracy"] == pytest.approx(right / len(counted))
    after = {row["id"]: row for row in read_jsonl(context.directory.path / "scores.jsonl")}
    assert any(after[r["id"]]["chosen_score"] != r["chosen_score"] for r in rows if r["heldout"])


def test_scores_name_annotator_and_models(made: Config, tmp_path: Path) -> None:
    rows = [
        {
            "id": f"n{i}",
            "prompt": [{"role": "user", "content": f"which food {i}"}],
            "chosen": "fish",
            "rejected": "hay",
            "strength": "better",
            "axis": "helpfulness",
            "source": "vendor",
            "annotator": f"ann-{i % 2}",
            "model_chosen": "v0",
            "model_rejected": "v1",
        }
        for i in range(40)
    ]
    micro_stages.add(made, "batch", "named", rows)
    inputs = micro_stages.context(
        made,
        name="named",
        stage="reward",
        models={"init": str(Path(made.paths.store).parent / "v0")},
        data=[("batch", "named", 1), ("open", "public", 0)],
        round=1,
        options={"axis": "helpfulness", "role": "reward"},
    )
    reward.run(inputs)
    found = read_jsonl(inputs.directory.path / "scores.jsonl")
    assert len(found) > 3
    for row in found:
        number = int(row["id"].removeprefix("n"))
        names = (row["annotator"], row["model_chosen"], row["model_rejected"])
        assert names == (f"ann-{number % 2}", "v0", "v1")


@pytest.mark.parametrize("when", ["training", "scoring"])
def test_killed_stage_ends_with_the_same_files(made: Config, when: str) -> None:
    straight = node(made, "straight")
    reward.run(straight)
    killed = node(made, "killed")
    total = len(read_jsonl(straight.directory.metrics.path))
    seen: list[int] = []

    def die(done: int, _total: int) -> None:
        seen.append(done)
        if len(seen) == (3 if when == "training" else total + 1):
            raise Killed

    with pytest.raises(Killed):
        reward.run(node(made, "killed", on_step=die))
    assert killed.directory.model.exists() is (when == "scoring")
    reward.run(killed)
    for name in ("model/model.safetensors", "accuracy.json", "scores.jsonl", "mixture.json"):
        assert (killed.directory.path / name).read_bytes() == (
            straight.directory.path / name
        ).read_bytes(), name
    assert micro.rows_without_time(killed.directory.metrics) == micro.rows_without_time(
        straight.directory.metrics
    )


def test_helpfulness_mixture_is_half_own(made: Config) -> None:
    made.judge = Judge(data=JudgeData.batches, share=0.01)
    batches = [comparison(i) for i in range(20)]
    batches += [comparison(100 + i, axis="safety") for i in range(10)]
    open_ = [comparison(200 + i, batch_id="public", source="hh") for i in range(30)]
    kept = [row for row in batches if not is_judge_prompt(row.prompt, share=0.01)]
    own = sum(row.axis == "helpfulness" for row in kept)
    mixture = choose(node(made), batches, open_)
    assert mixture.num_own == mixture.num_other == own
    assert {row.axis for row in mixture.rows[own:]} == {"helpfulness", "safety"}


def test_safety_mixture_counts_open_safety_as_own(made: Config) -> None:
    """90:10 with 18 own rows (10 of batches, 8 open) leaves room for 2 others."""
    made.judge = Judge(data=JudgeData.batches, share=1e-9)
    batches = [comparison(i, axis="safety") for i in range(10)]
    batches += [comparison(100 + i) for i in range(10)]
    open_ = [comparison(200 + i, axis="safety", batch_id="public") for i in range(8)]
    open_ += [comparison(300 + i, batch_id="public") for i in range(8)]
    mixture = choose(node(made, axis="safety"), batches, open_)
    assert (mixture.num_own, mixture.num_other) == (18, 2)
    assert sum(row.axis == "safety" for row in mixture.rows) == 18


def test_heldout_rows_are_never_chosen(made: Config) -> None:
    made.judge = Judge(data=JudgeData.batches, share=0.3)
    batches = [comparison(i, heldout=i % 2 == 0) for i in range(40)]
    open_ = [comparison(50 + i, heldout=True, batch_id="public") for i in range(40)]
    for role in ("reward", "judge"):
        rows = choose(node(made, role=role), batches, open_).rows
        assert rows
        assert not any(row.heldout for row in rows)


@pytest.mark.parametrize("data", list(JudgeData))
def test_judges_and_reward_models_share_no_row(made: Config, data: JudgeData) -> None:
    made.judge = Judge(data=data, share=0.4)
    batches = [comparison(i) for i in range(60)]
    open_ = [comparison(i, id=f"open-{i}", batch_id="public") for i in range(30, 90)]
    judge = choose(node(made, role="judge"), batches, open_).rows
    trained = choose(node(made), batches, open_).rows
    assert judge
    assert trained
    assert not {row.id for row in judge} & {row.id for row in trained}
    if data is JudgeData.batches:
        keys = {prompt_key(row.prompt) for row in judge}
        assert not keys & {prompt_key(row.prompt) for row in trained}
        assert {row.batch_id for row in judge} == {"week-1"}
    else:
        assert {row.batch_id for row in judge} == {"public"}


def test_judge_cap(made: Config) -> None:
    made.judge = Judge(max_comparisons=7)
    open_ = [comparison(i, batch_id="public") for i in range(30)]
    assert len(choose(node(made, role="judge"), [], open_).rows) == 7


def test_nothing_to_train_on_is_a_user_error(made: Config) -> None:
    made.judge = Judge(data=JudgeData.batches, share=1e-9)
    with pytest.raises(DataError, match="no helpfulness comparison is left"):
        reward.run(node(made, role="judge"))


def test_margin_follows_strength_table_and_tie() -> None:
    sides = reward.Sides(comparison(0), [1], [2])
    assert reward.ranked(sides, table="small").margin == pytest.approx(2 / 3)
    assert reward.ranked(sides, table="large").margin == 2.0
    tied = replace(sides, comparison=comparison(0, tie=True))
    assert reward.ranked(tied, table="large").margin == 0.0
    ungraded = replace(sides, comparison=comparison(0, strength=None))
    assert reward.ranked(ungraded, table="large").margin == 0.0


def test_auxiliary_loss_belongs_to_the_safety_axis(made: Config) -> None:
    made.reward = Reward(batch_size=8, micro_batch_size=4, safety_loss_weight=1.0)
    for axis, expected in (("helpfulness", False), ("safety", True)):
        context = node(made, axis, axis=axis)
        reward.run(context)
        row = micro.rows_without_time(context.directory.metrics)[0]
        assert ("train/safety_loss" in row) is expected
