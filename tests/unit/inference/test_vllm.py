"""The generator over vLLM: seeds, ends of responses, weights in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_vllm
import micro_models as micro
import micro_ppo
import pytest
import torch
from safetensors.torch import load_file

from rlhf.config import Config, Engine, Precision, Sampling
from rlhf.errors import DataError, StageError
from rlhf.inference.generation import PolicyGenerator
from rlhf.inference.generators import open_generator
from rlhf.inference.vllm import Batch, checked, publish

PROMPTS = [[{"role": "user", "content": text}] for text in ("the cat", "a dog eats", "is it ?")]
KEYS = ["one", "two", "three"]
SAMPLING = Sampling(temperature=0.9, max_new_tokens=6, batch_size=4)
BATCH = Batch(
    [[5, 6]],
    seeds=[1],
    temperature=1.0,
    top_k=None,
    top_p=1.0,
    max_new_tokens=3,
    eos_id=1,
    pad_id=0,
)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return fake_vllm.install(monkeypatch).made


def settings() -> Config:
    made = Config(recipe="test")
    made.generator.engine = Engine.vllm
    made.model.max_length = 32
    return made


def generator(folder: Path, model: Any = None, *, made: Config | None = None) -> PolicyGenerator:
    return open_generator(
        made or settings(),
        micro.policy(0) if model is None else model,
        micro.tokenizer(),
        scratch=folder,
        device=torch.device("cpu"),
    )


def answers(sampler: PolicyGenerator, *, num_samples: int = 2, **changes: Any) -> list[list[Any]]:
    given = {"prompts": PROMPTS, "keys": KEYS, "sampling": SAMPLING, **changes}
    return sampler.generate(given.pop("prompts"), num_samples=num_samples, **given)


def test_a_response_depends_on_its_key_alone(engines: list[Any], tmp_path: Path) -> None:
    sampler = generator(tmp_path)
    both = answers(sampler)
    assert answers(sampler) == both
    alone = answers(sampler, prompts=PROMPTS[1:2], keys=KEYS[1:2], num_samples=1)
    assert alone[0][0].token_ids == both[1][0].token_ids
    small = Sampling(temperature=0.9, max_new_tokens=6, batch_size=1)
    assert answers(sampler, sampling=small) == both
    other = answers(sampler, keys=["four", "five", "six"])
    assert other != both
    for index, responses in enumerate(both):
        assert [r.prompt_index for r in responses] == [index, index]
        assert [r.sample_index for r in responses] == [0, 1]
        assert responses[0].token_ids != responses[1].token_ids


def test_no_more_responses_are_decoded_together_than_asked(
    engines: list[Any], tmp_path: Path
) -> None:
    answers(generator(tmp_path))
    assert [call for call in engines[0].calls if "generate" in call] == ["generate 4", "generate 2"]


def test_a_response_is_finished_iff_it_ends_with_eos(engines: list[Any], tmp_path: Path) -> None:
    found = answers(generator(tmp_path, micro_ppo.finishing_policy()), num_samples=20)
    responses = [response for row in found for response in row]
    finished = [r for r in responses if r.finished]
    unfinished = [r for r in responses if not r.finished]
    assert finished
    assert unfinished
    assert all(r.token_ids[-1] == micro.EOS and micro.EOS not in r.token_ids[:-1] for r in finished)
    assert all(len(r.token_ids) == 6 and micro.EOS not in r.token_ids for r in unfinished)
    assert all("<eos>" not in r.text for r in responses)


def test_pad_is_never_sampled(engines: list[Any], tmp_path: Path) -> None:
    model = micro_ppo.finishing_policy(token=micro.PAD, eos=2.0)
    found = answers(generator(tmp_path, model))
    assert all(micro.PAD not in r.token_ids for row in found for r in row)


def test_prompts_without_room_are_refused(engines: list[Any], tmp_path: Path) -> None:
    long = [[{"role": "user", "content": "the cat " * 20}]]
    with pytest.raises(DataError, match=r"prompt 0 .* model.max_length=32"):
        answers(generator(tmp_path), prompts=long, keys=["long"])


def test_new_weights_are_loaded_once(engines: list[Any], tmp_path: Path) -> None:
    sampler, wanted = generator(tmp_path), answers(generator(tmp_path / "other", micro.policy(1)))
    calls = engines[0].calls
    calls.clear()
    old = sampler.generate(PROMPTS, num_samples=2, sampling=SAMPLING, keys=KEYS)
    assert old != wanted
    for _ in range(2):
        sampler.update_weights(micro.policy(1), micro.policy(1).state_dict)
    assert [call.split()[0] for call in calls if "reload" in call].count("reload_weights") == 2
    assert answers(sampler) == wanted
    assert len(list(tmp_path.glob(".weights-*"))) == 1


def test_the_prefix_cache_is_emptied_before_each_batch(engines: list[Any], tmp_path: Path) -> None:
    answers(generator(tmp_path))
    calls = engines[0].calls
    assert calls == ["reset_prefix_cache", "generate 4", "reset_prefix_cache", "generate 2"]


def test_two_versions_share_an_engine_and_keep_their_weights(
    engines: list[Any], tmp_path: Path
) -> None:
    one, two = generator(tmp_path), generator(tmp_path, micro.policy(1))
    first, second = answers(one), answers(two)
    assert first != second
    assert (answers(one), answers(two)) == (first, second)
    assert len(engines) == 1


def test_weights_go_away_with_their_generator(engines: list[Any], tmp_path: Path) -> None:
    sampler = generator(tmp_path)
    assert len(list(tmp_path.glob(".weights-*.tmp"))) == 1
    del sampler
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "row",
    [[], [5], [5, 6, 7, 8], [1, 5, 6], [5, 0, 1]],
    ids=["empty", "short", "long", "beyond EOS", "pad"],
)
def test_responses_that_no_sampler_writes_are_refused(row: list[int]) -> None:
    with pytest.raises(StageError, match="vLLM gave a response"):
        checked([row], BATCH)


def test_missing_responses_are_refused() -> None:
    assert checked([[5, 1]], BATCH) == [[5, 1]]
    with pytest.raises(StageError, match="2 responses to 1"):
        checked([[5, 1], [5, 1]], BATCH)


def test_folders_are_named_by_content(tmp_path: Path) -> None:
    def folder(seed: int, precision: Precision = Precision.fp32) -> Path:
        model = micro.policy(seed)
        return publish(model, model.state_dict, parent=tmp_path, precision=precision)

    one = folder(0)
    assert folder(0) == one
    assert folder(1) != one
    half = folder(0, Precision.bf16)
    assert half != one
    saved = load_file(half / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    exact = load_file(one / "model.safetensors")
    for name, value in micro.policy(0).state_dict().items():
        if name in exact:
            assert torch.equal(exact[name], value)
    assert sum(1 for _ in tmp_path.iterdir()) == 3
