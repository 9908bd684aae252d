"""What a node took: device-seconds, energy, memory, over all its processes, machines and starts.

Every process measures itself and writes one small file; the node's first process adds all files up.
A start that was killed leaves its file behind, so that a resumed node counts it too. Time that a
process was suspended (SIGSTOP, a sleeping machine) is left out: a heartbeat that comes far too late
starts a new interval.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.algo.carbon import JOULES_PER_KWH, SECONDS_PER_HOUR, co2_kg, device_kwh
from rlhf.config import Config, Cost
from rlhf.cost.counters import (
    Counter,
    busy_seconds,
    gpu_counters,
    own_gpus,
    own_seconds,
    processor_counters,
)
from rlhf.processes import LOCAL_RANK
from rlhf.provenance import peak_gpu_memory_mb, peak_memory_mb

FOLDER = "energy"
BEAT_SECONDS = 2.0
"""Between readings: what a kill may lose, and far below the minutes in which a counter wraps."""
SUSPENDED_SECONDS = 60.0
"""A heartbeat that is later than this was suspended, not slow."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Joules of all counters, and processor seconds of this process and of the machine."""

    moment: float
    joules: tuple[float, ...]
    own: float
    busy: float | None


@dataclass(slots=True)
class Used:
    """What one process used so far; `joules` is None where nothing can be read."""

    seconds: float = 0.0
    joules: float | None = None
    source: str = ""
    peak_memory_mb: float = 0.0
    peak_gpu_memory_mb: float | None = None


class Meter:
    """Measures this process from its making until `stop`."""

    def __init__(
        self,
        folder: Path,
        *,
        has_gpu: bool,
        clock: Callable[[], float] = time.monotonic,
        processor: tuple[Sequence[Counter], str] | None = None,
        gpus: tuple[Sequence[Counter], str] | None = None,
    ) -> None:
        self.path = folder / FOLDER / f"{secrets.token_hex(8)}.json"
        self._clock = clock
        rank = int(os.environ.get(LOCAL_RANK, "0"))
        self._shared, text = processor or processor_counters()
        self._owned: Sequence[Counter] = ()
        texts = [text]
        if has_gpu:
            self._owned, text = gpus or gpu_counters(own_gpus(os.environ, rank=rank))
            texts.append(text)
        # Without the GPU's counter the rest would be a small part that looks like the whole.
        is_measured = bool(self._owned) if has_gpu else bool(self._shared)
        self.used = Used(joules=0.0 if is_measured else None, source="; ".join(texts))
        self._last = self._read()
        self._end = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, name="energy", daemon=True).start()

    def stop(self) -> None:
        """Take the last reading and write it; a second call does nothing."""
        if not self._end.is_set():
            self._end.set()
            self.update()

    def update(self) -> None:
        """Add what was used since the last reading, and write the file."""
        with self._lock:
            now = self._read()
            if now is not None and self._last is not None:
                self._add(self._last, now)
            self._last = now
            self.used.peak_memory_mb = peak_memory_mb()
            self.used.peak_gpu_memory_mb = peak_gpu_memory_mb()
            # A full disk must not end a node that could still save its state.
            with suppress(OSError):
                self._write()

    def _add(self, before: Reading, now: Reading) -> None:
        passed = now.moment - before.moment
        if passed > SUSPENDED_SECONDS:
            return
        self.used.seconds += passed
        if self.used.joules is None:
            return
        counters = (*self._shared, *self._owned)
        differences = [
            counter.since(first, last)
            for counter, first, last in zip(counters, before.joules, now.joules, strict=True)
        ]
        split = len(self._shared)
        share = processor_share(before, now)
        self.used.joules += share * sum(differences[:split]) + sum(differences[split:])

    def _read(self) -> Reading | None:
        """Read everything at once; None where a counter fails just now."""
        if self.used.joules is None:
            return Reading(self._clock(), (), 0.0, None)
        try:
            joules = tuple(counter.read() for counter in (*self._shared, *self._owned))
        except (OSError, ValueError):
            return None
        return Reading(self._clock(), joules, own_seconds(), busy_seconds())

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            self.update()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps(asdict(self.used)), encoding="utf-8")
        temporary.replace(self.path)


def processor_share(before: Reading, now: Reading) -> float:
    """Return this process's share of a machine's processor energy between two readings.

    Its processor seconds over those of everything that ran, so that idle power is shared alike and
    nodes side by side add up to the machine.
    """
    if before.busy is None or now.busy is None:
        return 1.0
    busy, own = now.busy - before.busy, now.own - before.own
    return min(1.0, own / busy) if busy > 0 else 0.0


def node_usage(folder: Path, config: Config, *, watts: float) -> dict[str, Any]:
    """Return the manifest's entries about time, energy and memory.

    Time and energy are sums over all processes and starts of a node, memory is the largest
    process's. Measured only if every process was; else device-seconds times the configured watts.
    """
    parts = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        with suppress(ValueError):
            parts.append(json.loads(path.read_bytes()))
    seconds = sum(part["seconds"] for part in parts)
    joules = [part["joules"] for part in parts]
    sources = ", ".join(dict.fromkeys(part["source"] for part in parts))
    if parts and None not in joules:
        kwh, method = sum(joules) / JOULES_PER_KWH, "measured"
    else:
        kwh, method = device_kwh(seconds / SECONDS_PER_HOUR, watts=watts), "estimated"
        sources = f"{watts:g} W per device; not measured: {sources or 'no process left a reading'}"
    energy = {"kwh": kwh, "method": method, "source": sources, "co2_kg": _co2(kwh, config.cost)}
    on_gpu = [part.get("peak_gpu_memory_mb") for part in parts]
    return {
        "device_seconds": round(seconds, 3),
        "energy_kwh": kwh,
        "energy": energy,
        "peak_memory_mb": max((part.get("peak_memory_mb", 0.0) for part in parts), default=0.0),
        "peak_gpu_memory_mb": max((mb for mb in on_gpu if mb is not None), default=None),
    }


def drop_readings(folder: Path) -> None:
    """Delete the processes' files, once the manifest has their sum."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _co2(kwh: float, cost: Cost) -> float:
    return co2_kg(kwh, pue=cost.pue, kg_per_kwh=cost.kg_co2_per_kwh)


def device_watts(config: Config, *, has_gpu: bool) -> float:
    """Return the configured power of a device: a GPU, or the threads of a process."""
    if has_gpu:
        return config.cost.watts_per_gpu
    return config.cost.watts_per_core * config.compute.num_threads
