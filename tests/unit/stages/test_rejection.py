"""The rejection stage on a micro policy and two micro reward models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import micro_models as micro
import micro_ppo
import micro_stages
import pytest
import torch
from safetensors.torch import load_file

from rlhf import metrics
from rlhf.artifacts import NodeDir, read_json, read_jsonl, write_json, write_jsonl
from rlhf.config import Config, Rejection, Sampling
from rlhf.data.chat import IGNORED
from rlhf.errors import StageError
from rlhf.inference.best_of import choose_prompts
from rlhf.inference.scoring import HfScorer
from rlhf.inference.winners import choose_winner
from rlhf.models.loading import load_reward_model
from rlhf.nodes import NodeContext, node_seed
from rlhf.stages import rejection, sample

PART = "responses.jsonl"
FILES = {
    "metrics.jsonl",
    "model",
    "samples.jsonl",
    "selection.json",
    "shards",
    "winners.jsonl",
}


class Killed(Exception):
    pass


@pytest.fixture
def made(tmp_path: Path) -> Config:
    config = micro_stages.config(tmp_path)
    config.model.max_length = 64
    config.rejection = Rejection(
        sampling=Sampling(temperature=1.2, max_new_tokens=6, batch_size=16),
        num_samples=3,
        num_prompts=8,
        shard_prompts=3,
        pool_share=0.0,
        batch_size=4,
        micro_batch_size=4,
    )
    config.rejection.optimizer.lr = 1e-3
    prompts = [
        {"id": f"p{i}", "prompt": prompt.prompt, "is_safety": prompt.is_safety}
        for i, prompt in enumerate(micro_ppo.prompts(20))
    ]
    prompts.append(
        {"id": "long", "prompt": [{"role": "user", "content": "the cat " * 60}], "is_safety": False}
    )
    micro_stages.add(config, "prompts", "some", prompts)
    micro_stages.add(
        config,
        "sft",
        "shown",
        [
            {
                "id": f"c{i}",
                "messages": [
                    {"role": "user", "content": f"{topic} {i}"},
                    {"role": "assistant", "content": f"{topic} eats"},
                ],
            }
            for i, topic in enumerate(micro_ppo.TOPICS)
        ],
    )
    return config


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    policy = micro_ppo.save_finishing_policy(tmp_path / "policy")
    return {
        "policy": policy,
        "init": policy,
        "reward_helpfulness": micro_stages.save_scorer(tmp_path / "helpfulness", seed=1),
        "reward_safety": micro_stages.save_scorer(tmp_path / "safety", seed=2),
    }


def node(
    config: Config,
    models: dict[str, str],
    *,
    name: str = "round-02/rejection",
    on_step: Callable[[int, int], None] | None = None,
) -> NodeContext:
    return micro_stages.context(
        config,
        name=name,
        stage="rejection",
        models=models,
        data=[("prompts", "some", 0), ("sft", "shown", 0)],
        round=2,
        seed=7,
        on_step=on_step,
    )


def weights(directory: NodeDir) -> dict[str, torch.Tensor]:
    return load_file(directory.model / "model.safetensors")


def shard_rows(directory: NodeDir) -> list[dict[str, Any]]:
    paths = sorted((directory.path / "shards").iterdir())
    return [row for path in paths for row in read_jsonl(path)]


def test_stage_leaves_its_files(made: Config, models: dict[str, str]) -> None:
    context = node(made, models)
    rejection.run(context)
    directory = context.directory
    assert {p.name for p in directory.path.iterdir()} - {"checkpoints"} == FILES
    assert len(list((directory.path / "shards").iterdir())) == 3
    rows = shard_rows(directory)
    assert len(rows) == 8
    assert {len(row["responses"]) for row in rows} == {3}
    selection = read_json(directory.path / "selection.json")
    winners = read_jsonl(directory.path / "winners.jsonl")
    assert selection["prompts"]["sampled"] == 8
    assert selection["prompts"]["over_long"] + selection["prompts"]["heldout"] >= 1
    assert selection["prompts"]["in_store"] == 21
    assert selection["prompts"]["without_usable_sample"] == 8 - len(winners)
    assert selection["responses"]["sampled"] == 24
    assert (selection["version"], selection["temperature"]) == ("policy", 1.2)
    assert selection["diversity"]["self_bleu"]["n"] == 8
    origin = selection["winners_from"]
    for part in ("sources", "axes"):
        assert sum(origin[part].values()) == len(winners)
    assert sum(origin["sample_index"]) == sum(origin["length_rank"]) == len(winners)
    assert origin["pool_rounds"] == {}
    for curve in selection["against_n"].values():
        assert curve["max"] == sorted(curve["max"])
        assert len(curve["median"]) == 3
    rows_logged = read_jsonl(directory.path / "metrics.jsonl")
    assert any(f"{metrics.REJECTION_MAX_SCORE}/helpfulness" in row for row in rows_logged)
    assert (
        micro.largest_difference(
            weights(directory), load_file(Path(models["init"]) / "model.safetensors")
        )
        > 1e-4
    )


def test_winners_are_the_best_of_their_prompt(made: Config, models: dict[str, str]) -> None:
    """Scores in the shards are those of the two models, each response with its own prompt."""
    context = node(made, models)
    rejection.run(context)
    rows = {row["prompt_id"]: row for row in shard_rows(context.directory)}
    prompts, responses = [], []
    for row in rows.values():
        prompts += [row["prompt"]] * 3
        responses += [response["text"] for response in row["responses"]]
    for axis in ("helpfulness", "safety"):
        model = load_reward_model(
            models[f"reward_{axis}"], model=made.model, new_head=False, seed=0
        )
        expected = HfScorer(model, micro.tokenizer(), max_length=200)(prompts, responses)
        found = [response[axis] for row in rows.values() for response in row["responses"]]
        assert found == pytest.approx(expected.tolist(), abs=1e-5)
    winners = read_jsonl(context.directory.path / "winners.jsonl")
    assert len(winners) >= 5
    for winner in winners:
        row = rows[winner["prompt_id"]]
        index = choose_winner(row, threshold=made.gate.threshold)
        assert index is not None
        best = row["responses"][index]
        assert best["finished"]
        assert (winner["response"], winner["score"]) == (best["text"], best[winner["axis"]])
        assert (winner["prompt"], winner["round"]) == (row["prompt"], 2)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_killed_stage_ends_with_the_same_files(
    made: Config, models: dict[str, str], step: int
) -> None:
    """Killed after the first and second shard, and after the first fine-tuning step."""
    made.checkpoint.every_steps = 1
    straight = node(made, models, name="straight")
    rejection.run(straight)
    seen: list[int] = []

    def die(*_: int) -> None:
        seen.append(1)
        if len(seen) == step:
            raise Killed

    with pytest.raises(Killed):
        rejection.run(node(made, models, name="broken", on_step=die))
    resumed = node(made, models, name="broken")
    shards = {p: p.stat().st_mtime_ns for p in (resumed.directory.path / "shards").iterdir()}
    assert len(shards) == min(step, 3)
    rejection.run(resumed)
    assert all(p.stat().st_mtime_ns == when for p, when in shards.items())
    for name in ("winners.jsonl", "selection.json", "samples.jsonl"):
        ours, theirs = (c.directory.path / name for c in (resumed, straight))
        assert ours.read_bytes() == theirs.read_bytes()
    assert micro.largest_difference(weights(resumed.directory), weights(straight.directory)) == 0.0
    found = [micro.rows_without_time(c.directory.metrics) for c in (resumed, straight)]
    assert found[0] == found[1]


def test_mixture_takes_pool_and_demonstrations_by_share(
    made: Config, models: dict[str, str], tmp_path: Path
) -> None:
    """4 winners at shares .3 and .2 are half of 8 rows: 2.4 and 1.6 more, rounded to 2 and 2."""
    made.rejection.pool_share, made.rejection.sft_share = 0.3, 0.2
    for number in (1, 2):
        (tmp_path / f"pool{number}").mkdir()
        rows = [
            {
                "prompt_id": f"old{number}-{i}",
                "prompt": [{"role": "user", "content": "the cat"}],
                "response": f"eats {number}",
                "round": number,
            }
            for i in range(3)
        ]
        write_jsonl(tmp_path / f"pool{number}" / "winners.jsonl", rows)
    pools = {f"pool_{number}": str(tmp_path / f"pool{number}") for number in (1, 2)}
    # The earlier answer in the prompt is context; only the winner itself is trained on.
    prompt = [
        {"role": "user", "content": "the dog"},
        {"role": "assistant", "content": "eats"},
        {"role": "user", "content": "bread"},
    ]
    winners = [{"prompt_id": str(i), "prompt": prompt, "response": "red"} for i in range(4)]
    context = node(made, {**models, **pools})
    pool = rejection._pool(context, winners)
    encoded, counts = rejection._training_rows(context, winners, pool, micro.tokenizer())
    assert counts == {"winners": 4, "pool": 2, "demonstrations": 2, "over_long": 0}
    texts = []
    for row in encoded:
        answer = [token for token in row.labels if token != IGNORED]
        texts.append(micro.tokenizer().decode(answer))
        assert row.input_ids[-len(answer) :] == answer
        assert 0 < len(answer) < len(row.input_ids)
    assert texts[:4] == ["red<eos>"] * 4
    assert all(text in ("eats 1<eos>", "eats 2<eos>") for text in texts[4:6])
    assert all(text.endswith("eats<eos>") for text in texts[6:])


def test_one_sample_per_prompt_is_enough(made: Config, models: dict[str, str]) -> None:
    made.rejection.num_samples = 1
    made.rejection.num_prompts = None
    context = node(made, models)
    rejection.run(context)
    selection = read_json(context.directory.path / "selection.json")
    assert len(selection["against_n"]["helpfulness"]["max"]) == 1
    assert selection["fine_tuning"]["winners"] == len(
        read_jsonl(context.directory.path / "winners.jsonl")
    )


def test_no_heldout_prompt_is_sampled(made: Config, models: dict[str, str]) -> None:
    made.rejection.num_prompts = None
    context = node(made, models)
    chosen, counts = choose_prompts(context, micro.tokenizer(), seed=context.seed)
    assert counts["heldout"] > 0
    assert counts["in_store"] == counts["heldout"] + counts["over_long"] + counts["sampled"]
    assert not any(prompt.heldout for prompt in chosen)
    assert "long" not in {prompt.id for prompt in chosen}


def test_no_winner_at_all_is_refused(made: Config, models: dict[str, str], tmp_path: Path) -> None:
    models["policy"] = micro_ppo.save_finishing_policy(tmp_path / "endless", eos=-20.0)
    with pytest.raises(StageError, match=r"none of 8 prompts.*max_new_tokens"):
        rejection.run(node(made, models))


def sampled(config: Config, models: dict[str, str], shard: int, of: int) -> NodeContext:
    """Return a sample node of two that work for the rejection node of `node`."""
    context = micro_stages.context(
        config,
        name=f"round-02/sample-{shard}",
        stage="sample",
        models={role: path for role, path in models.items() if role != "init"},
        data=[("prompts", "some", 0)],
        round=2,
        options={"shard": shard, "of": of, "for": "round-02/rejection"},
        seed=99 + shard,
    )
    sample.run(context)
    return context


def test_the_parts_of_several_jobs_are_the_bits_of_one(
    made: Config, models: dict[str, str]
) -> None:
    seed = node_seed(made.seed, "round-02/rejection")
    alone = replace(node(made, models), seed=seed)
    rejection.run(alone)
    parts = [sampled(made, models, shard, 2).directory for shard in range(2)]
    sizes = [len(read_jsonl(part.path / "responses.jsonl")) for part in parts]
    assert sizes == [5, 3]  # shards of 3, 3 and 2 prompts, every second one

    roles = {f"sampled_{n}": str(part.path) for n, part in enumerate(parts)}
    merged = node(made, {**models, **roles}, name="round-02/merged")
    rejection.run(replace(merged, seed=seed))
    assert not (merged.directory.path / "shards").exists()
    for file in ("winners.jsonl", "selection.json", "model/model.safetensors"):
        found, wanted = merged.directory.path / file, alone.directory.path / file
        assert found.read_bytes() == wanted.read_bytes(), file


def test_the_chosen_temperature_is_the_one_that_samples(
    made: Config, models: dict[str, str], tmp_path: Path
) -> None:
    """A sweep that chose 0.7 gives the bits of a run that is set to 0.7, in jobs of both kinds."""
    write_json(tmp_path / "sweep" / "temperature.json", {"chosen": 0.7})
    seed = node_seed(made.seed, "round-02/rejection")
    swept = {**models, "sweep": str(tmp_path / "sweep")}
    chosen = replace(node(made, swept, name="chosen"), seed=seed)
    rejection.run(chosen)
    assert read_json(chosen.directory.path / "selection.json")["temperature"] == 0.7
    parts = [read_jsonl(sampled(made, swept, n, 2).directory.path / PART) for n in range(2)]
    hot = replace(node(made, models, name="hot"), seed=seed)
    rejection.run(hot)
    made.rejection.sampling.temperature = 0.7
    fixed = replace(node(made, models, name="fixed"), seed=seed)
    rejection.run(fixed)
    for file in ("winners.jsonl", "selection.json", "model/model.safetensors"):
        ours, theirs = (c.directory.path / file for c in (chosen, fixed))
        assert ours.read_bytes() == theirs.read_bytes(), file
    rows = {row["prompt_id"]: row for part in parts for row in part}
    assert rows == {row["prompt_id"]: row for row in shard_rows(fixed.directory)}
    assert shard_rows(hot.directory) != shard_rows(fixed.directory)


def test_a_missing_part_is_refused(made: Config, models: dict[str, str]) -> None:
    part = sampled(made, models, 0, 2).directory
    seed = node_seed(made.seed, "round-02/rejection")
    merged = replace(node(made, {**models, "sampled_0": str(part.path)}), seed=seed)
    with pytest.raises(StageError, match=r"no responses to 3 of 8 prompts, such as p\d+"):
        rejection.run(merged)
