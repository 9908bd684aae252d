"""Rows of different lengths in one pass: everything but attention sees one flat row of tokens.

Rows of about one length form a group, padded to its longest; attention works group by group, so
no row sees another. The padding that a rectangle of all rows would have is never computed.

Shapes: B rows, L longest row, T tokens of all groups, N chosen tokens, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.algo.masked import at_least_float32
from rlhf.data.collate import PASS_TOKENS, batches_by_length
from rlhf.models.padding import is_causal, padding_mask

ATTENTION = "rlhf_grouped"
"""The name that the attention of this module has among those of transformers."""

GROUP_TOKENS = 16
"""Padding that a group may have: an estimate, not a measurement, of what one more group costs."""


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    group_shapes: list[tuple[int, int]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each row of each group; takes [1, heads, T, D], returns [1, T, heads, D].

    `group_shapes` has rows and width of every group. Without it this is plain attention.
    """
    if group_shapes is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    sizes = [rows * width for rows, width in group_shapes]
    parts = [flat.transpose(1, 2).split(sizes, dim=1) for flat in (query, key, value)]
    answers = []
    for (rows, width), *group in zip(group_shapes, *parts, strict=True):
        heads = [part.reshape(rows, width, *part.shape[2:]).transpose(1, 2) for part in group]
        answer, _ = sdpa_attention_forward(module, *heads, None, **kwargs)
        answers.append(answer.reshape(1, rows * width, *answer.shape[2:]))
    return torch.cat(answers, dim=1), None


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def let_pack(model: Any) -> None:
    """Let a model whose attention is plain and causal take packed rows."""
    config = model.config
    is_plain = config._attn_implementation == "sdpa"
    if is_plain and is_causal(model) and getattr(config, "sliding_window", None) is None:
        config._attn_implementation = ATTENTION


def can_pack(model: Any) -> bool:
    """Tell whether a model takes packed rows; on GPUs, where nobody has tried them, none does."""
    takes_them: bool = model.config._attn_implementation == ATTENTION
    return takes_them and model.device.type == "cpu"


def pass_padding(model: Any) -> float:
    """Return the padding tokens for which one more pass is worth its start."""
    return math.inf if can_pack(model) else PASS_TOKENS[model.device.type]


@dataclass(frozen=True)
class Rows:
    """Right-padded rows as a model takes them: in groups, or as the rectangle that they are."""

    inputs: Mapping[str, Any]
    """What the model is called with."""
    places_BL: Tensor
    """Where each token of the rectangle is among those that the model sees."""

    def like_tokens(self, values_BL: Tensor, mask_BL: Tensor, *, fill: int) -> Tensor:
        """Return values of real tokens where the model has these tokens, `fill` elsewhere."""
        found = values_BL.new_full(self.inputs["input_ids"].shape, fill)
        found.view(-1)[self.places_BL[mask_BL]] = values_BL[mask_BL]
        return found

    def pick(self, states: Tensor, places_N: Tensor) -> Tensor:
        """Return the model's states [N, H] at N of the places."""
        return states.flatten(0, 1).index_select(0, places_N)


def arrange(model: Any, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Rows:
    """Pack rows where the model can take them so; every row needs a token."""
    size, width = input_ids_BL.shape
    if not can_pack(model):
        mask = padding_mask(model, attention_mask_BL)
        places_BL = torch.arange(size * width, device=input_ids_BL.device).view(size, width)
        return Rows({"input_ids": input_ids_BL, "attention_mask": mask}, places_BL)
    lengths = attention_mask_BL.sum(1).tolist()
    groups = [
        (batch, max(lengths[row] for row in batch))
        for batch in batches_by_length(lengths, max_padding=GROUP_TOKENS)
    ]
    places_BL, start = torch.zeros_like(input_ids_BL), 0
    for rows, longest in groups:
        end = start + len(rows) * longest
        places_BL[rows, :longest] = torch.arange(start, end).view(len(rows), longest)
        start = end
    input_ids = [input_ids_BL[rows, :longest].flatten() for rows, longest in groups]
    position_ids = [torch.arange(longest).repeat(len(rows)) for rows, longest in groups]
    inputs = {
        "input_ids": torch.cat(input_ids).unsqueeze(0),
        "position_ids": torch.cat(position_ids).unsqueeze(0),
        # A mask of four dimensions is taken as it is; none would be made of the positions.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "group_shapes": [(len(rows), longest) for rows, longest in groups],
    }
    return Rows(inputs, places_BL)


def scores_of(
    model: Any, input_ids_BL: Tensor, attention_mask_BL: Tensor, *, wrapped: Any = None
) -> Tensor:
    """Return what a scorer says of right-padded rows [B], read off their last tokens.

    The scorer's own choice of a token knows no groups. `wrapped` is called in its place, where
    several processes train it.
    """
    rows = arrange(model, input_ids_BL, attention_mask_BL)
    of_tokens: list[Tensor] = []
    handle = model.score.register_forward_hook(lambda *call: of_tokens.append(call[-1]))
    try:
        (wrapped or model)(**rows.inputs, use_cache=False)
    finally:
        handle.remove()
    last_B1 = attention_mask_BL.sum(1, keepdim=True) - 1
    places_B = rows.places_BL.gather(1, last_B1).squeeze(1)
    return at_least_float32(rows.pick(of_tokens[0], places_B).squeeze(-1))
