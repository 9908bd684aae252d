"""Peak memory: of this process as it is, whatever it was before a fork or an exec."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.provenance import peak_gpu_memory_mb, peak_memory_mb

HELD_MB = 300
FORK = """
import os
from rlhf.provenance import peak_memory_mb
block = bytearray(int(os.environ["HELD_MB"]) * 2**20)
del block
print(peak_memory_mb(), flush=True)
if os.fork() == 0:
    print(peak_memory_mb(), flush=True)
    os._exit(0)
os.wait()
"""
EXEC = """
import os, sys
block = bytearray(int(os.environ["HELD_MB"]) * 2**20)
code = "from rlhf.provenance import peak_memory_mb; print(peak_memory_mb())"
os.execv(sys.executable, [sys.executable, "-c", code])
"""


def printed(code: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setenv("HELD_MB", str(HELD_MB))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.splitlines()]


def test_a_forked_process_has_no_peak_of_its_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = printed(FORK, monkeypatch)
    assert parent > HELD_MB > child > 1


def test_a_program_has_no_peak_of_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (peak,) = printed(EXEC, monkeypatch)
    assert HELD_MB > peak > 1


def test_the_peak_grows_with_the_process() -> None:
    before = peak_memory_mb()
    block = bytearray(int((before + 50) * 2**20))
    assert peak_memory_mb() > before + 40
    assert len(block) > 0


@pytest.mark.parametrize(("is_used", "expected"), [(False, None), (True, 1536.5)])
def test_a_gpus_peak_is_what_torch_reserved(
    is_used: bool, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: is_used, max_memory_reserved=lambda: int(1536.5 * 2**20)
    )
    torch: Any = SimpleNamespace(cuda=cuda)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert peak_gpu_memory_mb() == expected


def test_without_torch_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert peak_gpu_memory_mb() is None
