"""What both trainers share: batches in a fixed order, exact resume, metrics, a stop on NaN.

Deviations from transformers' training loop, all for exactness:
- One item of the loader is one optimizer step, cut here into micro-batches. Every loss is divided
  by a count over the whole step, so 1 x 8 equals 8 x 1, incomplete last batches included.
- The order of all epochs is computed before the first step; resuming skips the steps that are done.
- A checkpoint appears by a rename when all of its files are on disk; no model card, no hub.
- Processes share the rows of each step; a loss divided by the step's counts adds up over them as
  it does over micro-batches. ZeRO and FSDP come as engines, which the loop takes for an optimizer.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from rlhf import metrics
from rlhf.artifacts import NodeDir, Saved, digest_json
from rlhf.config import Config, Precision
from rlhf.data.collate import batches_by_length
from rlhf.errors import ArtifactError, StageError
from rlhf.models.loading import add_adapter, merge_adapter
from rlhf.models.packing import pass_padding
from rlhf.models.shells import fill, take_over
from rlhf.training.engines import Engine, open_engine
from rlhf.training.layout import check_conditions, conditions, is_shared
from rlhf.training.optim import build_optimizer, build_schedule
from rlhf.training.ppo_state import save_weights
from rlhf.training.steps import Micro, StepBatch, Steps

log = logging.getLogger(__name__)

OPTIMIZER, SCHEDULE = "optimizer.pt", "scheduler.pt"
"""Files of a checkpoint, as transformers names them."""


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
        self._processes = directory.processes
        self._engine: Engine | None = None
        self._parameters: list[nn.Parameter] = []
        self._step_sums: dict[str, float] = {}
        self._is_ghost = False
        self._step_tokens = self._tokens = 0
        self._last_step = 0
        self._last_save = self._step_start = time.monotonic()
        super().__init__(*args, **kwargs)
        size = self._processes.size
        assert self.args.world_size == self.accelerator.num_processes == size, "unconnected"

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

    def length(self, row: dict[str, Any]) -> int:
        """Return the tokens of a row, those of its longer side where it has two."""
        raise NotImplementedError

    def counts(self, micros: list[Micro]) -> Mapping[str, int]:
        """Count, over a whole optimizer step, what the losses are divided by."""
        raise NotImplementedError

    def micro_loss(self, model: nn.Module, inputs: Micro, counts: Mapping[str, int]) -> Tensor:
        """Return the micro-batch's share of the step's loss, a scalar."""
        raise NotImplementedError

    def cut(self, rows: list[dict[str, Any]]) -> StepBatch:
        """Cut this process's share of one optimizer step into micro-batches.

        Several processes make equally many passes, so there the number of rows alone decides.
        """
        size = self._steps.micro_batch_size
        if self._processes.size == 1:
            batches = batches_by_length(
                [self.length(row) for row in rows],
                max_rows=size,
                max_padding=pass_padding(self.model),
            )
            micros = [self.collate([rows[index] for index in batch]) for batch in batches]
            return StepBatch(micros, 0, self.counts(micros))
        counts = self.counts(self._micros(rows))
        micros = self._micros(self._processes.share(rows))
        largest_share = math.ceil(len(rows) / self._processes.size)
        passes = math.ceil(largest_share / size)
        ghosts = [self.collate(rows[:1])] * (passes - len(micros))
        return StepBatch([*micros, *ghosts], len(ghosts), counts)

    def _micros(self, rows: list[dict[str, Any]]) -> list[Micro]:
        size = self._steps.micro_batch_size
        return [self.collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def add(self, name: str, value: Tensor) -> None:
        """Add to a metric of the current step; micro-batches and processes add up."""
        share = 0.0 if self._is_ghost else float(value.detach())
        self._step_sums[name] = self._step_sums.get(name, 0.0) + share

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
        check_conditions(saved, self._conditions(), self._directory)
        self._tokens = state["tokens"]
        self._last_step = saved.step
        log.info("continuing at step %d of %d", saved.step, len(self._steps.order))

    def _order_digest(self) -> str:
        return digest_json(self._steps.order)

    def _conditions(self) -> dict[str, Any]:
        here = conditions(self._config, self._processes)
        return {"micro_batch_size": self._steps.micro_batch_size, **here}

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

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        """Hand the model to an engine where one is wanted; its weights are read already."""
        if not is_shared(self._config, self._processes):
            prepared: tuple[Any, Any] = super()._prepare_for_training(  # type: ignore[misc]
                max_steps, train_dataloader, resume_from_checkpoint
            )
            self._parameters = list(self.model.parameters())
            return prepared
        settings = self._steps.optimizer
        engine = open_engine(
            self.model,
            lambda model: build_optimizer(model, settings),
            config=self._config,
            processes=self._processes,
            device=self.args.device,
            max_grad_norm=settings.max_grad_norm if settings.max_grad_norm > 0 else math.inf,
        )
        self._engine = self.optimizer = engine
        self.model_wrapped = engine.model
        self.create_scheduler(max_steps, engine.optimizer)
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            engine.load(folder / OPTIMIZER)
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULE, weights_only=True))
            rates = self.lr_scheduler.get_last_lr()
            for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        return engine.model, train_dataloader

    def training_step(self, model: Any, inputs: StepBatch, num_items_in_batch: Any = None) -> Any:
        """Accumulate the gradient of one step; returns this process's part of the loss."""
        if not model.training:  # It walks through all modules.
            model.train()
        loss = torch.zeros((), device=self.args.device)
        num_real = len(inputs.micros) - inputs.num_ghosts
        for index, micro in enumerate(inputs.micros):
            is_last = index == len(inputs.micros) - 1
            self._is_ghost = index >= num_real
            self._processes.passed(
                f"forward and backward pass {index + 1} of step {self.state.global_step + 1}"
            )
            on_device = {name: value.to(self.args.device) for name, value in micro.items()}
            with self._accumulating(model, is_last=is_last):
                micro_loss = self.micro_loss(model, on_device, inputs.counts)
                # Processes average their gradients; this loss is a share of the whole step's.
                self._backward(micro_loss * (0 if self._is_ghost else self._processes.size))
            if not self._is_ghost:
                self._step_tokens += int(micro["attention_mask"].sum())
                loss += micro_loss.detach()
        return loss

    def _accumulating(self, model: Any, *, is_last: bool) -> AbstractContextManager[None]:
        if self._engine is not None:
            return self._engine.micro_batch(is_last=is_last)
        return nullcontext() if is_last else self.accelerator.no_sync(model)

    def _backward(self, loss: Tensor) -> None:
        (self.accelerator if self._engine is None else self._engine).backward(loss)

    def _clip_grad_norm(self, model: Any) -> Any:
        self._processes.passed(f"gradient of step {self.state.global_step + 1}")
        if self._engine is not None:
            return self._engine.clip()
        return nn.utils.clip_grad_norm_(self._parameters, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._engine is not None:
            return self._engine.clip()
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]

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
        loss = self._sum_over_processes(step, float(tr_loss))
        tr_loss.zero_()
        self._refuse_divergence(step, loss=loss, grad_norm=float(grad_norm))
        self._write_row(step, loss=loss, grad_norm=float(grad_norm), lr=learning_rate)
        if self._directory.save_now(step, is_due=self._checkpoint_is_due(step)):
            self._save_checkpoint()
        self._directory.step(step, self.state.max_steps)

    def _sum_over_processes(self, step: int, loss: float) -> float:
        """Make the step's sums those of all processes, the same in each; returns the loss."""
        names = sorted(self._step_sums)
        own = [loss, float(self._step_tokens), *(self._step_sums[name] for name in names)]
        loss, tokens, *sums = self._processes.sum(own, f"metrics of step {step}")
        self._step_tokens = int(tokens)
        self._step_sums = dict(zip(names, sums, strict=True))
        return loss

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
        tokens, self._step_tokens = self._step_tokens, 0
        self._tokens += tokens
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
        state = {"tokens": self._tokens, "order": self._order_digest(), **self._conditions()}
        with self._directory.checkpoint(self.state.global_step, state) as folder:
            if self._engine is None:
                self.save_model(str(folder), _internal_call=True)  # type: ignore[attr-defined]
                self._save_optimizer_and_scheduler(str(folder))  # type: ignore[attr-defined]
            else:
                self._save_shared(self._engine, folder)
            self._save_rng_state(str(folder))  # type: ignore[attr-defined]
            if self._processes.is_main:
                self.state.save_to_json(str(folder / "trainer_state.json"))
        self._last_save = time.monotonic()

    def _save_shared(self, engine: Engine, folder: Path) -> None:
        weights = engine.weights()
        if self._processes.is_main:
            save_weights(folder / "model.safetensors", weights)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULE)
        del weights
        engine.save(folder / OPTIMIZER)

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Return the weights that an engine has trained, in every process; None without one."""
        return None if self._engine is None else self._engine.weights()


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
    if is_shared(config, directory.processes):
        twin = take_over(model)
        trainer = build(twin)
        trainer.run()
        weights = trainer.whole_weights()
        assert weights is not None, "the engine opens when the training starts"
        fill(model, weights)
    elif config.model.lora.enabled:
        wrapped = add_adapter(model, config.model.lora, task_type=task_type, seed=seed)
        build(wrapped).run()
        merge_adapter(wrapped, directory.path / "adapter" if directory.processes.is_main else None)
    else:
        build(model).run()
    # TRL and accelerate hang their own forward on the instance; the class's one comes back.
    model.__dict__.pop("forward", None)
    model.eval()
