"""What the machine is, and how busy others keep it. Linux only: everything comes from /proc."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
FAST_BF16 = ("amx_bf16", "avx512_bf16")
"""Processor flags without which bf16 products are slower than fp32 ones."""
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Ticks:
    """Clock ticks since the start: of all cores, spent by anybody, and by one tree of processes."""

    total: int
    busy: int
    own: int


def parse_stat(text: str) -> tuple[int, int]:
    """Return total and busy ticks from /proc/stat; time stolen by other guests counts as busy."""
    user, nice, system, idle, iowait, *rest = (int(v) for v in text.splitlines()[0].split()[1:9])
    busy = user + nice + system + sum(rest)
    return busy + idle + iowait, busy


def parse_process(text: str) -> tuple[int, int]:
    """Return a process's parent and its ticks, those of children that it waited for included."""
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), sum(int(value) for value in fields[11:15])


def tree(processes: dict[int, tuple[int, int]], root: int) -> set[int]:
    """Return a process and all that descend from it, as far as they are there."""
    members, size = {root}, 0
    while len(members) > size:
        size = len(members)
        members |= {pid for pid, (parent, _) in processes.items() if parent in members}
    return members & processes.keys()


def tree_ticks(processes: dict[int, tuple[int, int]], root: int) -> int:
    """Add up the ticks of a process and of all that descend from it."""
    return sum(processes[pid][1] for pid in tree(processes, root))


def peak_megabytes(root: int) -> float:
    """Add up the largest resident sizes that the processes of a tree have had."""
    total = 0
    for pid in tree(_processes(), root):
        try:
            status = (PROC / str(pid) / "status").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += int(field(status, "VmHWM").partition(" ")[0] or 0)
    return total / 1024


def read_ticks(root: int | None) -> Ticks:
    """Read the clock ticks now; without a root nothing counts as own."""
    total, busy = parse_stat((PROC / "stat").read_text(encoding="ascii"))
    return Ticks(total, busy, 0 if root is None else tree_ticks(_processes(), root))


def foreign_share(before: Ticks, after: Ticks) -> float:
    """Return the share of all cores' time that went to others between two readings."""
    foreign = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, foreign / max(1, after.total - before.total))


def wait_until_quiet(*, max_share: float, seconds: float) -> float:
    """Wait until others leave the machine alone, at most so long; returns their last share."""
    end = time.monotonic() + seconds
    while True:
        before = read_ticks(None)
        time.sleep(POLL_SECONDS)
        share = foreign_share(before, read_ticks(None))
        if share <= max_share or time.monotonic() > end:
            return share


def describe() -> dict[str, Any]:
    """Return processor, cores, memory and system."""
    cpu = (PROC / "cpuinfo").read_text(encoding="utf-8")
    memory = (PROC / "meminfo").read_text(encoding="ascii")
    flags = set(field(cpu, "flags").split())
    return {
        "cpu": field(cpu, "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.split()[1]) / 2**20, 1),
        "avx512": "avx512f" in flags,
        "fast_bf16": sorted(flags & set(FAST_BF16)),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def field(text: str, name: str) -> str:
    """Return the first field of this name in a file of /proc; "" where there is none."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _processes() -> dict[int, tuple[int, int]]:
    found = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            found[int(path.parent.name)] = parse_process(path.read_text(errors="replace"))
        except (FileNotFoundError, ProcessLookupError):
            # It ended since the listing.
            continue
    return found
