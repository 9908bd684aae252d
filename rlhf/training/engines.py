"""Training whose states are shared by the processes of a node: DeepSpeed ZeRO and PyTorch FSDP.

An engine takes a plain model over and gives its whole weights back when somebody asks. Replicas
(ddp) need no engine: accelerate wraps them. DeepSpeed and FSDP are driven directly, because
accelerate drops the one and refuses the other on a machine without GPUs, and holds one DeepSpeed
engine where PPO needs two.

Every loss must be a share of the whole step's loss times the number of processes, because engines
average gradients. Weights are fp32; bf16 is autocast in the forward pass, as for replicas.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.optim import AdamW

from rlhf.config import Config, Precision, Strategy
from rlhf.errors import ConfigError
from rlhf.models.loading import autocast
from rlhf.processes import Processes
from rlhf.training.layout import ZERO_STAGES

SMALL_SHARE, SMALL_LIMIT = 1000, 100_000
"""ZeRO-3 keeps a weight of less than 1/1000 of the model, and of at most this size, everywhere."""
NEVER = 10**9
"""Steps between two of DeepSpeed's own reports."""


class Engine(Protocol):
    """One model and its optimizer, shared by all processes."""

    model: Any
    """What the forward pass calls."""
    optimizer: AdamW
    """Its groups hold the learning rates; set them before `clip`."""

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of one forward and backward pass; gradients meet in the last one."""

    def backward(self, loss: Tensor) -> None:
        """Add one micro-batch's gradients."""

    def clip(self) -> float:
        """Bound the gradient; returns the norm it had, over all processes."""

    def step(self) -> None:
        """Take the optimizer step and drop the gradients."""

    def weights(self) -> dict[str, Tensor]:
        """Return all weights by name in every process; all processes must ask together."""

    def save(self, path: Path) -> None:
        """Write the optimizer's state to `path`, or beside it one file per process."""

    def load(self, path: Path) -> None:
        """Read what `save` wrote, or what a plain AdamW wrote where the layout is whole."""


def open_engine(
    model: nn.Module,
    build_optimizer: Callable[[nn.Module], AdamW],
    *,
    config: Config,
    processes: Processes,
    device: torch.device,
    max_grad_norm: float,
) -> Engine:
    """Share `model` among the processes as the configuration says; it is no plain model after."""
    model.to(device)
    if config.model.precision is Precision.bf16:
        _autocast_forward(model, config, device)
    kind = FsdpEngine if config.distributed.strategy is Strategy.fsdp else ZeroEngine
    engine: Engine = kind(
        model,
        build_optimizer,
        config=config,
        processes=processes,
        device=device,
        max_grad_norm=max_grad_norm,
    )
    return engine


class ZeroEngine:
    """DeepSpeed over our AdamW."""

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module], AdamW],
        *,
        config: Config,
        processes: Processes,
        device: torch.device,
        max_grad_norm: float,
    ) -> None:
        _find_compiler(device)
        import deepspeed

        self._processes, self._max_grad_norm = processes, max_grad_norm
        self._stage = ZERO_STAGES[config.distributed.strategy]
        self._module = model
        self._gathered = deepspeed.zero.GatheredParameters
        self.optimizer = build_optimizer(model)
        self.model, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=deepspeed_config(config, model, device=device, max_grad_norm=max_grad_norm),
            dist_init_required=False,
            # So that DeepSpeed waits in our process group, whose timeout is the configured one.
            mesh_param=(processes.size, 1),
        )

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Any:
        """Tell DeepSpeed whether the gradient is complete after this pass."""
        self.model.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add one micro-batch's gradients."""
        self.model.backward(loss)

    def clip(self) -> float:
        """Bound the gradient; above stage 0 DeepSpeed clips as it steps, and does so here."""
        if self._stage == 0:
            return _clip(self._module, self._max_grad_norm)
        self.model.step()
        return float(self.model.get_global_grad_norm())

    def step(self) -> None:
        """Take the optimizer step that `clip` has not taken yet."""
        if self._stage == 0:
            self.model.step()
        self.model.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """Return all weights; below stage 3 they are the model's own, not copies."""
        named = dict(self._module.named_parameters())
        if self._stage < 3:
            return {name: parameter.detach() for name, parameter in named.items()}
        with self._gathered(list(named.values()), modifier_rank=None):
            return {name: parameter.detach().clone() for name, parameter in named.items()}

    def save(self, path: Path) -> None:
        """Write AdamW's state: of the whole model at stage 0, else each process its part.

        DeepSpeed's own checkpoints are pickles; these files load with weights_only.
        """
        if self._stage == 0:
            if self._processes.is_main:
                torch.save(self.optimizer.state_dict(), path)
            return
        states = [self.optimizer.state[part] for part in self._parts()]
        torch.save(states, self._own_file(path))

    def load(self, path: Path) -> None:
        """Read AdamW's state."""
        if self._stage == 0:
            self.optimizer.load_state_dict(torch.load(path, weights_only=True))
            return
        states = torch.load(self._own_file(path), weights_only=True)
        for part, state in zip(self._parts(), states, strict=True):
            self.optimizer.state[part] = {
                name: value.to(part.device) for name, value in state.items()
            }

    def _own_file(self, path: Path) -> Path:
        rank, size = self._processes.rank, self._processes.size
        return path.with_name(f"{path.stem}-{rank:05d}-of-{size:05d}{path.suffix}")

    def _parts(self) -> list[Tensor]:
        """Return this process's flat fp32 weights, by which AdamW keys its state."""
        inner = self.model.optimizer
        parts = (
            inner.fp32_partitioned_groups_flat
            if self._stage == 3
            else inner.single_partition_of_fp32_groups
        )
        return list(parts)


def _find_compiler(device: torch.device) -> None:
    """Put ninja on PATH; ConfigError where DeepSpeed cannot compile what it wants on a CPU."""
    own = Path(sys.executable).parent
    if shutil.which("ninja") is None:
        os.environ["PATH"] = f"{own}{os.pathsep}{os.environ['PATH']}"
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if missing and device.type == "cpu":
        raise ConfigError(
            f"distributed.strategy: DeepSpeed compiles its part for processors and finds no "
            f"{' and no '.join(missing)}: install it, or use distributed=ddp or distributed=fsdp"
        )


def deepspeed_config(
    config: Config, model: nn.Module, *, device: torch.device, max_grad_norm: float
) -> dict[str, Any]:
    """Return DeepSpeed's settings; what is not here (schedule, accumulation) is done outside."""
    stage = ZERO_STAGES[config.distributed.strategy]
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    zero: dict[str, Any] = {
        "stage": stage,
        "stage3_param_persistence_threshold": min(num_weights // SMALL_SHARE, SMALL_LIMIT),
    }
    if config.distributed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm if stage > 0 else 0.0,
        "zero_optimization": zero,
        # The same AdamW everywhere, offloaded or not, so that results agree.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
    }


class FsdpEngine:
    """PyTorch's fully_shard over a model's layers, with our AdamW."""

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module], AdamW],
        *,
        config: Config,
        processes: Processes,
        device: torch.device,
        max_grad_norm: float,
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self._processes, self._max_grad_norm = processes, max_grad_norm
        mesh = init_device_mesh(device.type, (processes.size,))
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh)
        self.model: Any = fully_shard(model, mesh=mesh)
        self.optimizer = build_optimizer(model)

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Any:
        """Let gradients meet in the last pass only."""
        self.model.set_requires_gradient_sync(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add one micro-batch's gradients."""
        loss.backward()

    def clip(self) -> float:
        """Bound the gradient; returns the norm it had."""
        return _clip(self.model, self._max_grad_norm)

    def step(self) -> None:
        """Take the optimizer step and drop the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        """Return all weights, gathered one by one."""
        return {name: _whole(value.detach()) for name, value in self.model.named_parameters()}

    def save(self, path: Path) -> None:
        """Write the state as a plain AdamW has it; gathered in every process, kept in the first."""
        saved = self.optimizer.state_dict()
        states: dict[int, dict[str, Tensor]] = {}
        for index, state in saved["state"].items():
            for name, value in state.items():
                whole = _whole(value)
                if self._processes.is_main:
                    states.setdefault(index, {})[name] = whole.cpu()
        if self._processes.is_main:
            torch.save({**saved, "state": states}, path)

    def load(self, path: Path) -> None:
        """Read a plain AdamW's state; each process takes its part of every tensor."""
        from torch.distributed.tensor import distribute_tensor

        saved = torch.load(path, weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, state in saved["state"].items():
            parameter = parameters[index]
            for name, value in state.items():
                if value.shape == parameter.shape:
                    state[name] = distribute_tensor(
                        value.to(parameter.device),
                        parameter.device_mesh,
                        parameter.placements,
                        src_data_rank=None,
                    )
        self.optimizer.load_state_dict(saved)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the transformer layers, as the model's own class names them."""
    names = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", ()) or ()
    }
    return [module for module in model.modules() if type(module).__name__ in names]


def _clip(model: nn.Module, max_grad_norm: float) -> float:
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    return float(_whole(norm))


def _whole(value: Tensor) -> Tensor:
    """Gather a tensor that is spread over the processes; others come back as they are."""
    gather = getattr(value, "full_tensor", None)
    whole: Tensor = value if gather is None else gather()
    return whole


def _autocast_forward(model: nn.Module, config: Config, device: torch.device) -> None:
    """Run the forward pass in bf16 and return fp32, as accelerate does for replicas.

    Inside the model, because DeepSpeed switches an outer autocast off.
    """
    forward = model.forward

    @wraps(forward)
    def cast(*args: Any, **kwargs: Any) -> Any:
        with autocast(config.model, device):
            return forward(*args, **kwargs)

    model.forward = convert_outputs_to_fp32(cast)
