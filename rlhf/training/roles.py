"""The five models of PPO as five models in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config import Model
from rlhf.data.records import Message
from rlhf.inference.generation import PolicyGenerator, Response
from rlhf.inference.scoring import Scorer
from rlhf.models.actor_critic import Measure, PolicyAndCritic, ResponseBatch, ValueModel
from rlhf.models.loading import autocast
from rlhf.models.packing import pass_padding
from rlhf.training.rollout import Measured


class SeparateRoles:
    """Five full models; `start` is None where the reference is the round's start itself.

    The reference and the start are frozen here; every weight of policy and critic is trained.
    """

    def __init__(
        self,
        *,
        policy: Any,
        critic: ValueModel,
        reference: Any,
        start: Any | None,
        scorers: tuple[Scorer, Scorer],
        generator: PolicyGenerator,
        tokenizer: Any,
        settings: Model,
        temperature: float,
    ) -> None:
        measure = Measure(temperature, tokenizer.pad_token_id)
        self.tokenizer = tokenizer
        self.joint: nn.Module = PolicyAndCritic(policy, critic, measure)
        self._policy, self._critic, self._measure = policy, critic, measure
        self._reference, self._start = reference, start
        self._score_helpfulness, self._score_safety = scorers
        self._generator, self._settings = generator, settings
        for frozen in (reference, start):
            if frozen is not None:
                frozen.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Return where the models live."""
        device: torch.device = self._policy.device
        return device

    @property
    def pass_padding(self) -> float:
        """Return the padding tokens for which one more pass is worth its start."""
        return pass_padding(self._policy)

    @property
    def generator(self) -> FollowingPolicy:
        """Return the policy as a sampler."""
        return FollowingPolicy(self._generator, self._policy, self._settings)

    def score(
        self, prompts: Sequence[list[Message]], responses: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return raw helpfulness and safety scores, both [B]."""
        with autocast(self._settings, self.device):
            return (
                self._score_helpfulness(prompts, responses),
                self._score_safety(prompts, responses),
            )

    @torch.no_grad()
    def measure(self, batch: ResponseBatch) -> Measured:
        """Run policy, critic, reference and the round's start without gradient."""
        logprobs_BT, entropies_BT = self._measure.logprobs_and_entropies(
            self._policy.base_model, self._policy.get_output_embeddings(), batch
        )
        ref_logprobs_BT = self._frozen_logprobs(self._reference, batch)
        start_logprobs_BT = ref_logprobs_BT
        if self._start is not None:
            start_logprobs_BT = self._frozen_logprobs(self._start, batch)
        return Measured(
            logprobs_BT=logprobs_BT,
            ref_logprobs_BT=ref_logprobs_BT,
            start_logprobs_BT=start_logprobs_BT,
            values_BT=self._critic(batch),
            entropies_BT=entropies_BT,
        )

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """Return the policy's parameters by name; tied ones appear once."""
        return dict(self._policy.named_parameters())

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """Return the critic's parameters by name."""
        return dict(self._critic.named_parameters())

    def _frozen_logprobs(self, model: Any, batch: ResponseBatch) -> Tensor:
        return self._measure.frozen_logprobs(model.base_model, model.get_output_embeddings(), batch)


@dataclass(frozen=True, slots=True)
class FollowingPolicy:
    """A generator that takes over the policy's weights before each phase of sampling."""

    generator: PolicyGenerator
    policy: Any
    settings: Model

    def generate(self, *args: Any, **kwargs: Any) -> list[list[Response]]:
        """Return what the generator returns, decoded in the configured precision."""
        self.generator.update_weights(self.policy, self.policy.state_dict)
        with autocast(self.settings, self.policy.device):
            return self.generator.generate(*args, **kwargs)
