"""Right-padded rows without a mask: the real tokens see what they saw, whichever kernel is used."""

import micro_models as micro
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from rlhf.data.collate import pad_right
from rlhf.models.padding import CAUSAL, padding_mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config",
    micro.ARCHITECTURES,
    ids=lambda c: f"{c.model_type}-{getattr(c, 'sliding_window', None)}",
)
def test_padding_without_a_mask_changes_nothing(config: PreTrainedConfig, attention: str) -> None:
    rows = micro.token_lists(4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    mask_BT = pad_right([[1] * len(row) for row in rows], 0)
    assert padding_mask(model, mask_BT) is None
    input_ids_BT = pad_right(rows, micro.PAD)
    with torch.no_grad():
        masked = model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False).logits
        free = model(input_ids=input_ids_BT, attention_mask=None, use_cache=False).logits
        for index, row in enumerate(rows):
            alone = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
            torch.testing.assert_close(free[index, : len(row)], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(masked[index, : len(row)], alone, rtol=1e-5, atol=1e-5)


def test_every_causal_architecture_is_tried() -> None:
    assert {config.model_type for config in micro.ARCHITECTURES} == CAUSAL


def test_others_keep_their_mask() -> None:
    """A bidirectional Llama, an architecture nobody looked at, and a module without a config."""
    mask_BT = torch.ones(2, 3)
    bidirectional = LlamaConfig(**micro.SIZES)
    bidirectional.is_causal = False
    for config in (bidirectional, PreTrainedConfig(), None):
        model = torch.nn.Linear(1, 1)
        if config is not None:
            model.config = config
        assert padding_mask(model, mask_BT) is mask_BT
