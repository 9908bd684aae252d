"""Keys and values of decoding, and attention to them.

Two ways to hold them: prompts that several rows share are kept and read once for all of them;
prompts with one row each lie in front of that row's response. Keys lie transposed, [*, D, tokens]:
many products with a single query each take half the time so. Shapes: n prompts, P longest
prompt, b rows, T response tokens, H query heads in Hkv groups of G, D width of a head. Queries come
scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

KEEP_SHARE = 0.75
"""Prompts without rows leave the shared keys once at most this share of them has rows."""


class Cache(Protocol):
    """Keys and values of all layers; layers are added in order by `read`."""

    def read(self, k_nKPD: Tensor, v_nKPD: Tensor) -> None:
        """Take a layer's keys and values of the prompts, right-padded, [n, Hkv, P, D]."""

    def attend(self, layer: int, q_bHD: Tensor, k_bKD: Tensor, v_bKD: Tensor) -> Tensor:
        """Take a layer's newest key and value of each row; returns what its query finds there."""

    def advance(self) -> None:
        """Go on to the next token, after all layers have attended."""

    def select(self, kept: Tensor) -> None:
        """Go on with some rows only."""


def open_cache(
    lengths: Sequence[int], *, repeats: int, num_tokens: int, device: torch.device
) -> Cache:
    """Return a cache for prompts of these lengths, each with `repeats` rows of `num_tokens`."""
    lengths_n = torch.tensor(lengths, device=device)
    if repeats > 1:
        return SharedPrompts(lengths_n, repeats=repeats, num_tokens=num_tokens)
    return OwnPrompts(lengths_n, num_tokens=num_tokens)


class OwnPrompts:
    """One row per prompt, whose keys lie in front of the response's."""

    def __init__(self, lengths_n: Tensor, *, num_tokens: int) -> None:
        self._position_b = lengths_n
        self._room = int(lengths_n.max()) + num_tokens
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._place_rows()

    def read(self, k_nKPD: Tensor, v_nKPD: Tensor) -> None:
        """Take a layer's keys and values of the prompts."""
        rows, groups, length, size = k_nKPD.shape
        # Zeros: what is hidden is multiplied by a share of 0, which NaN would survive.
        keys = k_nKPD.new_zeros(rows, groups, size, self._room)
        values = v_nKPD.new_zeros(rows, groups, self._room, size)
        keys[..., :length] = k_nKPD.transpose(-1, -2)
        values[:, :, :length] = v_nKPD
        self._layers.append((keys, values))

    def attend(self, layer: int, q_bHD: Tensor, k_bKD: Tensor, v_bKD: Tensor) -> Tensor:
        """Attend to prompt and response in one go.

        Two products and a softmax: for a single query they take half the time of torch's fused
        attention on processors, and a quarter with grouped heads.
        """
        keys, values = self._layers[layer]
        keys[self._rows_b, :, :, self._position_b] = k_bKD
        values[self._rows_b, :, self._position_b] = v_bKD
        end = self._hidden_bE.shape[-1]
        q_bKGD = q_bHD.reshape(len(q_bHD), keys.shape[1], -1, q_bHD.shape[-1])
        scores = q_bKGD @ keys[..., :end]
        scores.masked_fill_(self._hidden_bE, -torch.inf)
        shares = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        return (shares @ values[:, :, :end]).flatten(1)

    def advance(self) -> None:
        """Go on to the next token."""
        self._position_b = self._position_b + 1
        self._place_rows()

    def select(self, kept: Tensor) -> None:
        """Go on with some rows only."""
        self._position_b = self._position_b[kept]
        self._layers = [(keys[kept], values[kept]) for keys, values in self._layers]
        self._place_rows()

    def _place_rows(self) -> None:
        device = self._position_b.device
        self._rows_b = torch.arange(len(self._position_b), device=device)
        columns = torch.arange(int(self._position_b.max()) + 1, device=device)
        self._hidden_bE = (columns > self._position_b.unsqueeze(1))[:, None, None]


class SharedPrompts:
    """Several rows per prompt: all of them attend to its keys in one product."""

    def __init__(self, lengths_n: Tensor, *, repeats: int, num_tokens: int) -> None:
        self._lengths_n = lengths_n
        prompts = torch.arange(len(lengths_n), device=lengths_n.device)
        self._prompt_b = prompts.repeat_interleave(repeats)
        self._num_tokens, self._written = num_tokens, 0
        self._prompts: list[tuple[Tensor, Tensor]] = []
        self._responses: list[tuple[Tensor, Tensor]] = []
        self._group_rows()

    def read(self, k_nKPD: Tensor, v_nKPD: Tensor) -> None:
        """Take a layer's keys and values of the prompts, and make room for the responses."""
        self._prompts.append((k_nKPD.transpose(-1, -2).contiguous(), v_nKPD))
        rows, (_, groups, _, size) = len(self._prompt_b), k_nKPD.shape
        keys = k_nKPD.new_empty(rows, groups, size, self._num_tokens)
        self._responses.append((keys, v_nKPD.new_empty(rows, groups, self._num_tokens, size)))

    def attend(self, layer: int, q_bHD: Tensor, k_bKD: Tensor, v_bKD: Tensor) -> Tensor:
        """Attend to the prompt, which the rows of a prompt do together, and to the response."""
        (prompt_keys, prompt_values), (keys, values) = self._prompts[layer], self._responses[layer]
        keys[..., self._written] = k_bKD
        values[:, :, self._written] = v_bKD
        end = self._written + 1
        q_bKGD = q_bHD.reshape(len(q_bHD), keys.shape[1], -1, q_bHD.shape[-1])
        to_prompt = self._by_row(self._by_prompt(q_bKGD) @ prompt_keys)
        to_prompt.masked_fill_(self._hidden_bP, -torch.inf)
        to_response = q_bKGD @ keys[..., :end]
        scores = torch.cat([to_prompt, to_response], -1).softmax(-1, dtype=torch.float32)
        shares = scores.to(q_bHD.dtype).split((prompt_keys.shape[-1], end), -1)
        from_prompt = self._by_row(self._by_prompt(shares[0]) @ prompt_values)
        return (from_prompt + shares[1] @ values[:, :, :end]).flatten(1)

    def advance(self) -> None:
        """Go on to the next token."""
        self._written += 1

    def select(self, kept: Tensor) -> None:
        """Go on with some rows only."""
        self._responses = [
            (self._shrunk(keys, kept, dim=3), self._shrunk(values, kept, dim=2))
            for keys, values in self._responses
        ]
        left, self._prompt_b = self._prompt_b[kept].unique(return_inverse=True)
        if len(left) <= KEEP_SHARE * len(self._lengths_n):
            self._lengths_n = self._lengths_n[left]
            end = int(self._lengths_n.max())
            self._prompts = [(k[left, ..., :end], v[left, :, :end]) for k, v in self._prompts]
        else:
            self._prompt_b = left[self._prompt_b]
        self._group_rows()

    def _group_rows(self) -> None:
        """Give every row a place among its prompt's rows: prompts times `slots` places."""
        num_prompts, device = len(self._lengths_n), self._lengths_n.device
        counts = torch.bincount(self._prompt_b, minlength=num_prompts)
        self._slots = int(counts.max())
        self._is_full = len(self._prompt_b) == num_prompts * self._slots
        starts = counts.cumsum(0) - counts
        rows = torch.arange(len(self._prompt_b), device=device)
        self._place_b = self._prompt_b * self._slots + rows - starts[self._prompt_b]
        columns = torch.arange(int(self._lengths_n.max()), device=device)
        hidden_nP = columns >= self._lengths_n.unsqueeze(1)
        self._hidden_bP = hidden_nP[self._prompt_b][:, None, None]

    def _by_prompt(self, rows: Tensor) -> Tensor:
        """Put the rows of a prompt side by side: [b, Hkv, G, *] to [n, Hkv, slots * G, *]."""
        _, groups, per_group, width = rows.shape
        places = rows
        if not self._is_full:
            places = rows.new_zeros(len(self._lengths_n) * self._slots, *rows.shape[1:])
            places[self._place_b] = rows
        folded = places.view(-1, self._slots, groups, per_group, width).transpose(1, 2)
        return folded.reshape(-1, groups, self._slots * per_group, width)

    def _by_row(self, folded: Tensor) -> Tensor:
        """Undo `_by_prompt`."""
        _, groups, per_prompt, width = folded.shape
        per_group = per_prompt // self._slots
        unfolded = folded.view(-1, groups, self._slots, per_group, width).transpose(1, 2)
        places = unfolded.reshape(-1, groups, per_group, width)
        return places if self._is_full else places[self._place_b]

    def _shrunk(self, room: Tensor, kept: Tensor, *, dim: int) -> Tensor:
        """Return room for the rows that stay, with what they wrote along a dimension."""
        smaller = room.new_empty(len(kept), *room.shape[1:])
        smaller.narrow(dim, 0, self._written).copy_(room.narrow(dim, 0, self._written)[kept])
        return smaller
