"""PPO: the policy learns to earn reward without drifting from the reference (Eq. 3 and 4).

Starts from the round's policy, trains on training prompts, stops by its own rules, and keeps the
policy that scored best on held-out prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf.config import Config, CriticInit
from rlhf.data.corrections import open_rows
from rlhf.data.prompts import keyed_order
from rlhf.data.records import AXES, Prompt
from rlhf.errors import ConfigError, StageError
from rlhf.inference.generation import fitting, scoring_length
from rlhf.inference.generators import check_generator, open_generator
from rlhf.inference.scoring import HfScorer, Scorer
from rlhf.models.actor_critic import ValueModel
from rlhf.models.adapters import POLICY, AdapterFolder, AdapterTrunk, common_base, load_head
from rlhf.models.loading import (
    load_policy,
    load_reward_model,
    load_tokenizer,
    save_trained,
    setup_torch,
)
from rlhf.nodes import NodeContext
from rlhf.training.adapter_roles import CRITIC, AdapterRoles
from rlhf.training.ppo import PpoLoop
from rlhf.training.roles import SeparateRoles
from rlhf.training.rollout import Roles

log = logging.getLogger(__name__)

REVISION = 2


def run(context: NodeContext) -> None:
    """Write model/ (with LoRA also adapter/), ppo.json, and the logs of metrics and responses.

    The logs: metrics.jsonl, samples.jsonl (some rollouts) and heldout.jsonl (every response to the
    held-out prompts, at every scoring).
    """
    config, directory = context.config, context.directory
    check_generator(config)
    device = setup_torch(config.compute)
    tokenizer = load_tokenizer(context.inputs.models["policy"].path)
    prompts, heldout, counts = _prompts(context, tokenizer)
    roles, finish = _open_roles(context, tokenizer, device)
    loop = PpoLoop(
        roles,
        prompts=prompts,
        heldout=heldout,
        config=config,
        directory=directory,
        seed=context.seed,
    )
    state = loop.run()
    log.info("stopped by %s; best is iteration %d", state.stopped, state.best_iteration)
    save_trained(finish(), tokenizer, directory)
    directory.write_json(
        "ppo.json",
        {
            "stopped": state.stopped,
            "iterations": state.iteration,
            "best_iteration": state.best_iteration,
            "kl_to_start": state.kl_to_start,
            "alarms": state.alarms,
            "heldout": state.heldout,
            "prompts": counts,
            "reference": _origin(context, "reference", config.ppo.reference.name),
            "critic": _origin(context, "critic", config.ppo.critic_init.name),
        },
    )


def _prompts(
    context: NodeContext, tokenizer: Any
) -> tuple[list[Prompt], list[Prompt], dict[str, int]]:
    """Return training and held-out prompts that fit, and how many were left out."""
    config = context.config
    store = open_rows(context)
    every = [
        prompt for item in context.inputs.of_kind("prompts") for prompt in store.prompts(item.id)
    ]
    fits, over_long = fitting(
        every,
        tokenizer,
        max_new_tokens=config.ppo.sampling.max_new_tokens,
        max_length=config.model.max_length,
    )
    prompts = [prompt for prompt in fits if not prompt.heldout]
    heldout = keyed_order((prompt for prompt in fits if prompt.heldout), seed=context.seed)
    heldout = heldout[: config.ppo.heldout_prompts]
    if not prompts:
        raise StageError(
            f"none of {len(every)} prompts is a training prompt that fits model.max_length="
            f"{config.model.max_length}: ingest a prompt set, or raise model.max_length"
        )
    if not heldout:
        log.warning("no held-out prompts: the last policy is kept, good or bad")
    counts = {"training": len(prompts), "heldout": len(heldout), "over_long": over_long}
    return prompts, heldout, counts


def _open_roles(
    context: NodeContext, tokenizer: Any, device: torch.device
) -> tuple[Roles, Callable[[], Any]]:
    """Return the roles and what gives the plain trained policy at the end."""
    if context.config.model.lora.enabled:
        return _adapter_roles(context, tokenizer, device)
    path = context.inputs.models["policy"].path
    policy = load_policy(path, model=context.config.model, seed=context.seed).to(device)
    return _separate_roles(context, policy, tokenizer, device), lambda: policy


def _separate_roles(
    context: NodeContext, policy: Any, tokenizer: Any, device: torch.device
) -> Roles:
    config, models = context.config, context.inputs.models
    settings = config.model

    def frozen_policy(role: str) -> Any:
        return load_policy(models[role].path, model=settings, seed=context.seed).to(device)

    is_start = models["reference"].path == models["policy"].path
    critic = _critic(context, policy).to(device)
    if settings.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
        critic.trunk.gradient_checkpointing_enable()
    return SeparateRoles(
        policy=policy,
        critic=critic,
        reference=frozen_policy("reference"),
        start=None if is_start else frozen_policy("policy"),
        scorers=(
            _scorer(context, "reward_helpfulness", device),
            _scorer(context, "reward_safety", device),
        ),
        generator=open_generator(
            config, policy, tokenizer, scratch=context.directory.path, device=device
        ),
        tokenizer=tokenizer,
        settings=settings,
        temperature=config.ppo.sampling.temperature,
    )


def _adapter_roles(
    context: NodeContext, tokenizer: Any, device: torch.device
) -> tuple[Roles, Callable[[], Any]]:
    """Put all roles on the base that their adapters were trained on (one model in memory)."""
    config = context.config
    paths = {role: model.path for role, model in context.inputs.models.items()}
    _refuse_for_adapters(config, paths)
    scorers = {axis: AdapterFolder.beside(paths[f"reward_{axis}"]) for axis in AXES}
    base = common_base(paths["policy"], scorers)
    model = load_policy(base, model=config.model, seed=context.seed).to(device)
    is_base = Path(paths["policy"]).resolve() == Path(base).resolve()
    trunk = AdapterTrunk(
        model,
        lora=config.model.lora,
        policy=None if is_base else AdapterFolder.beside(paths["policy"]),
        seed=context.seed,
    )
    for axis in AXES:
        trunk.add(axis, scorers[axis])
    trunk.add(CRITIC, AdapterFolder.beside(paths["critic"]))
    roles = AdapterRoles(
        trunk=trunk,
        critic_head=load_head(paths["critic"], device=device),
        scorers={axis: (axis, load_head(paths[f"reward_{axis}"], device=device)) for axis in AXES},
        generator=open_generator(
            config,
            model,
            tokenizer,
            scratch=context.directory.path,
            device=device,
            weights=partial(trunk.merged_weights, POLICY),
        ),
        tokenizer=tokenizer,
        settings=config.model,
        temperature=config.ppo.sampling.temperature,
        max_scoring_length=scoring_length(config.model.max_length, config.ppo.sampling),
    )

    def finish() -> Any:
        if context.directory.processes.is_main:
            trunk.save(context.directory.path / "adapter")
        return trunk.merge()

    return roles, finish


def _refuse_for_adapters(config: Config, paths: Mapping[str, str]) -> None:
    """Refuse what five roles on one trunk cannot do, with ConfigError."""
    refused = {
        "ppo.critic_init=policy": config.ppo.critic_init is CriticInit.policy,
        "model.gradient_checkpointing=true": config.model.gradient_checkpointing,
        "ppo.reference=sft": paths["reference"] != paths["policy"],
    }
    for setting, is_set in refused.items():
        if is_set:
            raise ConfigError(
                f"{setting} cannot work in PPO with model.lora.enabled=true, whose roles share one "
                "trunk: change it, or set model.lora.enabled=false"
            )


def _critic(context: NodeContext, policy: Any) -> ValueModel:
    """Load the value model; its head is a reward model's, or new on the policy's trunk."""
    config = context.config
    path = context.inputs.models["critic"].path
    is_policy = config.ppo.critic_init is CriticInit.policy
    model = load_reward_model(path, model=config.model, new_head=is_policy, seed=context.seed)
    if model.config.vocab_size != policy.config.vocab_size:
        raise ConfigError(
            f"ppo.critic_init={config.ppo.critic_init.name} cannot work: {path} has "
            f"{model.config.vocab_size} words and the policy {policy.config.vocab_size}; "
            "the critic reads the policy's tokens: use ppo.critic_init=policy"
        )
    return ValueModel(model)


def _scorer(context: NodeContext, role: str, device: torch.device) -> Scorer:
    config: Config = context.config
    path = context.inputs.models[role].path
    model = load_reward_model(path, model=config.model, new_head=False, seed=context.seed)
    return HfScorer(
        model.to(device),
        load_tokenizer(path),
        max_length=scoring_length(config.model.max_length, config.ppo.sampling),
    )


def _origin(context: NodeContext, role: str, choice: str) -> dict[str, str]:
    model = context.inputs.models[role]
    return {"choice": choice, "name": model.name, "digest": model.digest}
