"""The policy on a trunk, as a generator gets it: its adapter folded in, the trunk untouched."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import micro_models as micro
import pytest
import torch

from rlhf.config import Lora, Model, Precision
from rlhf.inference.vllm import publish
from rlhf.models.adapters import POLICY, REFERENCE, AdapterTrunk
from rlhf.models.loading import load_policy


@pytest.fixture
def trunk() -> AdapterTrunk:
    made = AdapterTrunk(micro.policy(0), lora=Lora(rank=4), policy=None, seed=0)
    made.copy(POLICY, REFERENCE)
    with torch.no_grad():
        for value in made.parameters(POLICY).values():
            value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return made


def test_merged_weights_are_those_of_the_merged_model(trunk: AdapterTrunk) -> None:
    before = micro.weights(trunk.model)
    merged = trunk.merged_weights(POLICY)
    assert micro.largest_difference(micro.weights(trunk.model), before) == 0.0
    base = micro.policy(0).state_dict()
    assert merged.keys() == base.keys()
    changed = [name for name in base if not torch.equal(merged[name], base[name])]
    assert len(changed) == 2 * 7
    plain = trunk.merge().state_dict()
    assert all(torch.equal(merged[name], plain[name]) for name in plain)


def test_a_published_adapter_is_a_plain_model(trunk: AdapterTrunk, tmp_path: Path) -> None:
    def folder(role: str) -> Path:
        weights = partial(trunk.merged_weights, role)
        return publish(trunk.model, weights, parent=tmp_path, precision=Precision.fp32)

    path = folder(POLICY)
    assert folder(REFERENCE) != path
    micro.tokenizer().save_pretrained(path)
    loaded = load_policy(path, model=Model(), seed=0).state_dict()
    expected = trunk.merged_weights(POLICY)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
