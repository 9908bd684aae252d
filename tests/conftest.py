"""What every test starts from: no fault injection, one thread, no network, small outputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Before NumPy and torch are imported. Threads of one product wait for each other; where two test
# processes share two cores, they mostly wait.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

# Else every process that a test starts compiles this package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


LONG = (
    *("browser", "distributed", "integration", "faults", "service"),
    *("unit/test_runner.py", "unit/test_compose.py", "unit/training", "unit/stages"),
)
"""What takes longest comes first, so that no process of several waits for another at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files, those of LONG first; the tests of a file stay together."""
    ranks = {ROOT / "tests" / name: rank for rank, name in enumerate(LONG)}

    def rank_of(item: pytest.Item) -> int:
        found = (ranks[path] for path in (item.path, *item.path.parents) if path in ranks)
        return next(found, len(LONG))

    items.sort(key=rank_of)


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give processes that tests start this checkout, and nothing of the caller's settings."""
    monkeypatch.delenv("RLHF_KILL_AT", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def small_run(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that gives the overrides of a tiny toy run in a temporary folder."""

    def overrides(*more: str) -> list[str]:
        return [
            "recipe=quickstart",
            f"paths.runs={tmp_path / 'runs'}",
            f"paths.store={tmp_path / 'store'}",
            "toy.sft_rows=12",
            "toy.prompts_per_kind=4",
            "toy.open_rows=6",
            "tracking.mode=none",
            "compute.num_threads=1",
            *more,
        ]

    return overrides
