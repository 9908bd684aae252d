"""Packed rows: what each row gives alone, in training and in scoring, and who keeps rectangles."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import micro_models as micro
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from rlhf.data.collate import pad_right
from rlhf.models.packing import ATTENTION, arrange, can_pack, let_pack, pass_padding, scores_of

LENGTHS = (3, 40, 1, 3, 22, 39, 5)


def rows(seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 600, (n,), generator=draw).tolist() for n in LENGTHS]


def rectangle(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return pad_right(lists, micro.PAD), pad_right([[1] * len(ids) for ids in lists], 0)


def grouped_heads() -> Any:
    """A model whose heads of queries share those of keys."""
    sizes = LlamaConfig(
        vocab_size=micro.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForCausalLM(sizes).double()
    let_pack(model)
    return model


def states(model: Any, lists: list[list[int]]) -> list[torch.Tensor]:
    """Return the last states of each row, of all rows in one pass."""
    ids, mask = rectangle(lists)
    found = arrange(model, ids, mask)
    hidden = model.base_model(**found.inputs, use_cache=False).last_hidden_state
    return [found.pick(hidden, found.places_BL[row, : len(one)]) for row, one in enumerate(lists)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_each_row_alone(checkpointing: bool) -> None:
    model = grouped_heads()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    alone = copy.deepcopy(model)
    alone.config._attn_implementation = "sdpa"
    found = states(model, rows())
    ids, mask = rectangle(rows())
    assert arrange(model, ids, mask).inputs["input_ids"].shape[1] < 0.5 * ids.numel()
    for one, given in zip(rows(), found, strict=True):
        expected = alone.base_model(input_ids=torch.tensor([one])).last_hidden_state[0]
        torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-12)
        expected.square().sum().backward()
    sum(part.square().sum() for part in found).backward()
    for (name, packed), plain in zip(model.named_parameters(), alone.parameters(), strict=True):
        if plain.grad is not None:
            torch.testing.assert_close(packed.grad, plain.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_no_row_sees_another() -> None:
    model, lists = micro.policy(), rows()
    before = states(model, lists)
    lists[1] = rows(seed=1)[1]
    after = states(model, lists)
    changed = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    assert changed == [index == 1 for index in range(len(lists))]


def test_values_of_tokens_are_where_the_tokens_are() -> None:
    ids, mask = rectangle(rows())
    for model in (micro.policy(), plain_policy()):
        found = arrange(model, ids, mask)
        placed = found.like_tokens(ids * 2, mask.bool(), fill=-1)
        seen = found.inputs["input_ids"]
        assert placed.shape == seen.shape
        assert torch.equal(placed[placed >= 0], 2 * seen[placed >= 0])
        assert int((placed >= 0).sum()) == sum(LENGTHS)


def plain_policy() -> Any:
    model = micro.policy()
    model.config._attn_implementation = "sdpa"
    return model


def test_scores_are_those_of_the_library() -> None:
    model = micro.scorer()
    model.config.pad_token_id = micro.PAD
    ids, mask = rectangle(rows())
    packed = scores_of(model, ids, mask)
    model.config._attn_implementation = "sdpa"
    rectangular = scores_of(model, ids, mask)
    library = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    torch.testing.assert_close(rectangular, library, rtol=0, atol=0)
    torch.testing.assert_close(packed, library, rtol=1e-5, atol=1e-6)
    assert not model.score._forward_hooks


def test_other_passes_are_as_before() -> None:
    """Masks are still made: of rows padded on the left, and of rows with a cache."""
    model, plain = micro.policy(), plain_policy()
    ids = torch.tensor([[0, 0, 7, 8], [5, 6, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits[:, 2:],
        plain(input_ids=ids, attention_mask=mask).logits[:, 2:],
        rtol=0,
        atol=0,
    )
    given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **given), plain.generate(ids, **given))


def test_the_saved_configuration_names_no_attention(tmp_path: Path) -> None:
    model = micro.policy()
    model.save_pretrained(tmp_path)
    assert ATTENTION not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_windows_other_kernels_and_gpus_keep_rectangles(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    windowed = MistralForCausalLM(MistralConfig(**sizes, sliding_window=4))
    eager = LlamaForCausalLM(LlamaConfig(**sizes))
    eager.set_attn_implementation("eager")
    for model in (windowed, eager):
        let_pack(model)
        assert not can_pack(model)
    assert can_pack(micro.policy())
    assert pass_padding(micro.policy()) == float("inf")
    monkeypatch.setattr(LlamaForCausalLM, "device", torch.device("cuda"))
    assert not can_pack(micro.policy())
    assert pass_padding(micro.policy()) == 8192
