"""A command line as a contender: a round is one call of it, start-up included."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.worker import Contender


def open_contender(job: Mapping[str, Any]) -> Contender:
    """Call `first` of the options once; a round calls `command`, in a new folder if `fresh`."""
    options, scratch = job["options"], Path(job["scratch"])
    scratch.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **options["environment"]}
    if options["first"]:
        _call(options["first"], scratch, environment)

    def once(request: Mapping[str, Any]) -> dict[str, Any]:
        if request.get("warmup") and options["fresh"]:
            return {"seconds": 0.0, "units": 0}
        if options["fresh"]:
            shutil.rmtree(scratch)
            scratch.mkdir()
        seconds = _call(options["command"], scratch, environment)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        return {"seconds": seconds, "units": 1, "peak_memory_mb": peak}

    return Contender(once, {"command": " ".join(options["command"][1:])})


def _call(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed: {done.stdout[-500:]} {done.stderr[-500:]}")
    return seconds
