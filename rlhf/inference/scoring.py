"""Scores of responses under a reward model. Shapes: N responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.data.chat import encode_pair_sides
from rlhf.data.collate import batches_by_length, pad_right
from rlhf.data.records import Message
from rlhf.errors import DataError
from rlhf.models.packing import pass_padding, scores_of


class Scorer(Protocol):
    """Anything that scores responses; tests pass plain functions."""

    def __call__(self, prompts: Sequence[list[Message]], responses: Sequence[str]) -> Tensor:
        """Return raw scores (before any sigmoid), float32 on the CPU, shape [N], input order."""
        ...


class HfScorer:
    """A reward model of transformers as a Scorer.

    Rows are sorted by length and right-padded; `tokens_per_batch` bounds rows x longest row. The
    grouping depends on the lengths alone, so the same rows give the same bits. Autocast, where it
    is wanted, is the caller's context.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_length: int, tokens_per_batch: int = 16384
    ):
        self._model = model
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._tokens_per_batch = tokens_per_batch

    def __call__(self, prompts: Sequence[list[Message]], responses: Sequence[str]) -> Tensor:
        """Score each response to its prompt; raises DataError for an over-long one."""
        return self.score_ids(encode_pair_sides(self._tokenizer, prompts, responses))

    @torch.no_grad()
    def score_ids(self, rows: Sequence[list[int]]) -> Tensor:
        """Score encoded rows (prompt, response, EOS); shape [N], float32, input order.

        Raises DataError for a row that is empty or longer than the model's maximum.
        """
        lengths = [len(row) for row in rows]
        for index, length in enumerate(lengths):
            if not 0 < length <= self._max_length:
                raise DataError(
                    f"row {index} has {length} tokens, but scoring takes 1 to "
                    f"{self._max_length}: leave it out or raise model.max_length"
                )
        scores_N = torch.empty(len(rows), dtype=torch.float32)
        self._model.eval()
        for batch in batches_by_length(
            lengths, max_tokens=self._tokens_per_batch, max_padding=pass_padding(self._model)
        ):
            scores_N[batch] = self._forward([rows[index] for index in batch])
        return scores_N

    def _forward(self, rows: list[list[int]]) -> Tensor:
        device = self._model.device
        input_ids_BL = pad_right(rows, self._tokenizer.pad_token_id).to(device)
        attention_mask_BL = pad_right([[1] * len(row) for row in rows], 0).to(device)
        scores_B = scores_of(self._model, input_ids_BL, attention_mask_BL)
        return scores_B.float().cpu()
