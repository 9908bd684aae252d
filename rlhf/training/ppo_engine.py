"""PPO's distributed engine: what happens to one batch of rollouts on one or more processes.

Each process runs its share of every minibatch, in micro-batches; sums over processes and over
micro-batches are divided by counts of the whole minibatch, so neither split changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from torch import Tensor

from rlhf.algo.losses import policy_loss, value_loss
from rlhf.algo.masked import masked_sum
from rlhf.config import Config
from rlhf.data.records import Prompt
from rlhf.errors import ConfigError, StageError
from rlhf.models.actor_critic import ResponseBatch, pack_responses
from rlhf.models.loading import autocast
from rlhf.training.optim import lr_factor, parameter_groups
from rlhf.training.rollout import Experience, Measured, Roles, Rollout, sample_rollouts

STEP_SUMS = ("value_loss", "policy_loss", "clipfrac", "approx_kl", "ratio")
"""What one optimizer step adds up over its micro-batches."""


class PpoEngine:
    """Samples, measures and updates; holds the optimizer and its step counts."""

    def __init__(self, roles: Roles, *, config: Config, seed: int) -> None:
        self._roles, self._seed = roles, seed
        self._config, self._settings = config, config.ppo
        self._accelerator = Accelerator(
            cpu=roles.device.type == "cpu",
            kwargs_handlers=[
                # In the critic's warm-up the policy takes no part.
                DistributedDataParallelKwargs(
                    find_unused_parameters=config.ppo.critic_warmup_iterations > 0
                )
            ],
        )
        self._rank = self._accelerator.process_index
        self._num_processes = self._accelerator.num_processes
        minibatch_size = config.ppo.batch_size // config.ppo.num_minibatches
        if minibatch_size % self._num_processes:
            raise ConfigError(
                f"ppo.batch_size / ppo.num_minibatches = {minibatch_size} cannot be shared by "
                f"{self._num_processes} processes: make it a multiple of them"
            )
        self._model, self.optimizer = self._accelerator.prepare(
            roles.joint, self._build_optimizer()
        )
        steps = config.ppo.num_ppo_epochs * config.ppo.num_minibatches
        warmup = min(config.ppo.critic_warmup_iterations, config.ppo.iterations)
        self._factors = {
            "critic": lr_factor(config.ppo.optimizer, total_steps=config.ppo.iterations * steps),
            "policy": lr_factor(
                config.ppo.optimizer, total_steps=(config.ppo.iterations - warmup) * steps
            ),
        }
        self.updates = {"critic": 0, "policy": 0}
        """Optimizer steps each model has taken."""

    @property
    def is_main(self) -> bool:
        """Tell whether this process writes the files."""
        return self._rank == 0

    def wait(self) -> None:
        """Wait for the other processes."""
        self._accelerator.wait_for_everyone()

    def sample(self, chosen: Sequence[tuple[Prompt, str]]) -> list[Rollout]:
        """Sample and score; each process does its share and gets the rollouts of all."""
        own = sample_rollouts(
            chosen[self._rank :: self._num_processes], self._roles, settings=self._settings
        )
        if self._num_processes == 1:
            return own
        shares = gather_object([own])
        return [rollout for turn in zip_longest(*shares) for rollout in turn if rollout is not None]

    def measure(self, rollouts: Sequence[Rollout], groups: Sequence[list[int]]) -> Measured:
        """Run the models over this process's micro-batches; returns the rows of all processes."""
        width = max(len(rollout.response.token_ids) for rollout in rollouts)
        tables: dict[str, Tensor] = {}
        for group in groups:
            batch = self._pack(rollouts, group)
            with autocast(self._config.model, self._roles.device):
                measured = self._roles.measure(batch)
            for entry in fields(measured):
                part = getattr(measured, entry.name).cpu()
                table = tables.setdefault(
                    entry.name, torch.zeros(len(rollouts), width, dtype=part.dtype)
                )
                table[group, : part.shape[1]] = part
        # Rows of other processes are 0 here, so the sum over processes is the whole table.
        return Measured(**{name: self._sum(table) for name, table in tables.items()})

    def update(
        self, experience: Experience, *, iteration: int, with_policy: bool
    ) -> list[dict[str, float]]:
        """Take an iteration's optimizer steps; returns the sums of each.

        Raises StageError when a loss or gradient is no number, before it reaches a weight.
        """
        self._model.train(self._config.model.gradient_checkpointing)
        steps = [
            self._optimizer_step(experience, minibatch, with_policy=with_policy)
            for epoch in range(self._settings.num_ppo_epochs)
            for minibatch in self.minibatches(iteration=iteration, epoch=epoch)
        ]
        self._model.eval()
        return steps

    def _optimizer_step(
        self, experience: Experience, rows: list[int], *, with_policy: bool
    ) -> dict[str, float]:
        """Take one optimizer step on a minibatch, cut into micro-batches; returns its sums."""
        num_tokens = int(experience.response_mask_BT[rows].sum())
        micros = self.micros(rows, experience.rollouts)
        sums = torch.zeros(len(STEP_SUMS), dtype=torch.float64)
        for index, micro in enumerate(micros):
            is_last = index == len(micros) - 1
            with nullcontext() if is_last else self._accelerator.no_sync(self._model):
                sums += self._backward(
                    experience, micro, num_tokens=num_tokens, with_policy=with_policy
                )
        found = dict(zip(STEP_SUMS, self._sum(sums).tolist(), strict=True))
        found["tokens"] = num_tokens
        found["critic_grad_norm"] = self._clip(self._roles.critic_parameters())
        if with_policy:
            found["policy_grad_norm"] = self._clip(self._roles.policy_parameters())
        _refuse_nan(found)
        found["lr"] = self._set_learning_rates(with_policy=with_policy)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates["critic"] += 1
        self.updates["policy"] += int(with_policy)
        return found

    def _backward(
        self, experience: Experience, rows: list[int], *, num_tokens: int, with_policy: bool
    ) -> Tensor:
        """Add one micro-batch's gradients; returns its sums in the order of STEP_SUMS."""
        batch = self._pack(experience.rollouts, rows)
        mask_BT, width = batch.response_mask_BT, batch.tokens_BT.shape[1]

        def part(table_BT: Tensor) -> Tensor:
            return table_BT[rows, :width].to(self._roles.device)

        with autocast(self._config.model, self._roles.device):
            logprobs_BT, values_BT = self._model(batch, with_policy=with_policy)
        critic_loss = value_loss(
            values_BT,
            part(experience.measured.values_BT),
            part(experience.returns_BT),
            mask_BT,
            value_clip_range=self._settings.value_clip_range,
            normalizer=num_tokens,
        )
        loss = self._settings.value_coef * critic_loss
        sums = [critic_loss, *[torch.zeros_like(critic_loss)] * 4]
        if with_policy:
            old_logprobs_BT = part(experience.measured.logprobs_BT)
            actor_loss, clipfrac_sum, approx_kl_sum = policy_loss(
                logprobs_BT,
                old_logprobs_BT,
                part(experience.advantages_BT),
                mask_BT,
                clip_range=self._settings.clip_range,
                normalizer=num_tokens,
            )
            loss = loss + actor_loss
            ratio_sum = masked_sum((logprobs_BT.detach() - old_logprobs_BT).exp(), mask_BT)
            sums = [critic_loss, actor_loss, clipfrac_sum, approx_kl_sum, ratio_sum]
        # Processes average their gradients; the loss is a share of the whole minibatch's.
        self._accelerator.backward(loss * self._num_processes)
        return torch.stack([value.detach().double().cpu() for value in sums])

    def _clip(self, parameters: dict[str, torch.nn.Parameter]) -> float:
        norm = torch.nn.utils.clip_grad_norm_(
            parameters.values(), self._settings.optimizer.max_grad_norm
        )
        return float(norm)

    def _build_optimizer(self) -> torch.optim.AdamW:
        settings = self._settings.optimizer
        critic_lr = self._settings.critic_lr
        peaks = {"policy": settings.lr, "critic": settings.lr if critic_lr is None else critic_lr}
        parameters = {
            "policy": self._roles.policy_parameters(),
            "critic": self._roles.critic_parameters(),
        }
        groups: list[dict[str, Any]] = []
        for role, peak in peaks.items():
            for group in parameter_groups(
                parameters[role].items(), weight_decay=settings.weight_decay
            ):
                groups.append({**group, "role": role, "peak": peak, "lr": peak})
        betas = (settings.beta1, settings.beta2)
        return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps)

    def _set_learning_rates(self, *, with_policy: bool) -> float:
        """Set each group's learning rate for the coming step; returns the policy's."""
        factors = {role: factor(self.updates[role]) for role, factor in self._factors.items()}
        if not with_policy:
            factors["policy"] = 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factors[group["role"]]
        return self._settings.optimizer.lr * factors["policy"]

    def minibatches(self, *, iteration: int, epoch: int) -> list[list[int]]:
        """Return the rollouts of each optimizer step of an epoch, shuffled by seed and position."""
        rng = np.random.default_rng([self._seed, iteration, epoch])
        order = rng.permutation(self._settings.batch_size).tolist()
        size = self._settings.batch_size // self._settings.num_minibatches
        return [order[start : start + size] for start in range(0, len(order), size)]

    def micros(self, rows: list[int], rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Cut this process's share of the rows into micro-batches of similar length."""
        own = sorted(
            rows[self._rank :: self._num_processes], key=lambda row: (rollouts[row].length, row)
        )
        size = self._settings.micro_batch_size
        return [own[start : start + size] for start in range(0, len(own), size)]

    def _pack(self, rollouts: Sequence[Rollout], rows: Sequence[int]) -> ResponseBatch:
        return pack_responses(
            [(rollouts[row].prompt_ids, rollouts[row].response.token_ids) for row in rows],
            pad_id=self._roles.tokenizer.pad_token_id,
            device=self._roles.device,
        )

    def _sum(self, value: Tensor) -> Tensor:
        if self._num_processes == 1:
            return value
        total: Tensor = self._accelerator.reduce(value.to(self._accelerator.device), "sum")
        return total.cpu()


def _refuse_nan(found: dict[str, float]) -> None:
    bad = [name for name, value in found.items() if not math.isfinite(value)]
    if bad:
        raise StageError(
            f"{', '.join(bad)} became NaN or infinite in PPO: lower ppo.optimizer.lr or "
            "ppo.critic_lr; the last checkpoint is good"
        )
