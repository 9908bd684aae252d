"""Fused decoding against the models' own forward pass, row by row and without a cache."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import micro_models
import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf.config import Config, Engine, Precision
from rlhf.inference.generation import HfGenerator
from rlhf.inference.generators import open_generator
from rlhf.inference.llama import LlamaDecoding, LlamaGenerator, LlamaWeights, why_not

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Large enough that attention and gates are far from uniform.
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied-with-biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
    "wide-heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=16)),
    "llama3-rope": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [3]]


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    # Fresh models have biases of 0 and norms of 1, which a forgotten term would not change.
    for key, value in model.named_parameters():
        if key.endswith("bias") or "norm" in key:
            value.data.uniform_(0.5, 1.5)
    return model


def plain_logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_equal_the_models_own(name: str) -> None:
    """Also after rows have left: one of a prompt, a whole prompt, all but one row."""
    model = build(name)
    assert why_not(model.config) == ""
    weights = LlamaWeights(model.config, model.state_dict(), dtype=torch.float32)
    state = LlamaDecoding(weights, PROMPTS, repeats=2, num_tokens=8)
    rows = [list(prompt) for prompt in PROMPTS for _ in range(2)]
    leaving = {2: [0, 2, 3, 4, 5], 4: [0, 3, 4], 6: [1]}
    for step in range(8):
        expected = plain_logits(model, rows)
        torch.testing.assert_close(
            state.logits.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0
        )
        kept = leaving.get(step)
        if kept is not None:
            state.select(torch.tensor(kept))
            rows = [rows[index] for index in kept]
        tokens = torch.tensor([(7 * step + 3 * index) % 57 + 3 for index in range(len(rows))])
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        if step < 7:
            state.advance(tokens)


@torch.no_grad()
def test_bf16_stays_near_fp32() -> None:
    """Matrices lose 16 bits; norms and residuals do not: shares differ by a few percent at most."""
    model = build("llama")
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        weights = LlamaWeights(model.config, model.state_dict(), dtype=dtype)
        shares.append(LlamaDecoding(weights, PROMPTS, repeats=1, num_tokens=2).logits.softmax(-1))
    assert 0 < (shares[0] - shares[1]).abs().max() < 0.05


def test_weights_are_those_of_the_last_update() -> None:
    tokenizer, first = micro_models.tokenizer(), micro_models.policy(0)
    second = micro_models.policy(1)
    generator = LlamaGenerator(
        first, tokenizer, max_length=64, weights=first.state_dict, dtype=torch.float32
    )
    sampling = copy.deepcopy(Config(recipe="test", run="test").rejection.sampling)
    sampling.max_new_tokens = 8
    prompt: list[Any] = [[{"role": "user", "content": "the cat"}]]

    def answer(one: HfGenerator) -> list[int]:
        [[response]] = one.generate(prompt, num_samples=1, sampling=sampling, keys=["k"])
        return response.token_ids

    before = answer(generator)
    assert before == answer(HfGenerator(first, tokenizer, max_length=64))
    generator.update_weights(second, second.state_dict)
    assert answer(generator) == answer(HfGenerator(second, tokenizer, max_length=64)) != before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPTNeoXConfig(), "model_type gpt_neox"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act gelu"),
        (MistralConfig(sliding_window=128), "window"),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type dynamic",
        ),
    ],
)
def test_what_it_cannot_decode_is_named(config: Any, reason: str) -> None:
    assert reason in why_not(config)


def test_other_models_are_decoded_by_transformers_and_it_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(recipe="test", run="test")
    config.generator.engine = Engine.fused
    model, tokenizer = micro_models.policy(), micro_models.tokenizer()

    def opened() -> Any:
        device = torch.device("cpu")
        return open_generator(config, model, tokenizer, scratch=tmp_path, device=device)

    assert type(opened()) is LlamaGenerator
    model = copy.deepcopy(model)
    model.config.hidden_act = "gelu"
    with caplog.at_level(logging.WARNING):
        assert type(opened()) is HfGenerator
    assert "hidden_act gelu" in caplog.text
    config.generator.engine = Engine.hf
    model.config.hidden_act = "silu"
    assert type(opened()) is HfGenerator
    config.generator.engine = Engine.fused
    config.model.precision = Precision.bf16
    assert opened()._weights.dtype == torch.bfloat16
