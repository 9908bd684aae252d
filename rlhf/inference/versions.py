"""A model as a stage uses it: opened by its role, answering prompts, telling log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.algo.masked import token_logprobs
from rlhf.config import Model, Sampling
from rlhf.data.chat import encode_prompts
from rlhf.data.collate import pad_right
from rlhf.data.records import Message, Prompt
from rlhf.inference.generation import Generator, Response, fitting, scoring_length
from rlhf.inference.generators import check_generator, open_generator
from rlhf.inference.scoring import HfScorer, Scorer
from rlhf.models.loading import (
    autocast,
    load_policy,
    load_reward_model,
    load_tokenizer,
    setup_torch,
)
from rlhf.nodes import NodeContext

TOKENS_PER_BATCH = 2048
"""Bounds the logits of one forward pass: 400 MB at a vocabulary of 50,000."""


class Version(Protocol):
    """A chat model that answers prompts."""

    def fitting(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[Prompt]:
        """Return the prompts that leave room for a response of this length and its EOS."""

    def generate(
        self,
        prompts: Sequence[list[Message]],
        *,
        num_samples: int,
        sampling: Sampling,
        keys: Sequence[str],
    ) -> list[list[Response]]:
        """Sample responses, as `inference.generation.Generator`."""

    def logprobs(
        self,
        prompts: Sequence[list[Message]],
        responses: Sequence[list[int]],
        *,
        temperature: float,
    ) -> list[float]:
        """Return the log-probability of each whole response (token ids), in nats."""


class HfVersion:
    """A transformers model behind the `Version` protocol; the generator holds the same weights."""

    def __init__(
        self, model: Any, tokenizer: Any, *, generator: Generator, settings: Model
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._generator = generator

    def fitting(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[Prompt]:
        """Return the prompts that leave room for a response of this length and its EOS."""
        kept, _ = fitting(
            prompts,
            self._tokenizer,
            max_new_tokens=max_new_tokens,
            max_length=self._settings.max_length,
        )
        return kept

    def generate(
        self,
        prompts: Sequence[list[Message]],
        *,
        num_samples: int,
        sampling: Sampling,
        keys: Sequence[str],
    ) -> list[list[Response]]:
        """Sample responses; one RNG key per prompt."""
        with autocast(self._settings, self._model.device):
            return self._generator.generate(
                prompts, num_samples=num_samples, sampling=sampling, keys=keys
            )

    def logprobs(
        self,
        prompts: Sequence[list[Message]],
        responses: Sequence[list[int]],
        *,
        temperature: float,
    ) -> list[float]:
        """Return the log-probability of each whole response under softmax(logits / temperature)."""
        rows = list(zip(encode_prompts(self._tokenizer, prompts), responses, strict=True))
        longest = max((len(prompt) + len(response) for prompt, response in rows), default=1)
        size = max(1, TOKENS_PER_BATCH // longest)
        sums = []
        for start in range(0, len(rows), size):
            sums += self._logprobs_batch(rows[start : start + size], temperature).tolist()
        return sums

    @torch.no_grad()
    def _logprobs_batch(
        self, rows: list[tuple[list[int], list[int]]], temperature: float
    ) -> Tensor:
        device = self._model.device
        pad_id = self._tokenizer.pad_token_id
        tokens_BT = pad_right([prompt + response for prompt, response in rows], pad_id).to(device)
        real_BT = pad_right([[1] * (len(p) + len(r)) for p, r in rows], 0).to(device)
        response_BT = pad_right([[0] * len(p) + [1] * len(r) for p, r in rows], 0).to(device)
        with autocast(self._settings, device):
            logits_BTV = self._model(input_ids=tokens_BT, attention_mask=real_BT).logits
        logprobs_BT = token_logprobs(logits_BTV[:, :-1], tokens_BT[:, 1:], temperature=temperature)
        return torch.where(response_BT[:, 1:].bool(), logprobs_BT, 0.0).sum(1).cpu()


def open_version(context: NodeContext, role: str) -> Version:
    """Load the chat model of a role on the configured device."""
    config = context.config
    check_generator(config)
    path = context.inputs.models[role].path
    device = setup_torch(config.compute)
    model = load_policy(path, model=config.model, seed=context.seed).to(device)
    tokenizer = load_tokenizer(path)
    generator = open_generator(
        config, model, tokenizer, scratch=context.directory.path, device=device
    )
    return HfVersion(model, tokenizer, generator=generator, settings=config.model)


def open_scorer(context: NodeContext, role: str) -> Scorer:
    """Load the reward model of a role; ArtifactError if it lacks its trained score head."""
    config, settings = context.config, context.config.model
    path = context.inputs.models[role].path
    device = setup_torch(config.compute)
    model = load_reward_model(path, model=settings, new_head=False, seed=context.seed).to(device)
    # It also scores PPO's held-out responses, which may be longer than those sampled here.
    samplings = (config.evaluate.sampling, config.ppo.sampling)
    max_length = max(scoring_length(settings.max_length, sampling) for sampling in samplings)
    scorer = HfScorer(model, load_tokenizer(path), max_length=max_length)

    def score(prompts: Sequence[list[Message]], responses: Sequence[str]) -> Tensor:
        with autocast(settings, device):
            return scorer(prompts, responses)

    return score
