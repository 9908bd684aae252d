"""Five roles on one trunk equal five merged models, and only policy and critic move."""

from pathlib import Path
from typing import Any

import micro_models as micro
import micro_ppo
import micro_stages
import pytest
import torch
from safetensors.torch import load_file

from rlhf.artifacts import read_json
from rlhf.config import Config, CriticInit, Reference
from rlhf.errors import ConfigError
from rlhf.models.actor_critic import pack_responses
from rlhf.models.adapters import AdapterFolder, common_base
from rlhf.models.loading import (
    add_adapter,
    load_policy,
    load_reward_model,
    merge_adapter,
    save_model,
)
from rlhf.nodes import NodeContext
from rlhf.stages import ppo
from rlhf.training.ppo import PpoLoop

ROWS = [([5, 6, 7], [8, 9, 1]), ([10, 11], [12, 1]), ([13, 14, 15, 16], [17, 18, 19, 20])]


def adapted(made: Config, base: str, folder: Path, *, seed: int, is_scorer: bool) -> str:
    """Save what a node with LoRA saves: a merged model, and the adapter beside it."""
    if is_scorer:
        model = load_reward_model(base, model=made.model, new_head=True, seed=seed)
    else:
        model = load_policy(base, model=made.model, seed=seed)
    task_type = "SEQ_CLS" if is_scorer else "CAUSAL_LM"
    wrapped = add_adapter(model, made.model.lora, task_type=task_type, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    merge_adapter(wrapped, folder / "adapter")
    save_model(model, micro.tokenizer(), folder / "model")
    return str(folder / "model")


@pytest.fixture
def made(tmp_path: Path) -> Config:
    config = micro_stages.config(tmp_path)
    config.model.max_length = 64
    config.model.lora.enabled = True
    config.model.lora.rank = 4
    config.ppo = micro_ppo.config(iterations=2, lr=1e-2).ppo
    prompts = [
        {"id": f"p{i}", "prompt": prompt.prompt, "is_safety": prompt.is_safety}
        for i, prompt in enumerate(micro_ppo.prompts(24))
    ]
    micro_stages.add(config, "prompts", "some", prompts)
    return config


@pytest.fixture
def models(made: Config, tmp_path: Path) -> dict[str, str]:
    """The policy comes from rejection sampling, on the same base as the reward models."""
    base = micro_ppo.save_finishing_policy(tmp_path / "promoted" / "model")
    helpfulness = adapted(made, base, tmp_path / "helpfulness", seed=1, is_scorer=True)
    policy = adapted(made, base, tmp_path / "rejection", seed=3, is_scorer=False)
    return {
        "policy": policy,
        "reference": policy,
        "critic": helpfulness,
        "reward_helpfulness": helpfulness,
        "reward_safety": adapted(made, base, tmp_path / "safety", seed=2, is_scorer=True),
    }


def node(
    made: Config, models: dict[str, str], name: str = "round-01/ppo", on_step: Any = None
) -> NodeContext:
    return micro_stages.context(
        made,
        name=name,
        stage="ppo",
        models=models,
        data=[("prompts", "some", 0)],
        round=1,
        on_step=on_step,
    )


def open_both(made: Config, models: dict[str, str]) -> tuple[Any, Any]:
    """Return roles on one trunk, and roles from the merged folders."""
    context, tokenizer, cpu = node(made, models), micro.tokenizer(), torch.device("cpu")
    adapters, _ = ppo._adapter_roles(context, tokenizer, cpu)
    policy = load_policy(models["policy"], model=made.model, seed=0)
    return adapters, ppo._separate_roles(context, policy, tokenizer, cpu)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("policy", ["rejection", "promoted"])
def test_adapters_equal_merged_models(
    made: Config, models: dict[str, str], tmp_path: Path, policy: str
) -> None:
    models["policy"] = models["reference"] = str(tmp_path / policy / "model")
    adapters, separate = open_both(made, models)
    batch = pack_responses(ROWS, pad_id=0, device=torch.device("cpu"))
    ours, theirs = adapters.measure(batch), separate.measure(batch)
    for name in ("logprobs_BT", "ref_logprobs_BT", "start_logprobs_BT", "values_BT"):
        assert difference(getattr(ours, name), getattr(theirs, name)) < 1e-4
    prompts = [prompt.prompt for prompt in micro_ppo.prompts(5)]
    texts = ["the cat eats", "red", "a fish", "", "the apple is red"]
    scores, expected = adapters.score(prompts, texts), separate.score(prompts, texts)
    for axis in range(2):
        assert difference(scores[axis], expected[axis]) < 1e-4
    # The roles are really different models.
    assert difference(scores[0], scores[1]) > 1e-2
    for roles in (adapters, separate):
        logprobs_BT, values_BT = roles.joint(batch)
        assert difference(logprobs_BT, ours.logprobs_BT) < 1e-4
        assert difference(values_BT, ours.values_BT) < 1e-4
    samples = [
        [
            response.token_ids
            for row in roles.generator.generate(
                prompts, num_samples=2, sampling=made.ppo.sampling, keys=list("abcde")
            )
            for response in row
        ]
        for roles in (adapters, separate)
    ]
    assert samples[0] == samples[1]


def test_one_step_has_the_gradients_of_both_roles(made: Config, models: dict[str, str]) -> None:
    """The forward pass switches adapters; the backward pass after it reaches both."""
    adapters, _ = open_both(made, models)
    batch = pack_responses(ROWS, pad_id=0, device=torch.device("cpu"))
    logprobs_BT, values_BT = adapters.joint(batch)
    (logprobs_BT.sum() + values_BT.square().sum()).backward()
    trained = {**adapters.policy_parameters()}
    for parameters in (trained, adapters.critic_parameters()):
        norms = [float(p.grad.abs().sum()) for p in parameters.values()]
        assert len(norms) >= 14
        assert min(norms) > 0
    moved = {name for name, p in adapters.joint.named_parameters() if p.grad is not None}
    assert all(".default." in name or ".critic." in name or name == "head.weight" for name in moved)


def test_ppo_changes_only_policy_and_critic(
    made: Config, models: dict[str, str], tmp_path: Path
) -> None:
    adapters, _ = open_both(made, models)
    before = micro.weights(adapters.joint)
    scored = adapters.score([micro_ppo.prompts(1)[0].prompt], ["the cat eats"])
    loop = PpoLoop(
        adapters,
        prompts=micro_ppo.prompts(12),
        heldout=[],
        config=made,
        directory=micro_stages.context(made, name="x", stage="ppo", models={}, data=[]).directory,
        seed=1,
    )
    loop.run()
    after = micro.weights(adapters.joint)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    roles = {".default.", ".critic."}
    assert {role for role in roles if any(role in name for name in moved)} == roles
    assert "head.weight" in moved
    assert not [n for n in moved if n != "head.weight" and not any(role in n for role in roles)]
    again = adapters.score([micro_ppo.prompts(1)[0].prompt], ["the cat eats"])
    assert scored[0].tolist() == again[0].tolist()
    first, second = micro.rows_without_time(loop._directory.metrics)
    assert first["rollout/kl"] == 0.0
    assert first["ppo/first_ratio"] == second["ppo/first_ratio"] == 1.0
    assert second["rollout/kl"] != 0.0


class Killed(Exception):
    pass


def test_stage_saves_adapter_and_merged_model_and_resumes(
    made: Config, models: dict[str, str], tmp_path: Path
) -> None:
    made.checkpoint.every_steps = 1
    made.ppo.heldout_prompts = 2
    straight = node(made, models, "straight")
    ppo.run(straight)

    def die(step: int, _total: int) -> None:
        if step == 1:
            raise Killed

    with pytest.raises(Killed):
        ppo.run(node(made, models, "broken", on_step=die))
    resumed = node(made, models, "broken")
    assert resumed.directory.last_checkpoint().step == 1  # type: ignore[union-attr]
    ppo.run(resumed)
    found = [load_file(c.directory.model / "model.safetensors") for c in (straight, resumed)]
    assert micro.largest_difference(*found) == 0.0
    # The adapter on its base is the merged model.
    adapter = straight.directory.path / "adapter"
    base = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    assert Path(base) == tmp_path / "promoted" / "model"
    from peft import PeftModel

    on_base = PeftModel.from_pretrained(load_policy(base, model=made.model, seed=0), adapter)
    merged = load_policy(straight.directory.model, model=made.model, seed=0)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert difference(on_base(ids).logits, merged(ids).logits) < 1e-4


def test_roles_of_different_bases_are_refused(
    made: Config, models: dict[str, str], tmp_path: Path
) -> None:
    other = micro_ppo.save_finishing_policy(tmp_path / "other" / "model")
    models["policy"] = models["reference"] = adapted(
        made, other, tmp_path / "elsewhere", seed=5, is_scorer=False
    )
    scorers = {axis: AdapterFolder.beside(models[f"reward_{axis}"]) for axis in ("safety",)}
    with pytest.raises(ConfigError, match=r"one base for all roles.*other"):
        common_base(models["policy"], scorers)
    with pytest.raises(ConfigError, match="has no adapter beside it"):
        AdapterFolder.beside(other)


def test_what_one_trunk_cannot_do_is_refused(made: Config, models: dict[str, str]) -> None:
    made.ppo.critic_init = CriticInit.policy
    with pytest.raises(ConfigError, match=r"ppo\.critic_init=policy cannot work"):
        ppo.run(node(made, models))
    made.ppo.critic_init = CriticInit.helpfulness
    made.ppo.reference = Reference.sft
    with pytest.raises(ConfigError, match=r"ppo\.reference=sft cannot work"):
        ppo.run(node(made, {**models, "reference": models["critic"]}))
