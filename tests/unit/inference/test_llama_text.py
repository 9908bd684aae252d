"""Whole texts of fused decoding: greedy ones against transformers' generate, others re-batched."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import micro_models
import pytest
import torch

from rlhf.config import Model, Sampling
from rlhf.data.chat import encode_prompt
from rlhf.data.collate import pad_left
from rlhf.data.records import Message
from rlhf.inference.generation import Response
from rlhf.inference.llama import LlamaDecoding, LlamaGenerator, LlamaWeights
from rlhf.models.loading import load_policy, load_tokenizer

NUM_PROMPTS = 200
WORDS = ["the", "cat", "sat", "on", "a", "mat", "saw", "one", "red", "dog", "near", "house"]
REAL_MODEL = os.environ.get("RLHF_REAL_MODEL", "")


def texts(seed: int) -> list[list[Message]]:
    """Return prompts of 1 to 12 words."""
    rng = random.Random(seed)
    chosen = [rng.choices(WORDS, k=rng.randint(1, 12)) for _ in range(NUM_PROMPTS)]
    return [[{"role": "user", "content": " ".join(words)}] for words in chosen]


def fused(model: Any, tokenizer: Any, sampling: Sampling) -> list[Response]:
    generator = LlamaGenerator(
        model, tokenizer, max_length=256, weights=model.state_dict, dtype=torch.float32
    )
    keys = [f"key {index}" for index in range(NUM_PROMPTS)]
    found = generator.generate(texts(0), num_samples=1, sampling=sampling, keys=keys)
    return [response for [response] in found]


@torch.no_grad()
def greedy_of_transformers(model: Any, tokenizer: Any, *, num_tokens: int) -> list[list[int]]:
    written = []
    for start in range(0, NUM_PROMPTS, 50):
        ids = [encode_prompt(tokenizer, prompt) for prompt in texts(0)[start : start + 50]]
        rows = pad_left(ids, tokenizer.pad_token_id)
        found = model.generate(
            input_ids=rows,
            attention_mask=pad_left([[1] * len(row) for row in ids], 0),
            do_sample=False,
            max_new_tokens=num_tokens,
            suppress_tokens=[tokenizer.pad_token_id],
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        written += found[:, rows.shape[1] :].tolist()
    eos = tokenizer.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in written]


def check_greedy(model: Any, tokenizer: Any, *, num_tokens: int) -> None:
    sampling = Sampling(top_k=1, max_new_tokens=num_tokens, batch_size=64)
    found = [response.token_ids for response in fused(model, tokenizer, sampling)]
    assert found == greedy_of_transformers(model, tokenizer, num_tokens=num_tokens)


def test_greedy_text_is_that_of_transformers_token_by_token() -> None:
    check_greedy(micro_models.policy(0), micro_models.tokenizer(), num_tokens=16)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_MODEL, reason="RLHF_REAL_MODEL names no model folder")
def test_greedy_text_of_a_real_model() -> None:
    model = load_policy(Path(REAL_MODEL), model=Model(path=REAL_MODEL), seed=0)
    check_greedy(model, load_tokenizer(REAL_MODEL), num_tokens=32)


def test_another_batch_size_gives_nearly_the_same_text() -> None:
    """Rounding turns a token into another now and then: at most 1 % of the responses here."""
    model, tokenizer = micro_models.policy(0), micro_models.tokenizer()
    many, few = (
        [
            response.token_ids
            for response in fused(model, tokenizer, Sampling(max_new_tokens=16, batch_size=size))
        ]
        for size in (64, 3)
    )
    divergent = sum(one != other for one, other in zip(many, few, strict=True))
    assert divergent <= NUM_PROMPTS // 100


@torch.no_grad()
def test_a_rows_logprobs_do_not_depend_on_its_neighbours() -> None:
    model = micro_models.policy(0)
    weights = LlamaWeights(model.config, model.state_dict(), dtype=torch.float32)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [3]]
    together = LlamaDecoding(weights, prompts, repeats=2, num_tokens=6)
    alone = [
        LlamaDecoding(weights, [prompt], repeats=1, num_tokens=6)
        for prompt in prompts
        for _ in range(2)
    ]
    for step in range(6):
        expected = torch.cat([state.logits for state in alone]).log_softmax(-1)
        torch.testing.assert_close(together.logits.log_softmax(-1), expected, atol=1e-4, rtol=0)
        tokens = torch.tensor([(5 * step + 7 * row) % 20 + 3 for row in range(6)])
        if step < 5:
            together.advance(tokens)
            for state, token in zip(alone, tokens, strict=True):
                state.advance(token.unsqueeze(0))
