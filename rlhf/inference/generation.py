"""Sampling responses from a causal language model, with randomness keyed by prompt and sample.

A sample depends on its key alone: not on the batch, its neighbours or what was sampled before, up
to the float rounding that batch shapes bring. Shapes: B rows, P prompt tokens, T response tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf.config import Sampling
from rlhf.data import chat
from rlhf.data.collate import pad_left
from rlhf.data.records import Message, Prompt
from rlhf.errors import DataError
from rlhf.inference.sampler import row_keys, sample_tokens, uniforms

KEEP_SHARE = 0.75
"""Finished rows leave the batch once at most this share of it is still being written."""


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response; `token_ids` end with EOS iff `finished`, `text` never holds it."""

    prompt_index: int
    sample_index: int
    token_ids: list[int]
    text: str
    finished: bool


class Generator(Protocol):
    """Anything that answers prompts."""

    def generate(
        self,
        prompts: Sequence[list[Message]],
        *,
        num_samples: int,
        sampling: Sampling,
        keys: Sequence[str],
    ) -> list[list[Response]]:
        """Return `num_samples` responses per prompt; `keys[i]` seeds those of prompt i."""
        ...


Weights = Callable[[], Mapping[str, Tensor]]
"""Gives a model's weights by the names that its folder has."""


class PolicyGenerator(Generator, Protocol):
    """A generator that can be given other weights of the same model."""

    def update_weights(self, model: Any, weights: Weights) -> None:
        """Answer with these weights from now on; `model` says how they are saved."""
        ...


class Decoding(Protocol):
    """The state between two tokens of b rows: what was read and written, and the next logits."""

    device: torch.device
    logits: Tensor
    """[b, V]."""

    def select(self, kept: Tensor) -> None:
        """Go on with some rows only."""

    def advance(self, tokens_b: Tensor) -> None:
        """Write one token per row and compute the next logits."""


def fitting(
    prompts: Sequence[Prompt], tokenizer: Any, *, max_new_tokens: int, max_length: int
) -> tuple[list[Prompt], int]:
    """Return the prompts that leave room for a response and an EOS, and how many do not."""
    encoded = chat.encode_prompts(tokenizer, [prompt.prompt for prompt in prompts])
    kept = [
        prompt
        for prompt, ids in zip(prompts, encoded, strict=True)
        if len(ids) + max_new_tokens < max_length
    ]
    return kept, len(prompts) - len(kept)


def scoring_length(max_length: int, sampling: Sampling) -> int:
    """Return the longest prompt + response that a reward model may be shown.

    A sampled token that is no valid text by itself (a lone byte) reads as a replacement character,
    which encodes to up to three tokens.
    """
    return max_length + 2 * sampling.max_new_tokens


def checked_prompt_ids(
    tokenizer: Any, prompts: Sequence[list[Message]], *, max_new_tokens: int, max_length: int
) -> list[list[int]]:
    """Return the tokens of each prompt; DataError for one that leaves no room for a response."""
    encoded = chat.encode_prompts(tokenizer, prompts)
    for index, ids in enumerate(encoded):
        if len(ids) + max_new_tokens > max_length:
            raise DataError(
                f"prompt {index} has {len(ids)} tokens, which with max_new_tokens="
                f"{max_new_tokens} is more than model.max_length={max_length}: "
                "raise model.max_length or leave the prompt out"
            )
    return encoded


def make_response(
    tokenizer: Any, token_ids: list[int], *, prompt_index: int, sample_index: int
) -> Response:
    """Return a response with its text; it is finished iff its last token is EOS."""
    finished = token_ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(token_ids[:-1] if finished else token_ids, skip_special_tokens=True)
    return Response(prompt_index, sample_index, token_ids, text, finished)


class HfGenerator:
    """Decodes with a Hugging Face causal language model; pad is never sampled."""

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_length = max_length

    def generate(
        self,
        prompts: Sequence[list[Message]],
        *,
        num_samples: int,
        sampling: Sampling,
        keys: Sequence[str],
    ) -> list[list[Response]]:
        """Return `num_samples` responses per prompt; raises DataError for an over-long prompt."""
        assert len(keys) == len(prompts), f"{len(prompts)} prompts need as many keys"
        encoded = checked_prompt_ids(
            self._tokenizer,
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            max_length=self._max_length,
        )
        seeds = row_keys(keys, num_samples)
        found: list[list[Response]] = [[] for _ in prompts]
        for indices, samples in _batches(encoded, num_samples, sampling.batch_size):
            numbers = uniforms(seeds[indices, samples].reshape(-1), sampling.max_new_tokens)
            written = self._decode([encoded[i] for i in indices], numbers, sampling)
            for row, token_ids in enumerate(written):
                index = indices[row * len(indices) // len(written)]
                found[index].append(
                    make_response(
                        self._tokenizer,
                        token_ids,
                        prompt_index=index,
                        sample_index=len(found[index]),
                    )
                )
        return found

    def update_weights(self, model: Any, weights: Weights) -> None:
        """Decode with the model itself, whose weights may change at any time."""
        self._model = model

    @torch.no_grad()
    def _decode(
        self, prompt_ids: list[list[int]], uniforms_BT: NDArray[np.float64], sampling: Sampling
    ) -> list[list[int]]:
        """Return the response tokens of each row; rows are the prompts, each repeated."""
        num_rows, num_tokens = uniforms_BT.shape
        eos, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        state = self._read(prompt_ids, num_rows // len(prompt_ids), num_tokens)
        numbers_BT = torch.from_numpy(uniforms_BT).to(state.device)
        written_BT = torch.full((num_rows, num_tokens), pad, device=state.device)
        rows_b = torch.arange(num_rows, device=state.device)
        alive_b = torch.ones_like(rows_b, dtype=torch.bool)
        for t in range(num_tokens):
            state.logits[:, pad] = -torch.inf
            tokens_b = sample_tokens(state.logits, numbers_BT[rows_b, t], sampling=sampling)
            written_BT[rows_b, t] = tokens_b
            alive_b &= tokens_b != eos
            num_alive = int(alive_b.sum())
            if num_alive == 0 or t == num_tokens - 1:
                break
            if num_alive <= KEEP_SHARE * len(rows_b):
                kept = alive_b.nonzero().squeeze(1)
                rows_b, tokens_b, alive_b = rows_b[kept], tokens_b[kept], alive_b[kept]
                state.select(kept)
            state.advance(tokens_b)
        return [_until(row, eos, pad) for row in written_BT.tolist()]

    def _read(self, prompt_ids: list[list[int]], repeats: int, num_tokens: int) -> Decoding:
        """Read the prompts; their rows follow one another, `repeats` of each."""
        pad = self._tokenizer.pad_token_id
        return _HfDecoding(self._model, prompt_ids, repeats, num_tokens, pad)


class _HfDecoding:
    """Decoding by the model's own forward pass: a cache, left-padded prompts, a mask."""

    def __init__(
        self, model: Any, prompt_ids: list[list[int]], repeats: int, num_tokens: int, pad: int
    ) -> None:
        self._model = model
        self.device = model.device
        ids_BP = pad_left(prompt_ids, pad).to(self.device)
        lengths = torch.tensor([len(ids) for ids in prompt_ids], device=self.device)
        columns_P = torch.arange(ids_BP.shape[1], device=self.device)
        mask_BP = (columns_P >= ids_BP.shape[1] - lengths.unsqueeze(1)).long()
        self._cache = _cache(model, ids_BP.shape[1] + num_tokens)
        self.logits = self._forward(ids_BP, mask_BP, (mask_BP.cumsum(1) - 1).clamp(min=0))
        if repeats > 1:
            self._cache.batch_repeat_interleave(repeats)
            self.logits = self.logits.repeat_interleave(repeats, 0)
        self._mask = mask_BP.repeat_interleave(repeats, 0)
        self._positions = lengths.repeat_interleave(repeats)

    def select(self, kept: Tensor) -> None:
        self._cache.batch_select_indices(kept)
        self._mask, self._positions = self._mask[kept], self._positions[kept]

    def advance(self, tokens_b: Tensor) -> None:
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], 1)
        self.logits = self._forward(tokens_b.unsqueeze(1), self._mask, self._positions.unsqueeze(1))
        self._positions = self._positions + 1

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits


class _RoomyLayer(DynamicLayer):
    """A cache layer that writes into room allocated once instead of concatenating every token."""

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._room: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._room is None or self._room[0].shape[0] != key_states.shape[0]:
            self._room = (
                self._grown(key_states, self.keys),
                self._grown(value_states, self.values),
            )
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values

    def _grown(self, new: Tensor, old: Tensor) -> Tensor:
        batch, heads, _, size = new.shape
        room = new.new_empty(batch, heads, self._capacity, size)
        if old.numel() > 0:
            room[:, :, : old.shape[-2]] = old
        return room


def _cache(model: Any, capacity: int) -> Any:
    cache = DynamicCache(config=model.config)
    # Sliding-window and other special layers keep their own way of growing.
    cache.layers = [
        _RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def _batches(
    encoded: Sequence[list[int]], num_samples: int, batch_size: int
) -> Iterator[tuple[list[int], slice]]:
    """Yield prompt indices and a range of their samples, prompts of similar length together."""
    order = sorted(range(len(encoded)), key=lambda index: (len(encoded[index]), index))
    num_prompts = max(1, batch_size // num_samples)
    for start in range(0, len(order), num_prompts):
        for sample in range(0, num_samples, batch_size):
            yield order[start : start + num_prompts], slice(sample, sample + batch_size)


def _until(token_ids: list[int], eos: int, pad: int) -> list[int]:
    """Cut a row after its first EOS; a row that was dropped earlier is padded behind it."""
    if eos in token_ids:
        return token_ids[: token_ids.index(eos) + 1]
    assert pad not in token_ids, "a row without EOS must fill its budget"
    return token_ids
