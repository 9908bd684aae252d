"""TRL's SFTTrainer and RewardTrainer on rows of token ids.

A round trains from the same weights with a new trainer; only `train()` is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from benchmarks.contenders.common import (
    IGNORED,
    Clock,
    chat_loss,
    copy_weights,
    pair_loss,
    read_work,
)
from benchmarks.worker import Contender

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_contender(job: Mapping[str, Any]) -> Contender:
    """Load policy or scorer; `arguments` of the options go to TRL as they are."""
    if job["options"]["tuned"]:
        torch.set_num_threads(job["threads"])
    return _sft(job) if job["suite"] == "sft" else _reward(job)


def _sft(job: Mapping[str, Any]) -> Contender:
    work = read_work(job)
    tokenizer = AutoTokenizer.from_pretrained(job["policy"])
    model = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=_dtype(job))

    def build(rows: list[dict[str, Any]]) -> SFTTrainer:
        return SFTTrainer(
            model=model,
            args=SFTConfig(**_arguments(job)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    def units(rows: list[dict[str, Any]]) -> int:
        return sum(label != IGNORED for row in rows for label in row["labels"][1:])

    return _contender(
        job, model, build, work["chats"], units, lambda: chat_loss(model, work["measured_chats"])
    )


def _reward(job: Mapping[str, Any]) -> Contender:
    work = read_work(job)
    tokenizer = AutoTokenizer.from_pretrained(job["scorer"])
    model = AutoModelForSequenceClassification.from_pretrained(
        job["scorer"], num_labels=1, dtype=_dtype(job)
    )

    def build(rows: list[dict[str, Any]]) -> RewardTrainer:
        if job["options"]["length_column"]:
            lengths = [max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
            rows = [{**row, "length": length} for row, length in zip(rows, lengths, strict=True)]
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(**_arguments(job)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        if job["options"]["length_column"]:
            # Else the trainer drops the column that it groups by.
            trainer._set_signature_columns_if_needed()
            trainer._signature_columns = [*trainer._signature_columns, "length"]
        return trainer

    return _contender(
        job, model, build, work["pairs"], len, lambda: pair_loss(model, work["measured_pairs"])
    )


def _contender(
    job: Mapping[str, Any],
    model: Any,
    build: Callable[[list[dict[str, Any]]], Any],
    rows: list[dict[str, Any]],
    units: Callable[[list[dict[str, Any]]], int],
    loss: Callable[[], float],
) -> Contender:
    start, sizes = copy_weights(model), job["sizes"]

    def once(request: Mapping[str, Any]) -> dict[str, Any]:
        steps = 1 if request.get("warmup") else request.get("steps", sizes["steps"])
        chosen = rows[: steps * sizes["batch_size"]]
        with torch.no_grad():
            model.load_state_dict(start)
        trainer = build(chosen)
        clock = Clock()
        with clock.running():
            trainer.train()
        # The trainer leaves its own forward, and perhaps a mode, on the model.
        model.__dict__.pop("forward", None)
        model.eval()
        measured = None if request.get("warmup") else loss()
        return {
            "seconds": clock.seconds,
            "units": units(chosen),
            "steps": trainer.state.global_step,
            "loss": measured,
        }

    return Contender(once, {"threads": torch.get_num_threads(), "arguments": job["options"]})


def _arguments(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same optimizer and schedule for everybody, and the variant's own settings."""
    sizes = job["sizes"]
    common = {
        "output_dir": str(Path(job["scratch"]) / "trl"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": sizes["batch_size"],
        "learning_rate": sizes["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-5,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return {**common, **job["options"]["arguments"]}


def _dtype(job: Mapping[str, Any]) -> torch.dtype:
    return DTYPES[job["options"]["weights"]]
