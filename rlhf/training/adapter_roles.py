"""The five models of PPO as adapters on one trunk (model.lora.enabled)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.algo.masked import at_least_float32
from rlhf.config import Model
from rlhf.data.records import Message
from rlhf.inference.generation import PolicyGenerator, Response
from rlhf.inference.scoring import HfScorer
from rlhf.models.actor_critic import Measure, ResponseBatch, trunk_states
from rlhf.models.adapters import POLICY, REFERENCE, AdapterScorer, AdapterTrunk
from rlhf.models.loading import autocast
from rlhf.models.packing import pass_padding
from rlhf.training.rollout import Measured

CRITIC = "critic"


class AdapterPolicyAndCritic(nn.Module):
    """The trained adapters of one trunk, as `actor_critic.PolicyAndCritic` on two."""

    def __init__(self, trunk: AdapterTrunk, head: nn.Module, measure: Measure) -> None:
        super().__init__()
        self.model = trunk.model
        self.head = head
        self._trunk = trunk
        self._measure = measure

    def forward(
        self, batch: ResponseBatch, *, with_policy: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """Return logprobs (None without the policy) and values, both [B, T], 0 outside the mask."""
        logprobs_BT = None
        if with_policy:
            with self._trunk.role(POLICY) as model:
                logprobs_BT = self._measure.logprobs(
                    model.base_model, model.get_output_embeddings(), batch
                )
        return logprobs_BT, self.values(batch)

    def values(self, batch: ResponseBatch) -> Tensor:
        """Return the value of each response token's state, shape [B, T], 0 outside the mask."""
        with self._trunk.role(CRITIC) as model:
            values_N = self.head(trunk_states(model.base_model, batch)).squeeze(-1)
        return batch.spread(at_least_float32(values_N))


class AdapterRoles:
    """One trunk that plays policy, reference, critic and both reward models.

    The trunk has an adapter for each of `scorers` (by axis) and for the critic; the reference is
    made here, a frozen copy of the policy's start. So the reference is the round's start.
    """

    def __init__(
        self,
        *,
        trunk: AdapterTrunk,
        critic_head: nn.Module,
        scorers: Mapping[str, tuple[str, nn.Module]],
        generator: PolicyGenerator,
        tokenizer: Any,
        settings: Model,
        temperature: float,
        max_scoring_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self._trunk, self._settings = trunk, settings
        self._generator = generator
        self._measure = Measure(temperature, tokenizer.pad_token_id)
        trunk.copy(POLICY, REFERENCE)
        trunk.train(POLICY, CRITIC)
        self._pair = AdapterPolicyAndCritic(trunk, critic_head, self._measure)
        self.joint: nn.Module = self._pair
        self._scorers = {
            axis: HfScorer(
                AdapterScorer(trunk, role, head.requires_grad_(False)),
                tokenizer,
                max_length=max_scoring_length,
            )
            for axis, (role, head) in scorers.items()
        }

    @property
    def device(self) -> torch.device:
        """Return where the trunk lives."""
        device: torch.device = self._trunk.model.device
        return device

    @property
    def pass_padding(self) -> float:
        """Return the padding tokens for which one more pass is worth its start."""
        return pass_padding(self._trunk.model)

    @property
    def generator(self) -> PolicyOnTrunk:
        """Return the policy as a sampler."""
        return PolicyOnTrunk(self._generator, self._trunk, self._settings)

    def score(
        self, prompts: Sequence[list[Message]], responses: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return raw helpfulness and safety scores, both [B]."""
        with autocast(self._settings, self.device):
            return (
                self._scorers["helpfulness"](prompts, responses),
                self._scorers["safety"](prompts, responses),
            )

    @torch.no_grad()
    def measure(self, batch: ResponseBatch) -> Measured:
        """Run policy, critic and reference without gradient."""
        with self._trunk.role(POLICY) as model:
            logprobs_BT, entropies_BT = self._measure.logprobs_and_entropies(
                model.base_model, model.get_output_embeddings(), batch
            )
        with self._trunk.role(REFERENCE) as model:
            ref_logprobs_BT = self._measure.frozen_logprobs(
                model.base_model, model.get_output_embeddings(), batch
            )
        return Measured(
            logprobs_BT=logprobs_BT,
            ref_logprobs_BT=ref_logprobs_BT,
            start_logprobs_BT=ref_logprobs_BT,
            values_BT=self._pair.values(batch),
            entropies_BT=entropies_BT,
        )

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """Return the weights of the policy's adapter by name."""
        return self._trunk.parameters(POLICY)

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """Return the weights of the critic's adapter and head by name."""
        head = {f"head.{name}": value for name, value in self._pair.head.named_parameters()}
        return {**self._trunk.parameters(CRITIC), **head}


@dataclass(frozen=True, slots=True)
class PolicyOnTrunk:
    """A generator that takes over the policy's adapter before each phase of sampling."""

    generator: PolicyGenerator
    trunk: AdapterTrunk
    settings: Model

    def generate(self, *args: Any, **kwargs: Any) -> list[list[Response]]:
        """Return what the generator returns, decoded in the configured precision."""
        self.generator.update_weights(self.trunk.model, partial(self.trunk.merged_weights, POLICY))
        with self.trunk.role(POLICY), autocast(self.settings, self.trunk.model.device):
            return self.generator.generate(*args, **kwargs)
