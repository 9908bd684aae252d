"""Fused norms against the modules of transformers."""

import copy
import logging
from typing import Any

import micro_models as micro
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig

from rlhf.config import Lora
from rlhf.models.fused import RmsNorm, fuse
from rlhf.models.loading import add_adapter, merge_adapter


def test_norm_by_hand() -> None:
    """x = (3, 4): mean of squares 12.5; with eps 3.5 the root is 4."""
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 0.5])
    assert RmsNorm.apply(x, weight, 3.5).tolist() == [[1.5, 0.5]]


def test_gradient_of_the_norm_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()
        for size in ((2, 3, 5), (5,))
    )
    assert torch.autograd.gradcheck(lambda x, w: RmsNorm.apply(x, w, 1e-2), (x, weight))


def losses_and_gradients(model: Any, *, checkpointing: bool) -> dict[str, torch.Tensor]:
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    tokens = torch.tensor([row[:6] for row in micro.token_lists(3, low=6)])
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **named}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", micro.ARCHITECTURES, ids=lambda c: c.model_type)
def test_model_learns_the_same(config: PreTrainedConfig, checkpointing: bool) -> None:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    fused = copy.deepcopy(plain)
    fuse(fused)
    kinds = {type(module).__name__ for module in fused.modules()}
    assert {kind[:5] for kind in kinds if kind.endswith("RMSNorm")} == {"Fused"}
    twin = copy.deepcopy(fused)
    expected = losses_and_gradients(plain, checkpointing=False)
    for model in (fused, twin):
        found = losses_and_gradients(model, checkpointing=checkpointing)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_frozen_norms_under_an_adapter() -> None:
    found = []
    for fuses in (False, True):
        model = micro.policy()
        if fuses:
            fuse(model)
        wrapped = add_adapter(model, Lora(enabled=True, rank=4), task_type="CAUSAL_LM", seed=0)
        found.append(losses_and_gradients(wrapped, checkpointing=False))
        assert all("norm" not in name for name in found[-1])
        merge_adapter(wrapped, None)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_autocast_equals_the_plain_module() -> None:
    """Half precision goes to the plain module: the same bits."""
    model = micro.policy()
    fused = copy.deepcopy(model)
    fuse(fused)
    half = torch.randn(3, 32).bfloat16()
    assert torch.equal(fused.model.norm(half), model.model.norm(half))
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(copy.deepcopy(fused).half()(tokens).logits, model.half()(tokens).logits)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (
            losses_and_gradients(one, checkpointing=False)["loss"] for one in (fused, model)
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0.0)


def test_weights_keep_their_names() -> None:
    model = micro.policy()
    names = list(model.state_dict())
    fuse(model)
    assert list(model.state_dict()) == names


def test_others_keep_their_modules(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 8}
    model = AutoModelForCausalLM.from_config(GPT2Config(**sizes))
    kinds = [type(module) for module in model.modules()]
    with caplog.at_level(logging.INFO, logger="rlhf.models.fused"):
        fuse(model)
    assert [type(module) for module in model.modules()] == kinds
    assert "GPT2LMHeadModel is of no family" in caplog.text
