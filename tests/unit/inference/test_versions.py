"""A chat model and a reward model, opened by role, on a micro Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.artifacts import NodeDir
from rlhf.config import Compute, Config, Evaluate, Model, Sampling
from rlhf.data.chat import encode_prompt
from rlhf.data.records import Prompt
from rlhf.errors import ArtifactError
from rlhf.inference.generation import HfGenerator
from rlhf.inference.versions import HfVersion, open_scorer, open_version
from rlhf.models.loading import save_model
from rlhf.nodes import Inputs, ModelInput, Node, NodeContext
from tests.micro_models import policy, scorer, tokenizer

PROMPTS = [
    [{"role": "user", "content": text}]
    for text in ("what do foxes eat ?", "is it true ?", "tell me of the owl , please .")
]
RESPONSES = [[20, 31, 1], [7], [9, 10, 11, 12, 13, 14, 1]]


def version() -> HfVersion:
    model, settings = policy(), Model(max_length=64)
    generator = HfGenerator(model, tokenizer(), max_length=settings.max_length)
    return HfVersion(model, tokenizer(), generator=generator, settings=settings)


def slow_logprob(prompt: list[dict[str, str]], response: list[int], temperature: float) -> float:
    """Sum the log-probabilities token by token, one row at a time, without padding."""
    ids = encode_prompt(tokenizer(), prompt)
    total = 0.0
    for token in response:
        with torch.no_grad():
            logits = policy()(input_ids=torch.tensor([ids])).logits[0, -1]
        total += float((logits.double() / temperature).log_softmax(-1)[token])
        ids = [*ids, token]
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_loop_without_padding(temperature: float) -> None:
    fast = version().logprobs(PROMPTS, RESPONSES, temperature=temperature)
    slow = [
        slow_logprob(prompt, response, temperature)
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert fast == pytest.approx(slow, abs=1e-4)


def test_logprobs_do_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    together = version().logprobs(PROMPTS, RESPONSES, temperature=1.0)
    monkeypatch.setattr("rlhf.inference.versions.TOKENS_PER_BATCH", 1)
    alone = version().logprobs(PROMPTS, RESPONSES, temperature=1.0)
    assert together == pytest.approx(alone, abs=1e-4)
    assert version().logprobs([], [], temperature=1.0) == []


def test_fitting_prompts_leave_room_for_a_response_and_its_eos() -> None:
    asked = Prompt(id="a", prompt=PROMPTS[0], is_safety=False, source="test")
    length = len(encode_prompt(tokenizer(), PROMPTS[0]))
    assert version().fitting([asked], max_new_tokens=64 - length - 1) == [asked]
    assert version().fitting([asked], max_new_tokens=64 - length) == []


def make_context(folder: Path) -> NodeContext:
    config = Config(
        recipe="test",
        model=Model(max_length=128),
        evaluate=Evaluate(sampling=Sampling(max_new_tokens=8)),
        compute=Compute(num_threads=1, device="cpu"),
    )
    models = {
        role: ModelInput(str(folder / role), role, role) for role in ("candidate", "judge_safety")
    }
    node = Node("round-01/evaluate", "evaluate", 1, (), {})
    return NodeContext(config, node, Inputs(models, ()), NodeDir(folder), seed=0)


def test_roles_open_from_saved_folders(tmp_path: Path) -> None:
    save_model(policy(), tokenizer(), tmp_path / "candidate")
    save_model(scorer(), tokenizer(), tmp_path / "judge_safety")
    context = make_context(tmp_path)
    opened = open_version(context, "candidate")
    assert opened.logprobs(PROMPTS, RESPONSES, temperature=1.0) == version().logprobs(
        PROMPTS, RESPONSES, temperature=1.0
    )
    sampling = context.config.evaluate.sampling
    drawn = opened.generate(PROMPTS, num_samples=1, sampling=sampling, keys=["a", "b", "c"])
    texts = [response.text for [response] in drawn]
    scores = open_scorer(context, "judge_safety")(PROMPTS, texts)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32


def test_a_language_model_is_no_scorer(tmp_path: Path) -> None:
    save_model(policy(), tokenizer(), tmp_path / "judge_safety")
    with pytest.raises(ArtifactError, match=r"score\.weight"):
        open_scorer(make_context(tmp_path), "judge_safety")
