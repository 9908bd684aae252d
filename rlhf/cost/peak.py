"""How fast a device can be at most, in FLOP/s."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from rlhf.config import Config, Precision

GPUS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "A10": 125e12, "L4": 121e12, "V100": 125e12}
"""Dense bf16 (V100: fp16) peak by name, as the data sheets give it."""
DRIVER = Path("/proc/driver/nvidia/gpus")
GEMM_SIZE = 384
SMALL_GEMM_SIZE = 96
"""So small that NumPy's library stays on one thread: its threads wait for each other, which on a
busy machine makes them slower than one. It reaches four fifths of a large product's rate."""
GEMM_SECONDS = 0.05
"""Time for repeats, of which the fastest counts."""


def is_gpu(config: Config, stage: str) -> bool:
    """Tell whether a stage's processes compute on GPUs, here or where its jobs run."""
    if config.compute.device == "auto":
        return config.resources.of(stage).gpus > 0 or bool(gpu_names())
    return config.compute.device != "cpu"


def gpu_names() -> list[str]:
    """Return the names of this machine's GPUs, as the driver tells them without any library."""
    names = []
    for path in sorted(DRIVER.glob("*/information")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return names


def expected_peak(config: Config, stage: str) -> tuple[float, str]:
    """Return the peak of a stage's device, and where it comes from."""
    if config.cost.peak_flops is not None:
        return config.cost.peak_flops, "cost.peak_flops"
    if is_gpu(config, stage):
        for name in gpu_names():
            for short, peak in GPUS.items():
                if short in name:
                    return peak, f"data sheet of {name}"
        return GPUS["A100"], "data sheet of an A100, for want of a known GPU"
    threads = config.compute.num_threads
    plural = "s" if threads > 1 else ""
    return numpy_peak() * threads, f"a matrix product here, for {threads} thread{plural}"


@cache
def numpy_peak() -> float:
    """Return the FLOP/s of a small float32 matrix product on one thread."""
    import numpy as np

    factor = np.ones((SMALL_GEMM_SIZE, SMALL_GEMM_SIZE), dtype=np.float32)
    out = np.empty_like(factor)
    return best_rate(lambda: np.matmul(factor, factor, out=out), 2.0 * SMALL_GEMM_SIZE**3)


def torch_peak(config: Config) -> float:
    """Return the FLOP/s of a matrix product as a node would compute it: device, threads, precision.

    Imports torch; for `rlhf doctor`.
    """
    import torch

    has_gpu = config.compute.device != "cpu" and torch.cuda.is_available()
    is_half = config.model.precision is Precision.bf16
    dtype = torch.bfloat16 if is_half else torch.float32
    size = 8192 if has_gpu else GEMM_SIZE
    factor = torch.ones((size, size), dtype=dtype, device="cuda" if has_gpu else "cpu")

    def multiply() -> None:
        factor @ factor
        if has_gpu:
            torch.cuda.synchronize()

    before = torch.get_num_threads()
    torch.set_num_threads(config.compute.num_threads)
    try:
        return best_rate(multiply, 2.0 * size**3)
    finally:
        torch.set_num_threads(before)


def best_rate(work: Callable[[], object], flops: float) -> float:
    """Return the FLOP/s of the fastest of the calls of GEMM_SECONDS; the first only warms up."""
    work()
    fastest, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < GEMM_SECONDS:
        start = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - start)
    return flops / fastest
