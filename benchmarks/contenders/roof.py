"""What the machine can do: products of the model's shapes, and reads from memory.

A unit is a floating-point operation of the products, so the rate is the peak that utilisation is
measured against.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.contenders.common import Clock
from benchmarks.worker import Contender

ROWS = 1024
"""Positions multiplied together."""
COPY_BYTES = 256 * 2**20
"""Far more than any cache holds."""
REPEATS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_contender(job: Mapping[str, Any]) -> Contender:
    """Make the matrices of one layer and of the head."""
    torch.set_num_threads(job["threads"])
    dtype = DTYPES[job["precision"]]
    config = json.loads((Path(job["policy"]) / "config.json").read_text(encoding="utf-8"))
    products = [
        (torch.randn(ROWS, width, dtype=dtype), torch.randn(height, width, dtype=dtype))
        for height, width in shapes(config)
    ]
    flops = REPEATS * sum(2 * x.numel() * w.shape[0] for x, w in products)
    source = torch.ones(COPY_BYTES // 4)

    @torch.no_grad()
    def multiply() -> None:
        for x, weight in products:
            F.linear(x, weight)

    def once(request: Mapping[str, Any]) -> dict[str, Any]:
        seconds = _timed(multiply)
        reading = _timed(source.sum)
        return {
            "seconds": seconds,
            "units": flops,
            "gemm_gflops": flops / seconds / 1e9,
            "read_gb_per_second": REPEATS * COPY_BYTES / reading / 1e9,
        }

    return Contender(once, {"rows": ROWS, "shapes": shapes(config)})


def shapes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return height and width of the matrices of a Llama's layer and of its head."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    keys, inner = config["num_key_value_heads"] * size, config["intermediate_size"]
    attention = [(heads * size, hidden), (keys, hidden), (keys, hidden), (hidden, heads * size)]
    return [
        *attention,
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
        (config["vocab_size"], hidden),
    ]


def _timed(work: Callable[[], Any]) -> float:
    clock = Clock()
    with clock.running():
        for _ in range(REPEATS):
            work()
    return clock.seconds
