"""PPO's distributed engine: what happens to one batch of rollouts on one or more processes.

Each process runs its share of every minibatch, in micro-batches; sums over processes and over
micro-batches are divided by counts of the whole minibatch, so neither split changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from rlhf.algo.losses import policy_loss, value_loss
from rlhf.algo.masked import masked_sum
from rlhf.config import Config
from rlhf.data.collate import batches_by_length
from rlhf.data.records import Prompt
from rlhf.errors import StageError
from rlhf.models.actor_critic import ResponseBatch, pack_responses
from rlhf.models.loading import autocast
from rlhf.processes import Processes
from rlhf.training.optim import lr_factor
from rlhf.training.rollout import Experience, Measured, Roles, Rollout, sample_rollouts
from rlhf.training.trainables import CRITIC, POLICY, ROLES, open_trainables, peak_learning_rate

STEP_SUMS = ("value_loss", "policy_loss", "clipfrac", "approx_kl", "ratio")
"""What one optimizer step adds up over its micro-batches."""


class PpoEngine:
    """Samples, measures and updates; counts the optimizer steps."""

    def __init__(self, roles: Roles, *, config: Config, seed: int, processes: Processes) -> None:
        self._roles, self._seed, self._processes = roles, seed, processes
        self._config, self._settings = config, config.ppo
        self._trained = open_trainables(roles, config=config, processes=processes)
        steps = config.ppo.num_ppo_epochs * config.ppo.num_minibatches
        warmup = min(config.ppo.critic_warmup_iterations, config.ppo.iterations)
        self._factors = {
            CRITIC: lr_factor(config.ppo.optimizer, total_steps=config.ppo.iterations * steps),
            POLICY: lr_factor(
                config.ppo.optimizer, total_steps=(config.ppo.iterations - warmup) * steps
            ),
        }
        self.updates = {CRITIC: 0, POLICY: 0}
        """Optimizer steps each model has taken."""
        self._iteration = 0

    def start(self, folder: Path | None) -> None:
        """Begin with the roles' weights and the optimizer states of a checkpoint, if any."""
        self._trained.start(folder)

    def save(self, folder: Path) -> None:
        """Write the optimizer states; all processes come here."""
        self._trained.save(folder)

    def sample(self, chosen: Sequence[tuple[Prompt, str]]) -> list[Rollout]:
        """Sample and score; each process does its share and gets the rollouts of all."""
        own = self._processes.share(list(chosen))
        found = sample_rollouts(own, self._roles, settings=self._settings) if own else []
        shares = self._processes.gather(found, "rollouts of all processes")
        return [rollout for turn in zip_longest(*shares) for rollout in turn if rollout is not None]

    def measure(self, rollouts: Sequence[Rollout], groups: Sequence[list[int]]) -> Measured:
        """Run the models over this process's micro-batches; returns the rows of all processes."""
        width = max(len(rollout.response.token_ids) for rollout in rollouts)
        shape = (len(rollouts), width)
        tables: dict[str, Tensor] = {}
        for group in groups:
            batch = self._pack(rollouts, group)
            with autocast(self._config.model, self._roles.device):
                measured = self._roles.measure(batch)
            for entry in fields(measured):
                part = getattr(measured, entry.name).cpu()
                table = tables.setdefault(entry.name, torch.zeros(shape, dtype=part.dtype))
                table[group, : part.shape[1]] = part
        # Rows of other processes are 0 here, so the sum over processes is the whole table.
        names = [entry.name for entry in fields(Measured)]
        return Measured(**{n: self._sum(tables.get(n, torch.zeros(shape))) for n in names})

    def update(
        self, experience: Experience, *, iteration: int, with_policy: bool
    ) -> list[dict[str, float]]:
        """Take an iteration's optimizer steps; returns the sums of each.

        Raises StageError when a loss or gradient is no number, before it reaches a weight.
        """
        self._iteration = iteration
        self._trained.begin_update()
        steps = [
            self._optimizer_step(experience, minibatch, with_policy=with_policy)
            for epoch in range(self._settings.num_ppo_epochs)
            for minibatch in self.minibatches(iteration=iteration, epoch=epoch)
        ]
        self._trained.end_update()
        return steps

    def _optimizer_step(
        self, experience: Experience, rows: list[int], *, with_policy: bool
    ) -> dict[str, float]:
        """Take one optimizer step on a minibatch, cut into micro-batches; returns its sums."""
        num_tokens = int(experience.response_mask_BT[rows].sum())
        micros = self.micros(rows, experience.rollouts)
        sums = torch.zeros(len(STEP_SUMS), dtype=torch.float64)
        self._processes.passed(f"gradients in iteration {self._iteration}")
        for index, micro in enumerate(micros):
            with self._trained.micro_batch(is_last=index == len(micros) - 1):
                sums += self._backward(
                    experience, micro, num_tokens=num_tokens, with_policy=with_policy
                )
        found = dict(zip(STEP_SUMS, self._sum(sums).tolist(), strict=True))
        _refuse_nan(found)
        found["tokens"] = num_tokens
        found["lr"] = self._set_learning_rates(with_policy=with_policy)
        learning = ROLES if with_policy else (CRITIC,)
        for role in learning:
            found[f"{role}_grad_norm"] = self._trained.clip(role)
        _refuse_nan(found)
        self._trained.step(learning)
        for role in learning:
            self.updates[role] += 1
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
            logprobs_BT, values_BT = self._trained(batch, with_policy=with_policy)
        critic_loss = value_loss(
            values_BT,
            part(experience.measured.values_BT),
            part(experience.returns_BT),
            mask_BT,
            value_clip_range=self._settings.value_clip_range,
            normalizer=num_tokens,
        )
        # Processes average their gradients; a loss is a share of the whole minibatch's.
        size = self._processes.size
        losses = {CRITIC: self._settings.value_coef * critic_loss * size}
        sums = [critic_loss, *[torch.zeros_like(critic_loss)] * 4]
        if logprobs_BT is not None:
            old_logprobs_BT = part(experience.measured.logprobs_BT)
            actor_loss, clipfrac_sum, approx_kl_sum = policy_loss(
                logprobs_BT,
                old_logprobs_BT,
                part(experience.advantages_BT),
                mask_BT,
                clip_range=self._settings.clip_range,
                normalizer=num_tokens,
            )
            losses[POLICY] = actor_loss * size
            ratio_sum = masked_sum((logprobs_BT.detach() - old_logprobs_BT).exp(), mask_BT)
            sums = [critic_loss, actor_loss, clipfrac_sum, approx_kl_sum, ratio_sum]
        self._trained.backward(losses)
        return torch.stack([value.detach().double().cpu() for value in sums])

    def _set_learning_rates(self, *, with_policy: bool) -> float:
        """Set each group's learning rate for the coming step; returns the policy's."""
        factors = {role: factor(self.updates[role]) for role, factor in self._factors.items()}
        if not with_policy:
            factors[POLICY] = 0.0
        for role, optimizer in self._trained.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = peak_learning_rate(self._config, role) * factors[role]
        return self._settings.optimizer.lr * factors[POLICY]

    def minibatches(self, *, iteration: int, epoch: int) -> list[list[int]]:
        """Return the rollouts of each optimizer step of an epoch, shuffled by seed and position."""
        rng = np.random.default_rng([self._seed, iteration, epoch])
        order = rng.permutation(self._settings.batch_size).tolist()
        size = self._settings.batch_size // self._settings.num_minibatches
        return [order[start : start + size] for start in range(0, len(order), size)]

    def micros(self, rows: list[int], rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Cut this process's share of the rows into micro-batches of similar length.

        Several processes make equally many passes, so there the number of rows alone decides.
        """
        own = sorted(self._processes.share(rows), key=lambda row: (rollouts[row].length, row))
        size = self._settings.micro_batch_size
        if self._processes.size > 1:
            return [own[start : start + size] for start in range(0, len(own), size)]
        lengths = [rollouts[row].length for row in own]
        padding = self._roles.pass_padding
        batches = batches_by_length(lengths, max_rows=size, max_padding=padding)
        return [[own[index] for index in batch] for batch in batches]

    def _pack(self, rollouts: Sequence[Rollout], rows: Sequence[int]) -> ResponseBatch:
        return pack_responses(
            [(rollouts[row].prompt_ids, rollouts[row].response.token_ids) for row in rows],
            pad_id=self._roles.tokenizer.pad_token_id,
            device=self._roles.device,
        )

    def _sum(self, value: Tensor) -> Tensor:
        """Add a tensor on the CPU up over all processes."""
        if self._processes.size > 1:
            value = value.clone()
            with self._processes.at(f"sums of all processes in iteration {self._iteration}"):
                torch.distributed.all_reduce(value)
        return value


def _refuse_nan(found: dict[str, float]) -> None:
    bad = [name for name, value in found.items() if not math.isfinite(value)]
    if bad:
        raise StageError(
            f"{', '.join(bad)} became NaN or infinite in PPO: lower ppo.optimizer.lr or "
            "ppo.critic_lr; the last checkpoint is good"
        )
