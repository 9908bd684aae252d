"""Policy and critic as PPO trains them: heads are applied to response positions only.

Shapes: B rows, L tokens of prompt + response, T response tokens, N response tokens of all rows,
H hidden size, V vocabulary. Rows are right-padded. A response token at position p is predicted by
the hidden state at p - 1, which is also the state that its value judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.algo.masked import at_least_float32, logprobs_and_entropies, token_logprobs
from rlhf.data.collate import pad_right
from rlhf.models.packing import arrange

TOKENS_AT_ONCE = 4096
"""Response tokens per block of logits where no gradient is needed: 800 MB at 49,152 words."""


@dataclass(frozen=True, slots=True)
class ResponseBatch:
    """Prompts with responses, ready for a forward pass."""

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    tokens_BT: Tensor
    response_mask_BT: Tensor
    states_BT: Tensor
    """Position of the hidden state that predicts each response token; 0 outside the mask."""

    @property
    def tokens_N(self) -> Tensor:
        """Return all response tokens, row by row."""
        return self.tokens_BT[self.response_mask_BT]

    def spread(self, values_N: Tensor) -> Tensor:
        """Put one value per response token back into rows, shape [B, T], 0 outside the mask."""
        empty_BT = torch.zeros(
            self.tokens_BT.shape, dtype=values_N.dtype, device=self.tokens_BT.device
        )
        return empty_BT.masked_scatter(self.response_mask_BT, values_N)


def pack_responses(
    rows: Sequence[tuple[list[int], list[int]]], *, pad_id: int, device: torch.device
) -> ResponseBatch:
    """Collate (prompt tokens, response tokens) into a right-padded batch."""
    tensors = (
        pad_right([prompt + response for prompt, response in rows], pad_id),
        pad_right([[1] * (len(prompt) + len(response)) for prompt, response in rows], 0),
        pad_right([response for _, response in rows], pad_id),
        pad_right([[1] * len(response) for _, response in rows], 0).bool(),
        pad_right([[len(p) - 1 + t for t in range(len(r))] for p, r in rows], 0),
    )
    return ResponseBatch(*(tensor.to(device) for tensor in tensors))


def trunk_states(trunk: Any, batch: ResponseBatch) -> Tensor:
    """Run a transformer without its head; returns the states of all response tokens, [N, H]."""
    rows = arrange(trunk, batch.input_ids_BL, batch.attention_mask_BL)
    states: Tensor = trunk(**rows.inputs, use_cache=False).last_hidden_state
    places_BT = rows.places_BL.gather(1, batch.states_BT)
    return rows.pick(states, places_BT[batch.response_mask_BT])


def response_logits(head: Any, states_NH: Tensor, *, pad_id: int) -> Tensor:
    """Return next-token logits [N, V] with pad at minus infinity, as the sampler sees them."""
    logits_NV: Tensor = head(states_NH)
    pad_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device) == pad_id
    return logits_NV.masked_fill(pad_V, -torch.inf)


@dataclass(frozen=True, slots=True)
class Measure:
    """How log-probabilities are read: those of the sampler, softmax(logits / temperature).

    Pad is never sampled, so it has no share in the softmax.
    """

    temperature: float
    pad_id: int

    def logprobs(self, trunk: Any, head: Any, batch: ResponseBatch) -> Tensor:
        """Return the log-probability of each response token, shape [B, T], 0 outside the mask."""
        logits_NV = response_logits(head, trunk_states(trunk, batch), pad_id=self.pad_id)
        logprobs_N = token_logprobs(logits_NV, batch.tokens_N, temperature=self.temperature)
        return batch.spread(logprobs_N)

    @torch.no_grad()
    def logprobs_and_entropies(
        self, trunk: Any, head: Any, batch: ResponseBatch
    ) -> tuple[Tensor, Tensor]:
        """Return both as [B, T] without gradient; logits exist a block of tokens at a time."""
        logprobs, entropies = zip(
            *(
                logprobs_and_entropies(logits_nV, tokens_n, temperature=self.temperature)
                for logits_nV, tokens_n in self._blocks(trunk, head, batch)
            ),
            strict=True,
        )
        return batch.spread(torch.cat(logprobs)), batch.spread(torch.cat(entropies))

    @torch.no_grad()
    def frozen_logprobs(self, trunk: Any, head: Any, batch: ResponseBatch) -> Tensor:
        """Return `logprobs` without gradient; logits exist a block of tokens at a time."""
        blocks = [
            token_logprobs(logits_nV, tokens_n, temperature=self.temperature)
            for logits_nV, tokens_n in self._blocks(trunk, head, batch)
        ]
        return batch.spread(torch.cat(blocks))

    def _blocks(
        self, trunk: Any, head: Any, batch: ResponseBatch
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the logits [n, V] and tokens [n] of a block of response tokens at a time."""
        states_NH = trunk_states(trunk, batch)
        for states_nH, tokens_n in zip(
            states_NH.split(TOKENS_AT_ONCE), batch.tokens_N.split(TOKENS_AT_ONCE), strict=True
        ):
            yield response_logits(head, states_nH, pad_id=self.pad_id), tokens_n


class ValueModel(nn.Module):
    """A reward model's trunk with its score head applied at every response position."""

    def __init__(self, reward_model: Any) -> None:
        super().__init__()
        self.trunk = reward_model.base_model
        self.head: nn.Module = reward_model.score

    def forward(self, batch: ResponseBatch) -> Tensor:
        """Return the value of each response token's state, shape [B, T], 0 outside the mask."""
        values_N = self.head(trunk_states(self.trunk, batch)).squeeze(-1)
        return batch.spread(at_least_float32(values_N))


class Actor(nn.Module):
    """A policy as PPO trains it: the log-probabilities of responses."""

    def __init__(self, policy: Any, measure: Measure) -> None:
        super().__init__()
        self.policy = policy
        self.measure = measure

    def forward(self, batch: ResponseBatch) -> Tensor:
        """Return the log-probability of each response token, shape [B, T], 0 outside the mask."""
        return self.measure.logprobs(
            self.policy.base_model, self.policy.get_output_embeddings(), batch
        )


class PolicyAndCritic(nn.Module):
    """The two trained models as one module, so that one wrapper of accelerate holds both."""

    def __init__(self, policy: Any, critic: ValueModel, measure: Measure) -> None:
        super().__init__()
        self.actor = Actor(policy, measure)
        self.critic = critic

    def forward(
        self, batch: ResponseBatch, *, with_policy: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """Return logprobs (None without the policy) and values, both [B, T], 0 outside the mask."""
        logprobs_BT = self.actor(batch) if with_policy else None
        values_BT: Tensor = self.critic(batch)
        return logprobs_BT, values_BT
