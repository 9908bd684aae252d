"""PPO's rollouts: prompts in a fixed order, scored responses, and the experience made of them.

Shapes: B rollouts of one iteration, T response tokens. Differences from the paper, which is silent:
advantages are whitened over the batch, and a response without EOS loses `ppo.no_eos_penalty`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rlhf.algo.advantages import gae
from rlhf.algo.masked import whiten
from rlhf.algo.rewards import gate, kl_per_token, no_eos_penalty, token_rewards
from rlhf.config import Ppo
from rlhf.data.chat import encode_prompts
from rlhf.data.records import Message, Prompt
from rlhf.errors import StageError
from rlhf.inference.generation import Generator, Response
from rlhf.models.actor_critic import ResponseBatch


@dataclass(frozen=True, slots=True)
class Measured:
    """What the models say about sampled responses, each [B, T], without gradient."""

    logprobs_BT: Tensor
    ref_logprobs_BT: Tensor
    start_logprobs_BT: Tensor
    values_BT: Tensor
    entropies_BT: Tensor


class Roles(Protocol):
    """The five models of PPO, whether they are five models or one trunk with adapters."""

    tokenizer: Any
    joint: nn.Module
    """Called as `joint(batch, with_policy=...)`; returns logprobs and values [B, T]."""

    @property
    def device(self) -> torch.device:
        """Return where the models live."""

    @property
    def pass_padding(self) -> float:
        """Return the padding tokens for which one more pass is worth its start."""

    @property
    def generator(self) -> Generator:
        """Return the policy as a sampler; it follows the policy's weights."""

    def score(
        self, prompts: Sequence[list[Message]], responses: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return raw helpfulness and safety scores, both [B], float32, on the CPU."""

    def measure(self, batch: ResponseBatch) -> Measured:
        """Run policy, critic, reference and the round's start without gradient."""

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """Return the policy's trained parameters by name."""

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """Return the critic's trained parameters by name."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt, a sampled response and its two raw scores."""

    prompt: Prompt
    prompt_ids: list[int]
    response: Response
    score_helpfulness: float
    score_safety: float

    @property
    def length(self) -> int:
        """Return the tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response.token_ids)


@dataclass(frozen=True, slots=True)
class Experience:
    """One iteration's rollouts with everything the update needs; tensors on the CPU."""

    rollouts: list[Rollout]
    response_mask_BT: Tensor
    measured: Measured
    gated_scores_B: Tensor
    safety_selected_B: Tensor
    token_rewards_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor
    kl_B: Tensor
    kl_to_start_B: Tensor


def iteration_prompts(
    prompts: Sequence[Prompt], *, iteration: int, batch_size: int, seed: int
) -> list[tuple[Prompt, str]]:
    """Return the prompts of an iteration with their sampling keys.

    All iterations together walk through epochs, each a new shuffle of all prompts; the position
    follows from the iteration alone.
    """
    chosen = []
    orders: dict[int, Any] = {}
    for position in range(iteration * batch_size, (iteration + 1) * batch_size):
        epoch, index = divmod(position, len(prompts))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(prompts))
        prompt = prompts[orders[epoch][index]]
        # A prompt may come twice in an iteration, from two epochs, and gets two samples.
        chosen.append((prompt, f"{seed}/{iteration}/{epoch}/{prompt.id}"))
    return chosen


def sample_rollouts(
    chosen: Sequence[tuple[Prompt, str]], roles: Roles, *, settings: Ppo
) -> list[Rollout]:
    """Sample one response per prompt and score it; raises StageError for a score that is no number.

    The text is scored, not the tokens: the reward models read what a person would read.
    """
    conversations = [prompt.prompt for prompt, _ in chosen]
    responses = [
        samples[0]
        for samples in roles.generator.generate(
            conversations,
            num_samples=1,
            sampling=settings.sampling,
            keys=[key for _, key in chosen],
        )
    ]
    helpfulness_B, safety_B = roles.score(conversations, [response.text for response in responses])
    for axis, scores_B in (("helpfulness", helpfulness_B), ("safety", safety_B)):
        bad = int((~scores_B.isfinite()).sum())
        if bad:
            raise StageError(
                f"{bad} of {len(chosen)} {axis} scores are NaN or infinite: "
                "check that reward model before training on it"
            )
    return [
        Rollout(prompt, prompt_ids, response, h, s)
        for (prompt, _), prompt_ids, response, h, s in zip(
            chosen,
            encode_prompts(roles.tokenizer, conversations),
            responses,
            helpfulness_B.tolist(),
            safety_B.tolist(),
            strict=True,
        )
    ]


def gated_scores(rollouts: Sequence[Rollout], *, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the raw score that counts for each rollout and where it is the safety score, [B]."""
    return gate(
        torch.tensor([rollout.score_helpfulness for rollout in rollouts]),
        torch.tensor([rollout.score_safety for rollout in rollouts]),
        torch.tensor([rollout.prompt.is_safety for rollout in rollouts]),
        threshold=threshold,
    )


def response_mask(rollouts: Sequence[Rollout]) -> Tensor:
    """Return True at every response token, EOS included, shape [B, T]."""
    lengths_B = torch.tensor([len(rollout.response.token_ids) for rollout in rollouts])
    return torch.arange(int(lengths_B.max())) < lengths_B.unsqueeze(1)


def sequence_kl(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return log p - log p_ref of each whole response in nats, shape [B]; its mean is the KL."""
    return torch.where(mask_BT, logprobs_BT - ref_logprobs_BT, 0.0).sum(1)


def build_experience(
    rollouts: list[Rollout], measured: Measured, *, settings: Ppo, threshold: float
) -> Experience:
    """Turn scores into advantages (Eq. 4): gate, whiten over the batch, penalise KL, GAE, whiten.

    The batch is the global one: pass the rollouts of all processes.
    """
    mask_BT = response_mask(rollouts)
    finished_B = torch.tensor([rollout.response.finished for rollout in rollouts])
    gated_B, safety_selected_B = gated_scores(rollouts, threshold=threshold)
    scores_B = no_eos_penalty(whiten(gated_B), finished_B, settings.no_eos_penalty)
    kl_BT = kl_per_token(
        measured.logprobs_BT, measured.ref_logprobs_BT, estimator=settings.kl_estimator.name
    )
    rewards_BT = token_rewards(scores_B, kl_BT, mask_BT, kl_coef=settings.kl_coef)
    advantages_BT, returns_BT = gae(
        rewards_BT,
        measured.values_BT,
        mask_BT,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
    )
    return Experience(
        rollouts=rollouts,
        response_mask_BT=mask_BT,
        measured=measured,
        gated_scores_B=gated_B,
        safety_selected_B=safety_selected_B,
        token_rewards_BT=rewards_BT,
        advantages_BT=whiten(advantages_BT, mask_BT),
        returns_BT=returns_BT,
        kl_B=sequence_kl(measured.logprobs_BT, measured.ref_logprobs_BT, mask_BT),
        kl_to_start_B=sequence_kl(measured.logprobs_BT, measured.start_logprobs_BT, mask_BT),
    )
