"""What both trainers share: batches in a fixed order, exact resume, metrics, a stop on NaN.

Deviations from transformers' training loop, all for exactness:
- One item of the loader is one optimizer step, cut here into micro-batches. Every loss is divided
  by a count over the whole step, so 1 x 8 equals 8 x 1, incomplete last batches included.
- The order of all epochs is computed before the first step; resuming skips the steps that are done.
- A checkpoint appears by a rename when all of its files are on disk; no model card, no hub.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from rlhf import metrics
from rlhf.artifacts import NodeDir, Saved, digest_json
from rlhf.config import Config, Optimizer, Precision
from rlhf.errors import ArtifactError, StageError
from rlhf.models.loading import add_adapter, merge_adapter
from rlhf.training.optim import build_optimizer, build_schedule

log = logging.getLogger(__name__)

Micro = dict[str, Tensor]
"""One micro-batch, right-padded."""


@dataclass(frozen=True, slots=True)
class Steps:
    """All optimizer steps of a training: row indices per step, and how each step is cut."""

    order: list[list[int]]
    micro_batch_size: int
    optimizer: Optimizer


def arguments(*, config: Config, steps: Steps, directory: NodeDir, seed: int) -> dict[str, Any]:
    """Return the settings that both trainers give to TRL; nothing is left to its defaults."""
    return {
        "output_dir": str(directory.checkpoints),
        "num_train_epochs": 1,
        "per_device_train_batch_size": steps.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": steps.optimizer.max_grad_norm,
        "learning_rate": steps.optimizer.lr,
        "bf16": config.model.precision is Precision.bf16,
        "fp16": False,
        "use_cpu": config.compute.device == "cpu" or not torch.cuda.is_available(),
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "max_length": None,
        "dataset_num_proc": None,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "push_to_hub": False,
        # numpy takes 32 bits. Nothing in training draws from it: there is no dropout.
        "seed": seed % 2**32,
    }


class StepTrainer:
    """Mixin in front of a TRL trainer; a subclass says how to collate, count and compute a loss."""

    def __init__(self, *args: Any, steps: Steps, directory: NodeDir, config: Config, **kwargs: Any):
        self._steps = steps
        self._directory = directory
        self._config = config
        self._step_sums: dict[str, float] = {}
        self._tokens = self._tokens_logged = 0
        self._last_step = 0
        self._last_save = self._step_start = time.monotonic()
        super().__init__(*args, **kwargs)
        assert self.args.world_size == 1, "these trainers run in one process"

    args: Any
    accelerator: Any
    state: Any
    train_dataset: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def collate(self, rows: list[dict[str, Any]]) -> Micro:
        """Pad rows to one micro-batch; must have `attention_mask`."""
        raise NotImplementedError

    def counts(self, micros: list[Micro]) -> Mapping[str, int]:
        """Count, over a whole optimizer step, what the losses are divided by."""
        raise NotImplementedError

    def micro_loss(self, model: nn.Module, inputs: Micro, counts: Mapping[str, int]) -> Tensor:
        """Return the micro-batch's share of the step's loss, a scalar."""
        raise NotImplementedError

    def cut(self, rows: list[dict[str, Any]]) -> list[Micro]:
        """Cut the rows of one optimizer step into micro-batches."""
        size = self._steps.micro_batch_size
        return [self.collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def add(self, name: str, value: Tensor) -> None:
        """Add to a metric of the current step; micro-batches add up."""
        self._step_sums[name] = self._step_sums.get(name, 0.0) + float(value.detach())

    def run(self) -> None:
        """Train all steps, from the newest complete checkpoint if there is one."""
        saved = self._directory.resume()
        if saved is not None:
            self._restore(saved)
        self._last_save = self._step_start = time.monotonic()
        self.train(resume_from_checkpoint=None if saved is None else str(saved.path))  # type: ignore[attr-defined]

    def _restore(self, saved: Saved) -> None:
        state = saved.state
        if state["order"] != self._order_digest():
            raise ArtifactError(
                f"{saved.path} was written for other rows or another batch size; "
                f"delete {self._directory.checkpoints} to start over"
            )
        for name, value in self._exactness().items():
            if state[name] != value:
                log.warning(
                    "%s was %s and is now %s: the last digits may differ from an uninterrupted run",
                    name,
                    state[name],
                    value,
                )
        self._tokens = self._tokens_logged = state["tokens"]
        self._last_step = saved.step
        log.info("continuing at step %d of %d", saved.step, len(self._steps.order))

    def _order_digest(self) -> str:
        return digest_json(self._steps.order)

    def _exactness(self) -> dict[str, int]:
        return {
            "num_threads": torch.get_num_threads(),
            "micro_batch_size": self._steps.micro_batch_size,
        }

    # What follows overrides transformers.Trainer.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return one item per optimizer step, in the computed order."""
        return DataLoader(self.train_dataset, batch_sampler=self._steps.order, collate_fn=self.cut)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Build AdamW from our configuration."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(model or self.model, self._steps.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build warm-up and cosine from our configuration."""
        if self.lr_scheduler is None:
            self.lr_scheduler = build_schedule(
                optimizer or self.optimizer, self._steps.optimizer, total_steps=num_training_steps
            )
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: list[Micro], num_items_in_batch: Any = None) -> Any:
        """Accumulate the gradient of one optimizer step; returns its loss."""
        model.train()
        counts = self.counts(inputs)
        loss = torch.zeros((), device=self.args.device)
        for micro in inputs:
            self._tokens += int(micro["attention_mask"].sum())
            on_device = {name: value.to(self.args.device) for name, value in micro.items()}
            micro_loss = self.micro_loss(model, on_device, counts)
            self.accelerator.backward(micro_loss)
            loss += micro_loss.detach()
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Count nothing: cost is estimated from the plan."""
        return 0

    def log(self, logs: Any, start_time: float | None = None) -> None:
        """Log nothing: `_maybe_log_save_evaluate` writes the rows."""

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, *args: Any, learning_rate: float, **kwargs: Any
    ) -> None:
        step = self.state.global_step
        # The loop calls once more at the end of an epoch.
        if step == self._last_step:
            return
        self._last_step = step
        loss = float(tr_loss)
        tr_loss.zero_()
        self._refuse_divergence(step, loss=loss, grad_norm=float(grad_norm))
        self._write_row(step, loss=loss, grad_norm=float(grad_norm), lr=learning_rate)
        if self._directory.save_now(step, is_due=self._checkpoint_is_due(step)):
            self._save_checkpoint()
        self._directory.step(step, self.state.max_steps)

    def _refuse_divergence(self, step: int, *, loss: float, grad_norm: float) -> None:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise StageError(
                    f"the {name} is {value} at step {step} of {self.state.max_steps}; the last "
                    f"checkpoint in {self._directory.checkpoints} is kept: lower the learning rate "
                    "or look at the rows of this step"
                )

    def _write_row(self, step: int, *, loss: float, grad_norm: float, lr: float) -> None:
        now = time.monotonic()
        seconds, self._step_start = now - self._step_start, now
        tokens, self._tokens_logged = self._tokens - self._tokens_logged, self._tokens
        row = {
            "step": step,
            metrics.TRAIN_LOSS: loss,
            metrics.TRAIN_LR: lr,
            metrics.TRAIN_GRAD_NORM: grad_norm,
            metrics.TRAIN_TOKENS: self._tokens,
            **self._step_sums,
            metrics.TIME_STEP: seconds,
            metrics.TIME_TOKENS_PER_SECOND: tokens / max(seconds, 1e-9),
        }
        self._step_sums = {}
        self._directory.metrics.append(row)

    def _checkpoint_is_due(self, step: int) -> bool:
        every = self._config.checkpoint
        by_steps = every.every_steps is not None and step % every.every_steps == 0
        return by_steps or time.monotonic() - self._last_save >= every.every_seconds

    def _save_checkpoint(self, model: Any = None, trial: Any = None) -> None:
        state = {"tokens": self._tokens, "order": self._order_digest(), **self._exactness()}
        with self._directory.checkpoint(self.state.global_step, state) as folder:
            self.save_model(str(folder), _internal_call=True)  # type: ignore[attr-defined]
            self._save_optimizer_and_scheduler(str(folder))  # type: ignore[attr-defined]
            self._save_rng_state(str(folder))  # type: ignore[attr-defined]
            self.state.save_to_json(str(folder / "trainer_state.json"))
        self._last_save = time.monotonic()


def train_in_place(
    model: PreTrainedModel,
    build: Callable[[Any], StepTrainer],
    *,
    config: Config,
    directory: NodeDir,
    task_type: str,
    seed: int,
) -> None:
    """Train `model` with the trainer that `build` makes of it, resuming where it stopped.

    With model.lora.enabled only an adapter is trained; it is written to adapter/ and merged, so the
    caller holds a plain trained model either way. Returns in eval mode.
    """
    if config.model.lora.enabled:
        wrapped = add_adapter(model, config.model.lora, task_type=task_type, seed=seed)
        build(wrapped).run()
        merge_adapter(wrapped, directory.path / "adapter")
    else:
        build(model).run()
    # TRL and accelerate hang their own forward on the instance; the class's one comes back.
    model.__dict__.pop("forward", None)
    model.eval()
