"""The PPO stage on a micro policy, a critic from a reward model and two reward models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import micro_models as micro
import micro_ppo
import micro_stages
import pytest
import torch
from safetensors.torch import load_file

from rlhf import metrics
from rlhf.artifacts import read_json, read_jsonl
from rlhf.config import Config, CriticInit
from rlhf.errors import ArtifactError, ConfigError, StageError
from rlhf.models.loading import load_policy
from rlhf.nodes import NodeContext
from rlhf.stages import ppo


class Killed(Exception):
    pass


@pytest.fixture
def made(tmp_path: Path) -> Config:
    config = micro_stages.config(tmp_path)
    config.model.max_length = 64
    config.ppo = micro_ppo.config(critic_warmup_iterations=1).ppo
    prompts = [
        {"id": f"p{i}", "prompt": prompt.prompt, "is_safety": prompt.is_safety}
        for i, prompt in enumerate(micro_ppo.prompts(24))
    ]
    prompts.append(
        {"id": "long", "prompt": [{"role": "user", "content": "the cat " * 60}], "is_safety": False}
    )
    micro_stages.add(config, "prompts", "some", prompts)
    return config


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    policy = micro_ppo.save_finishing_policy(tmp_path / "policy")
    helpfulness = micro_stages.save_scorer(tmp_path / "helpfulness", seed=1)
    return {
        "policy": policy,
        "reference": policy,
        "critic": helpfulness,
        "reward_helpfulness": helpfulness,
        "reward_safety": micro_stages.save_scorer(tmp_path / "safety", seed=2),
    }


def node(
    config: Config,
    models: dict[str, str],
    *,
    name: str = "round-02/ppo",
    on_step: Callable[[int, int], None] | None = None,
) -> NodeContext:
    return micro_stages.context(
        config,
        name=name,
        stage="ppo",
        models=models,
        data=[("prompts", "some", 0)],
        round=2,
        seed=2**47 + 11,
        on_step=on_step,
    )


def saved_weights(context: NodeContext) -> dict[str, torch.Tensor]:
    return load_file(context.directory.model / "model.safetensors")


def test_stage_leaves_its_files(made: Config, models: dict[str, str]) -> None:
    context = node(made, models)
    ppo.run(context)
    path = context.directory.path
    assert {p.name for p in path.iterdir()} == {
        "heldout.jsonl",
        "metrics.jsonl",
        "model",
        "ppo.json",
        "samples.jsonl",
    }
    assert load_policy(path / "model", model=made.model, seed=0).training is False
    summary = read_json(path / "ppo.json")
    assert (summary["stopped"], summary["iterations"]) == ("iterations", 3)
    assert summary["reference"] == {"choice": "start", "name": "reference", "digest": ""}
    assert summary["critic"] == {"choice": "helpfulness", "name": "critic", "digest": ""}
    assert summary["prompts"]["heldout"] == 4
    assert summary["prompts"]["over_long"] == 1
    assert summary["best_iteration"] in {row["iteration"] for row in summary["heldout"]}
    rows = read_jsonl(path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    names = {name for row in rows for name in row} - {"step"}
    declared = {value for name, value in vars(metrics).items() if name.isupper()}
    assert names <= declared
    wanted = {name for name in declared if name.split("/")[0] in ("rollout", "ppo")}
    assert wanted <= names
    samples = read_jsonl(path / "samples.jsonl")
    assert len(samples) == 12
    prompts = {sample["prompt_id"] for sample in samples}
    assert "long" not in prompts


def test_heldout_prompts_are_never_rolled_out(made: Config, models: dict[str, str]) -> None:
    context = node(made, models)
    prompts, heldout, counts = ppo._prompts(context, micro.tokenizer())
    assert not any(prompt.heldout for prompt in prompts)
    assert all(prompt.heldout for prompt in heldout)
    assert counts == {"training": len(prompts), "heldout": 4, "over_long": 1}


def test_critic_has_the_head_of_its_reward_model(made: Config, models: dict[str, str]) -> None:
    context = node(made, models)
    policy = load_policy(models["policy"], model=made.model, seed=0)
    head = load_file(Path(models["critic"]) / "model.safetensors")["score.weight"]
    assert torch.equal(ppo._critic(context, policy).head.weight, head)


def test_critic_without_a_head_is_refused(made: Config, models: dict[str, str]) -> None:
    models["critic"] = models["policy"]
    with pytest.raises(ArtifactError, match=r"score\.weight"):
        ppo.run(node(made, models))


def test_critic_may_start_from_the_policy(made: Config, models: dict[str, str]) -> None:
    models["critic"] = models["policy"]
    made.ppo.critic_init = CriticInit.policy
    context = node(made, models)
    policy = load_policy(models["policy"], model=made.model, seed=0)
    critic = ppo._critic(context, policy)
    assert torch.equal(critic.trunk.embed_tokens.weight, policy.model.embed_tokens.weight)
    ppo.run(context)
    assert read_json(context.directory.path / "ppo.json")["critic"]["choice"] == "policy"


def test_critic_of_another_vocabulary_is_refused(made: Config, models: dict[str, str]) -> None:
    policy: Any = load_policy(models["policy"], model=made.model, seed=0)
    policy.config.vocab_size = 100
    with pytest.raises(ConfigError, match=r"ppo\.critic_init=helpfulness cannot work"):
        ppo._critic(node(made, models), policy)


def test_reference_may_be_older_than_the_start(
    made: Config, models: dict[str, str], tmp_path: Path
) -> None:
    models["reference"] = micro_stages.save_policy(tmp_path / "v0", seed=3)
    context = node(made, models)
    ppo.run(context)
    first = read_jsonl(context.directory.path / "metrics.jsonl")[1]
    assert first[metrics.ROLLOUT_KL] > 0.01
    assert first[metrics.ROLLOUT_KL_TO_START] == 0.0


def test_killed_stage_ends_with_the_same_files(made: Config, models: dict[str, str]) -> None:
    made.checkpoint.every_steps = 1
    straight = node(made, models, name="straight")
    ppo.run(straight)

    def die(step: int, _total: int) -> None:
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        ppo.run(node(made, models, name="broken", on_step=die))
    resumed = node(made, models, name="broken")
    saved = resumed.directory.last_checkpoint()
    assert saved is not None
    assert saved.step == 2
    ppo.run(resumed)
    for name in ("ppo.json", "samples.jsonl", "heldout.jsonl"):
        ours, theirs = (c.directory.path / name for c in (resumed, straight))
        assert ours.read_bytes() == theirs.read_bytes()
    assert micro.largest_difference(saved_weights(resumed), saved_weights(straight)) == 0.0
    found = [micro.rows_without_time(c.directory.metrics) for c in (resumed, straight)]
    assert found[0] == found[1]


@pytest.mark.parametrize(("killed_at", "checkpoint"), [(1, 0), (3, 2)])
def test_heldout_responses_of_a_killed_stage_are_cut_back(
    made: Config, models: dict[str, str], killed_at: int, checkpoint: int
) -> None:
    """Checkpoints come after every second iteration; what was scored since is scored again."""
    made.ppo.heldout_every, made.ppo.critic_warmup_iterations = 1, 0
    made.checkpoint.every_steps = 2
    straight = node(made, models, name="straight")
    ppo.run(straight)

    def die(step: int, _total: int) -> None:
        if step == killed_at:
            raise Killed

    broken = node(made, models, name="broken", on_step=die)
    with pytest.raises(Killed):
        ppo.run(broken)
    scored = {row["iteration"] for row in read_jsonl(broken.directory.heldout.path)}
    saved = broken.directory.last_checkpoint()
    assert (saved.step if saved else 0) == checkpoint < max(scored) == killed_at
    resumed = node(made, models, name="broken")
    ppo.run(resumed)
    ours, theirs = (c.directory.heldout.path.read_bytes() for c in (resumed, straight))
    assert ours == theirs


def test_heldout_responses_are_what_the_summary_averages(
    made: Config, models: dict[str, str]
) -> None:
    context = node(made, models)
    ppo.run(context)
    _, heldout, _ = ppo._prompts(context, micro.tokenizer())
    rows = read_jsonl(context.directory.heldout.path)
    summary = read_json(context.directory.path / "ppo.json")["heldout"]
    assert len(rows) == 4 * len(summary)
    for point in summary:
        of = [row for row in rows if row["iteration"] == point["iteration"]]
        assert [row["prompt_id"] for row in of] == [prompt.id for prompt in heldout]
        for name in ("kl_to_start", "score_helpfulness", "score_safety"):
            assert sum(row[name] for row in of) / 4 == pytest.approx(point[name], abs=1e-6)
        assert all(row["finished"] or row["num_tokens"] == 6 for row in of)
    assert {row["kl_to_start"] for row in rows if row["iteration"] == 0} == {0.0}


def test_without_training_prompts_the_stage_says_so(made: Config, models: dict[str, str]) -> None:
    made.model.max_length = 8
    with pytest.raises(StageError, match=r"none of 25 prompts.*model.max_length=8"):
        ppo.run(node(made, models))
