"""The two models that PPO trains, with an optimizer each: as replicas, or shared by engines.

Shared models are gathered once per rollout phase: between two updates every process holds plain
policies and critics, which sample and measure without a collective per layer or token. During an
update those are empty shells. Where ZeRO leaves the weights whole (below stage 3), lending them
costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim import AdamW

from rlhf.config import Config
from rlhf.models.actor_critic import PolicyAndCritic, ResponseBatch
from rlhf.models.shells import empty, fill, take_over
from rlhf.processes import Processes
from rlhf.training.engines import Engine, open_engine
from rlhf.training.layout import is_shared
from rlhf.training.optim import adamw
from rlhf.training.rollout import Roles

POLICY, CRITIC = "policy", "critic"
ROLES = (POLICY, CRITIC)


class Trainables(Protocol):
    """Policy and critic while they learn; gradients are clipped apart."""

    optimizers: dict[str, Any]

    def start(self, folder: Path | None) -> None:
        """Begin with the weights that the roles hold, and a checkpoint's optimizer states."""

    def begin_update(self) -> None:
        """Take the weights; the roles cannot be used until `end_update`."""

    def end_update(self) -> None:
        """Give the weights back to the roles, whole."""

    def __call__(self, batch: ResponseBatch, *, with_policy: bool) -> tuple[Tensor | None, Tensor]:
        """Return logprobs (None without the policy) and values, both [B, T], 0 outside the mask."""

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context of one forward and backward pass; gradients meet in the last one."""

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's gradients, of the roles that have a loss."""

    def clip(self, role: str) -> float:
        """Bound a role's gradient; returns the norm it had. Learning rates must be set."""

    def step(self, roles: tuple[str, ...]) -> None:
        """Take the optimizer steps of some roles and drop all gradients."""

    def save(self, folder: Path) -> None:
        """Write the optimizer states; all processes come here."""


def open_trainables(roles: Roles, *, config: Config, processes: Processes) -> Trainables:
    """Return the roles' policy and critic as the configuration wants them trained."""
    if is_shared(config, processes):
        assert isinstance(roles.joint, PolicyAndCritic), "adapters are refused for shared training"
        return SharedTrainables(roles, roles.joint, config=config, processes=processes)
    return Replicas(roles, config=config, processes=processes)


class Replicas:
    """Both models as one module, whole in every process, on accelerate."""

    def __init__(self, roles: Roles, *, config: Config, processes: Processes) -> None:
        self._processes = processes
        self._max_grad_norm = config.ppo.optimizer.max_grad_norm
        self._keeps_activations = not config.model.gradient_checkpointing
        self._accelerator = Accelerator(
            cpu=roles.device.type == "cpu",
            kwargs_handlers=[
                # In the critic's warm-up the policy takes no part.
                DistributedDataParallelKwargs(
                    find_unused_parameters=config.ppo.critic_warmup_iterations > 0
                )
            ],
        )
        assert self._accelerator.num_processes == processes.size, "unconnected processes"
        self._parameters = {POLICY: roles.policy_parameters(), CRITIC: roles.critic_parameters()}
        self._model, *optimizers = self._accelerator.prepare(
            roles.joint,
            *(build_optimizer(config, role, self._parameters[role].items()) for role in ROLES),
        )
        self.optimizers: dict[str, Any] = dict(zip(ROLES, optimizers, strict=True))

    def start(self, folder: Path | None) -> None:
        """Read the optimizer states of a checkpoint."""
        if folder is not None:
            for role in ROLES:
                state = torch.load(folder / optimizer_file(role), weights_only=True)
                self.optimizers[role].load_state_dict(state)

    def begin_update(self) -> None:
        """Recompute activations, if so configured, which needs the training mode."""
        self._model.train(not self._keeps_activations)

    def end_update(self) -> None:
        """Go back to the mode for sampling."""
        self._model.eval()

    def __call__(self, batch: ResponseBatch, *, with_policy: bool) -> tuple[Tensor | None, Tensor]:
        """Return logprobs (None without the policy) and values, both [B, T]."""
        found: tuple[Tensor | None, Tensor] = self._model(batch, with_policy=with_policy)
        return found

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Let gradients meet in the last pass only."""
        return nullcontext() if is_last else self._accelerator.no_sync(self._model)

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's gradients in one pass, which is what replicas allow."""
        self._accelerator.backward(sum(losses.values()))

    def clip(self, role: str) -> float:
        """Bound a role's gradient; returns the norm it had."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters[role].values(), self._max_grad_norm)
        return float(norm)

    def step(self, roles: tuple[str, ...]) -> None:
        """Take the optimizer steps of some roles and drop all gradients."""
        for role in roles:
            self.optimizers[role].step()
        for role in ROLES:
            self.optimizers[role].zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        """Write the optimizer states, which are the same in every process."""
        if self._processes.is_main:
            for role in ROLES:
                torch.save(self.optimizers[role].state_dict(), folder / optimizer_file(role))


class SharedTrainables:
    """Two engines, each with its own optimizer and clipping."""

    def __init__(
        self, roles: Roles, joint: PolicyAndCritic, *, config: Config, processes: Processes
    ) -> None:
        self._config, self._processes = config, processes
        self._device = roles.device
        self._shells = {POLICY: joint.actor, CRITIC: joint.critic}
        self._engines: dict[str, Engine] = {}
        self.optimizers: dict[str, Any] = {}

    def start(self, folder: Path | None) -> None:
        """Move the weights of both models into engines, and lend them back for the rollouts."""
        for role, shell in self._shells.items():
            self._engines[role] = self._open(role, take_over(shell))
            self.optimizers[role] = self._engines[role].optimizer
            if folder is not None:
                self._engines[role].load(folder / optimizer_file(role))
        self.end_update()

    def _open(self, role: str, twin: nn.Module) -> Engine:
        return open_engine(
            twin,
            lambda model: build_optimizer(self._config, role, model.named_parameters()),
            config=self._config,
            processes=self._processes,
            device=self._device,
            max_grad_norm=self._config.ppo.optimizer.max_grad_norm,
        )

    def begin_update(self) -> None:
        """Drop what was gathered for the rollouts."""
        for role, shell in self._shells.items():
            empty(shell)
            self._engines[role].model.train(self._config.model.gradient_checkpointing)

    def end_update(self) -> None:
        """Gather both models, once until the next update."""
        for role, shell in self._shells.items():
            self._engines[role].model.eval()
            fill(shell, self._engines[role].weights())

    def __call__(self, batch: ResponseBatch, *, with_policy: bool) -> tuple[Tensor | None, Tensor]:
        """Return logprobs (None without the policy) and values, both [B, T]."""
        logprobs_BT = self._engines[POLICY].model(batch) if with_policy else None
        return logprobs_BT, self._engines[CRITIC].model(batch)

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Let gradients meet in the last pass only."""
        stack = ExitStack()
        for engine in self._engines.values():
            stack.enter_context(engine.micro_batch(is_last=is_last))
        return stack

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's gradients, role by role in a fixed order."""
        for role in ROLES:
            if role in losses:
                self._engines[role].backward(losses[role])

    def clip(self, role: str) -> float:
        """Bound a role's gradient; returns the norm it had."""
        return self._engines[role].clip()

    def step(self, roles: tuple[str, ...]) -> None:
        """Take the optimizer steps of some roles; others have no gradients."""
        for role in roles:
            self._engines[role].step()

    def save(self, folder: Path) -> None:
        """Write the optimizer states."""
        for role in ROLES:
            self._engines[role].save(folder / optimizer_file(role))


def optimizer_file(role: str) -> str:
    """Return the name of a role's optimizer state in a checkpoint."""
    return f"optimizer-{role}.pt"


def peak_learning_rate(config: Config, role: str) -> float:
    """Return a role's highest learning rate; the critic may have its own."""
    own = config.ppo.critic_lr if role == CRITIC else None
    return config.ppo.optimizer.lr if own is None else own


def build_optimizer(config: Config, role: str, named_parameters: Any) -> AdamW:
    """Return AdamW for one role."""
    return adamw(named_parameters, config.ppo.optimizer, lr=peak_learning_rate(config, role))
