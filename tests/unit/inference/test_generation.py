"""The sampler's distribution, its keys, and decoding against a plain forward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf.config import Sampling
from rlhf.data.chat import encode_prompt
from rlhf.data.records import Prompt
from rlhf.errors import DataError
from rlhf.inference.generation import (
    HfGenerator,
    Response,
    fitting,
)
from rlhf.inference.llama import LlamaGenerator
from rlhf.toy.model import build_model, build_tokenizer

PAD, EOS = 0, 1
Generate = Callable[..., list[list[Response]]]
TEXTS = ["is the apple red", "the cat", "a fish eats the bread and the apple", "the dog eats"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def model() -> Any:
    model = build_model(0, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
    with torch.no_grad():
        # Attention that looks at some tokens more than at others, so that positions matter.
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight.mul_(15.0)
        # Not tied to the embeddings, which would repeat one token for ever; a tenth is EOS.
        head = torch.nn.Linear(32, model.config.vocab_size)
        generator = torch.Generator().manual_seed(1)
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.2)
        head.bias.zero_()
        head.bias[EOS] = 5.0
        model.lm_head = head
    return model.eval()


def prompts(texts: list[str]) -> list[list[Any]]:
    return [[{"role": "user", "content": text}] for text in texts]


@pytest.fixture(params=["hf", "fused"])
def generate(request: pytest.FixtureRequest) -> Generate:
    """Decode with one of the two generators: what a test says holds for both."""

    def answer(
        model: Any, tokenizer: Any, texts: list[str], num_samples: int = 1, **changes: Any
    ) -> list[list[Response]]:
        settings = {"temperature": 1.0, "max_new_tokens": 12, "batch_size": 64, **changes}
        generator = HfGenerator(model, tokenizer, max_length=128)
        if request.param == "fused":
            generator = LlamaGenerator(
                model, tokenizer, max_length=128, weights=model.state_dict, dtype=torch.float32
            )
        keys = [f"7/{text}" for text in texts]
        return generator.generate(
            prompts(texts), num_samples=num_samples, sampling=Sampling(**settings), keys=keys
        )

    return answer


def test_greedy_equals_a_full_forward_pass_without_cache(
    model: Any, tokenizer: Any, generate: Generate
) -> None:
    """At a temperature near 0 every token is the argmax given everything before it."""
    with torch.no_grad():
        model.lm_head.bias[EOS] = 0.0
    found = generate(model, tokenizer, TEXTS, temperature=1e-4)
    assert sum(len(row[0].token_ids) for row in found) >= 40
    for text, [response] in zip(TEXTS, found, strict=True):
        ids = encode_prompt(tokenizer, prompts([text])[0])
        for token in response.token_ids:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            logits[PAD] = -torch.inf
            assert token == int(logits.argmax())
            ids = [*ids, token]


def test_a_sample_depends_on_its_key_alone(model: Any, tokenizer: Any, generate: Generate) -> None:
    """Not on order, neighbours, batch size, padding or how many samples are drawn."""
    together = generate(model, tokenizer, TEXTS, num_samples=3)
    reverse = generate(model, tokenizer, TEXTS[::-1], num_samples=3)[::-1]
    alone = [generate(model, tokenizer, [text], num_samples=3)[0] for text in TEXTS]
    small = generate(model, tokenizer, TEXTS, num_samples=3, batch_size=2)
    more = [row[:3] for row in generate(model, tokenizer, TEXTS, num_samples=5)]

    def ids(found: list[list[Response]]) -> list[list[list[int]]]:
        return [[response.token_ids for response in row] for row in found]

    assert ids(together) == ids(reverse) == ids(alone) == ids(small) == ids(more)
    assert len({tuple(response.token_ids) for row in together for response in row}) >= 10


def test_responses_name_their_prompt_and_sample(
    model: Any, tokenizer: Any, generate: Generate
) -> None:
    found = generate(model, tokenizer, TEXTS, num_samples=3, batch_size=4)
    positions = [[(r.prompt_index, r.sample_index) for r in row] for row in found]
    assert positions == [[(i, s) for s in range(3)] for i in range(4)]


def test_eos_ends_a_response_and_counts(model: Any, tokenizer: Any, generate: Generate) -> None:
    responses = [r for row in generate(model, tokenizer, TEXTS, num_samples=16) for r in row]
    finished = [r for r in responses if r.finished]
    assert 4 <= len(finished) <= 60
    for response in responses:
        assert PAD not in response.token_ids
        assert (response.token_ids[-1] == EOS) == response.finished
        assert EOS not in response.token_ids[:-1]
        assert len(response.token_ids) == 12 or response.finished
        # Role markers and the like are not text.
        assert response.text == tokenizer.decode([t for t in response.token_ids if t > 4])


def test_eos_on_the_last_allowed_token_finishes(
    model: Any, tokenizer: Any, generate: Generate
) -> None:
    """A response that ends after n tokens is the same and still finished at max_new_tokens=n."""
    responses = generate(model, tokenizer, TEXTS[:1], num_samples=16)[0]
    n = min(len(r.token_ids) for r in responses if r.finished and len(r.token_ids) > 1)
    shorter = generate(model, tokenizer, TEXTS[:1], num_samples=16, max_new_tokens=n)[0]
    for long, short in zip(responses, shorter, strict=True):
        assert short.token_ids == long.token_ids[:n]
        assert short.finished == (EOS in long.token_ids[:n])


def test_pad_is_never_sampled_however_likely(
    model: Any, tokenizer: Any, generate: Generate
) -> None:
    with torch.no_grad():
        model.lm_head.bias[PAD] = 20.0
    responses = generate(model, tokenizer, TEXTS, num_samples=8)
    assert all(PAD not in response.token_ids for row in responses for response in row)


def test_over_long_prompts_are_refused_or_left_out(
    model: Any, tokenizer: Any, generate: Generate
) -> None:
    long = "the cat eats " * 60
    with pytest.raises(DataError, match=r"prompt 1 has \d+ tokens.*model.max_length=128"):
        generate(model, tokenizer, ["the cat", long])
    rows = [Prompt(str(i), prompts([t])[0], False, "s") for i, t in enumerate(["the cat", long])]
    length = len(encode_prompt(tokenizer, rows[0].prompt))
    kept, over_long = fitting(rows, tokenizer, max_new_tokens=5, max_length=length + 6)
    assert ([row.id for row in kept], over_long) == (["0"], 1)
    assert fitting(rows, tokenizer, max_new_tokens=5, max_length=length + 5) == ([], 2)
