"""Energy counters of this machine: RAPL for processors, NVML for NVIDIA GPUs.

Both are read from what the system already offers (files of the kernel, a library of the driver):
no package, no network, no root beyond what the files ask for.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

POWERCAP = Path("/sys/class/powercap")
PACKAGE = re.compile(r"intel-rapl:\d+")
"""Zones of whole packages (AMD's have the same name); their sub-zones are parts of them."""
MEMORY_ZONE = "dram"
"""The one sub-zone that its package does not contain."""
NVML = "libnvidia-ml.so.1"
MICROJOULES, MILLIJOULES = 1e-6, 1e-3


class Counter(Protocol):
    """A counter of joules that only grows, but for a wrap."""

    @property
    def name(self) -> str:
        """Return what the counter measures."""

    def read(self) -> float:
        """Return joules since some moment; OSError where it cannot be read now."""

    def since(self, before: float, now: float) -> float:
        """Return the joules between two readings, across at most one wrap."""


@dataclass(frozen=True, slots=True)
class Rapl:
    """One zone of /sys/class/powercap."""

    name: str
    path: Path
    wrap: float
    """Joules at which the counter starts again at 0."""

    def read(self) -> float:
        """Return the zone's joules."""
        return int((self.path / "energy_uj").read_text()) * MICROJOULES

    def since(self, before: float, now: float) -> float:
        """Return the joules between two readings."""
        return now - before if now >= before else now - before + self.wrap


class Gpu:
    """The total energy of one NVIDIA GPU since its driver was loaded (Volta and later)."""

    def __init__(self, library: ctypes.CDLL, handle: ctypes.c_void_p, name: str) -> None:
        self.name = name
        self._library, self._handle = library, handle

    def read(self) -> float:
        """Return the GPU's joules."""
        value = ctypes.c_ulonglong()
        code = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(value))
        if code != 0:
            raise OSError(code, f"NVML cannot read the energy of {self.name}")
        return value.value * MILLIJOULES

    def since(self, before: float, now: float) -> float:
        """Return the joules between two readings; 0 where the driver was loaded anew."""
        return max(0.0, now - before)


def processor_counters(root: Path = POWERCAP) -> tuple[list[Counter], str]:
    """Return this machine's readable RAPL zones, and a text about them or about what is missing."""
    zones = [path for path in sorted(root.glob("intel-rapl:*")) if _counts(path)]
    if not zones:
        return [], f"{root} has no RAPL zone (a virtual machine, or no kernel module)"
    found: list[Counter] = []
    for path in zones:
        try:
            wrap = int((path / "max_energy_range_uj").read_text()) * MICROJOULES
            zone = Rapl(_label(path), path, wrap)
            zone.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            return [], f"{path / 'energy_uj'}: {reason} (`chmod a+r` by root makes it readable)"
        found.append(zone)
    return found, f"RAPL ({', '.join(zone.name for zone in found)})"


def _counts(path: Path) -> bool:
    return PACKAGE.fullmatch(path.name) is not None or _label(path) == MEMORY_ZONE


def _label(path: Path) -> str:
    with suppress(OSError):
        return (path / "name").read_text(encoding="ascii").strip()
    return path.name


def gpu_counters(ids: Sequence[str], *, library: str = NVML) -> tuple[list[Counter], str]:
    """Return the counters of GPUs, named by number or UUID, and a text about them."""
    if not ids:
        return [], "no GPU"
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return [], f"{library} is not there (no NVIDIA driver)"
    code = nvml.nvmlInit_v2()
    if code != 0:
        return [], f"NVML does not start (error {code})"
    found: list[Counter] = []
    for id in ids:
        handle = ctypes.c_void_p()
        if id.isdecimal():
            code = nvml.nvmlDeviceGetHandleByIndex_v2(int(id), ctypes.byref(handle))
        else:
            code = nvml.nvmlDeviceGetHandleByUUID(id.encode(), ctypes.byref(handle))
        gpu = Gpu(nvml, handle, f"GPU {id}")
        try:
            if code != 0:
                raise OSError(code, f"NVML does not know {gpu.name}")
            gpu.read()
        except OSError as error:
            return [], f"{error.strerror} (error {error.errno})"
        found.append(gpu)
    return found, f"NVML ({', '.join(gpu.name for gpu in found)})"


def own_gpus(environment: Mapping[str, str], *, rank: int) -> list[str]:
    """Return the GPU of this process, as NVML names it: the rank-th of CUDA_VISIBLE_DEVICES.

    Without that variable it is the machine's rank-th GPU; where GPUs of several kinds are mixed,
    CUDA may number them in another order.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(rank)]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return names[rank : rank + 1]


def busy_seconds(path: Path = Path("/proc/stat")) -> float | None:
    """Return the processor seconds that this machine has spent on work, None where unknown.

    Of user, nice, system, idle, iowait, irq, softirq and steal; idle and iowait are not work, and
    stolen time is another machine's.
    """
    try:
        fields = path.read_text(encoding="ascii").split("\n", maxsplit=1)[0].split()
        user, nice, system, _, _, irq, softirq = (int(field) for field in fields[1:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Return the processor seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
