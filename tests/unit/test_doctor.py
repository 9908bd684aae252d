"""`rlhf doctor`: what it checks, and its exit code."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from rlhf import compose
from rlhf.doctor import examine


def examined(*overrides: str) -> tuple[int, str]:
    out = io.StringIO()
    config = compose.load(["recipe=quickstart", *overrides])
    code = examine(config, Console(file=out, width=200))
    return code, out.getvalue()


def test_a_complete_machine_is_healthy() -> None:
    code, text = examined()
    assert code == 0
    assert "local: this machine" in text
    assert "all needed parts are there" in text
    assert "FLOP/s in fp32" in text
    assert "RAPL" in text


def test_a_silent_scheduler_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\nexit 1\n")
    squeue.chmod(0o755)
    code, text = examined("launcher=slurm")
    assert code == 2
    assert "slurm: no answer" in text
    assert "squeue failed" in text

    squeue.write_text("#!/bin/sh\nexit 0\n")
    code, text = examined("launcher=slurm")
    assert code == 0
    assert "slurm: answers, 0 jobs of this run" in text
