"""Responses from vLLM, whose weights are replaced through folders of safetensors.

Token ids go in and come out; text is made here, as for transformers. A response's random numbers
are seeded by its key alone, but vLLM draws them itself: the same keys give the same response, up to
float rounding that batch shapes bring, and another response than transformers would give.
"""

from __future__ import annotations

import hashlib
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import torch
from torch import Tensor

from rlhf.config import Precision, Sampling
from rlhf.data.records import Message
from rlhf.errors import StageError
from rlhf.inference.generation import Response, Weights, checked_prompt_ids, make_response
from rlhf.inference.sampler import row_keys

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
"""Number format in which vLLM holds the weights."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts that get one response each; plain JSON."""

    prompts: list[list[int]]
    seeds: list[int]
    temperature: float
    top_k: int | None
    top_p: float
    max_new_tokens: int
    eos_id: int
    pad_id: int


class Backend(Protocol):
    """A vLLM engine, wherever it runs; folders of weights are never changed once they exist."""

    def load(self, weights: Path) -> None:
        """Answer with the weights of this folder from now on."""

    def sample(self, weights: Path, batch: Batch) -> list[list[int]]:
        """Return a response for each prompt of the batch, sampled with exactly these weights."""


class VllmGenerator:
    """Decodes with vLLM; pad is never sampled.

    The folder of weights is this generator's own and goes away with it.
    """

    def __init__(
        self,
        backend: Backend,
        folder: Path,
        tokenizer: Any,
        *,
        max_length: int,
        precision: Precision,
    ) -> None:
        self._backend, self._tokenizer = backend, tokenizer
        self._max_length, self._precision = max_length, precision
        self._take(folder)

    def update_weights(self, model: Any, weights: Weights) -> None:
        """Save the weights and let vLLM load them; nothing happens if they are the same."""
        folder = publish(model, weights, parent=self._folder.parent, precision=self._precision)
        if folder == self._folder:
            return
        self._backend.load(folder)
        self._remove()
        self._take(folder)

    def _take(self, folder: Path) -> None:
        self._folder = folder
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

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
        everything = Batch(
            prompts=[ids for ids in encoded for _ in range(num_samples)],
            # 63 bits, which every integer type on the way can hold.
            seeds=[int(key) >> 1 for key in row_keys(keys, num_samples).reshape(-1)],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            eos_id=self._tokenizer.eos_token_id,
            pad_id=self._tokenizer.pad_token_id,
        )
        written = [
            row
            for batch in _batches(everything, sampling.batch_size)
            for row in checked(self._backend.sample(self._folder, batch), batch)
        ]
        return [
            [
                make_response(
                    self._tokenizer,
                    written[prompt * num_samples + sample],
                    prompt_index=prompt,
                    sample_index=sample,
                )
                for sample in range(num_samples)
            ]
            for prompt in range(len(prompts))
        ]


def checked(rows: list[list[int]], batch: Batch) -> list[list[int]]:
    """Return the rows if each is what a sampler may write; StageError otherwise.

    An aborted request, or a server of another version, must not become training data.
    """
    if len(rows) != len(batch.prompts):
        raise StageError(f"vLLM gave {len(rows)} responses to {len(batch.prompts)} prompts")
    for row in rows:
        is_complete = 0 < len(row) <= batch.max_new_tokens and (
            row[-1] == batch.eos_id or len(row) == batch.max_new_tokens
        )
        if not is_complete or batch.eos_id in row[:-1] or batch.pad_id in row:
            raise StageError(
                f"vLLM gave a response of {len(row)} tokens that neither ends by itself nor fills "
                f"max_new_tokens={batch.max_new_tokens}, or that holds pad: see vLLM's own log"
            )
    return rows


def publish(model: Any, weights: Weights, *, parent: Path, precision: Precision) -> Path:
    """Write weights and configuration to a folder named by their content; returns the folder.

    So processes that hold the same weights share one folder. The name is that of a temporary file:
    what a killed process leaves is deleted when its node starts again.
    """
    dtype = DTYPES[precision]
    tensors = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
        for name, value in weights().items()
    }
    target = parent / f".weights-{_digest(tensors)}.tmp"
    if target.exists():
        return target
    temporary = parent / f".weights-{uuid4().hex}.tmp"
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary, state_dict=tensors)
    try:
        temporary.rename(target)
    except OSError:
        # Another process was first with the same weights.
        shutil.rmtree(temporary)
        if not target.exists():
            raise
    return target


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _batches(everything: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(everything.prompts), size):
        rows = slice(start, start + size)
        yield replace(everything, prompts=everything.prompts[rows], seeds=everything.seeds[rows])
