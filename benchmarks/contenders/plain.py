"""The reference: one plain loop over padded batches with all logits, by torch's own AdamW.

It sees the batches that our trainer sees, so that losses after many steps can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.contenders.common import (
    IGNORED,
    Clock,
    chat_loss,
    copy_weights,
    pad,
    pair_loss,
    read_work,
)
from benchmarks.worker import Contender
from rlhf.data.collate import length_grouped_order

SEED = 0


def open_contender(job: Mapping[str, Any]) -> Contender:
    """Load policy or scorer in fp32."""
    torch.set_num_threads(job["threads"])
    work, sizes = read_work(job), job["sizes"]
    is_sft = job["suite"] == "sft"
    if is_sft:
        model = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32)
        rows, measured = work["chats"], work["measured_chats"]
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            job["scorer"], num_labels=1, dtype=torch.float32
        )
        rows, measured = work["pairs"], work["measured_pairs"]
    start, step_loss = copy_weights(model), _chat_step if is_sft else _pair_step

    def once(request: Mapping[str, Any]) -> dict[str, Any]:
        steps = request.get("steps", sizes["steps"])
        chosen = rows[: steps * sizes["batch_size"]]
        lengths = [
            len(row["input_ids"])
            if is_sft
            else max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            for row in chosen
        ]
        # No steps at all: the loss before training.
        order = length_grouped_order(lengths, batch_size=sizes["batch_size"], epochs=1, seed=SEED)
        with torch.no_grad():
            model.load_state_dict(start)
        optimizer = _optimizer(model, sizes["lr"])
        clock = Clock()
        with clock.running():
            for batch in order:
                with _autocast(job["precision"]):
                    loss = step_loss(model, [chosen[index] for index in batch])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        found = chat_loss(model, measured) if is_sft else pair_loss(model, measured)
        return {"seconds": clock.seconds, "units": len(chosen), "steps": steps, "loss": found}

    return Contender(once, {})


def _chat_step(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    ids = pad([row["input_ids"] for row in rows], 0)
    mask = pad([[1] * len(row["input_ids"]) for row in rows], 0)
    targets = pad([row["labels"] for row in rows], IGNORED)[:, 1:].flatten()
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), targets)


def _pair_step(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    sides = [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
    scores = model(
        input_ids=pad(sides, model.config.pad_token_id),
        attention_mask=pad([[1] * len(ids) for ids in sides], 0),
        use_cache=False,
    ).logits.squeeze(-1)
    chosen, rejected = scores.float().chunk(2)
    margins = torch.tensor([row["margin"] for row in rows])
    return -F.logsigmoid(chosen - rejected - margins).mean()


def _optimizer(model: Any, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-5)


def _autocast(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
