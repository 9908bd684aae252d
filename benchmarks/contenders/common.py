"""What several contenders need: the job's rows, clocks and the losses that are compared.

Needs torch and transformers only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
MEASURE_ROWS = 4
"""Rows per forward pass when a loss is measured."""


def read_work(job: Mapping[str, Any]) -> dict[str, Any]:
    """Read prompts, chats and pairs."""
    work: dict[str, Any] = json.loads(Path(job["work"]).read_text(encoding="utf-8"))
    return work


class Clock:
    """Seconds between entering and leaving."""

    seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure this block."""
        started = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - started


def pad(rows: list[list[int]], value: int, *, left: bool = False) -> Tensor:
    """Stack rows of different lengths."""
    width = max(len(row) for row in rows)
    filled = [[value] * (width - len(row)) for row in rows]
    return torch.tensor(
        [gap + row if left else row + gap for row, gap in zip(rows, filled, strict=True)]
    )


def copy_weights(model: Any) -> dict[str, Tensor]:
    """Return a copy of a model's weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def chat_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """Return the mean negative log-probability of all labels, in fp32 by the plain forward pass."""
    total, number = 0.0, 0
    for start in range(0, len(rows), MEASURE_ROWS):
        part = rows[start : start + MEASURE_ROWS]
        ids, labels = pad([r["input_ids"] for r in part], 0), pad([r["labels"] for r in part], -100)
        logits = model(input_ids=ids, attention_mask=_mask(part, "input_ids")).logits.float()
        targets = labels[:, 1:].flatten()
        total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum"))
        number += int((targets != IGNORED).sum())
    return total / number


@torch.no_grad()
def pair_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """Return the mean ranking loss with margins, in fp32 by the plain forward pass."""
    total = 0.0
    for start in range(0, len(rows), MEASURE_ROWS):
        part = rows[start : start + MEASURE_ROWS]
        chosen, rejected = (
            model(
                input_ids=pad([r[side] for r in part], model.config.pad_token_id),
                attention_mask=_mask(part, side),
            )
            .logits.squeeze(-1)
            .float()
            for side in ("chosen_ids", "rejected_ids")
        )
        margins = torch.tensor([row["margin"] for row in part])
        total += float(-F.logsigmoid(chosen - rejected - margins).sum())
    return total / len(rows)


def _mask(rows: list[dict[str, Any]], key: str) -> Tensor:
    return pad([[1] * len(row[key]) for row in rows], 0)
