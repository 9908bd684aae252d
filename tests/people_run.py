"""A run whose annotators are people, planned and not started, and batches for its stream."""

from __future__ import annotations

import atexit
import random
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from rich.console import Console

from rlhf import runner
from rlhf.artifacts import write_jsonl
from rlhf.compose import RUN_FILE, load
from rlhf.service.state import State

STREAM = "weekly"
RUN = "people"
WORDS = ("owl", "hay", "fox", "milk", "cow", "bread", "bear", "fish", "oak", "rain", "salt", "tin")


def settings(runs: Path, store: Path, *more: str) -> list[str]:
    """Return the overrides of the run."""
    return [
        "recipe=quickstart",
        f"run={RUN}",
        f"paths.runs={runs}",
        f"paths.store={store}",
        f"data.stream={STREAM}",
        "collect.annotators=people",
        "rounds.limit=null",
        "toy.sft_rows=12",
        "toy.prompts_per_kind=4",
        "toy.open_rows=6",
        "tracking.mode=none",
        "compute.num_threads=1",
        *more,
    ]


def prepare_people_run(runs: Path, store: Path, *more: str) -> Path:
    """Plan the run, as `rlhf launch` does before it starts anything; returns its folder."""
    return runner.prepare(load(settings(runs, store, *more)), Console(quiet=True)).folder


def make_people_run(state: State, *more: str) -> Path:
    """Put the planned run and its toy sets beside the service; returns the run's folder."""
    root, name = _planned(more)
    shutil.copytree(root / "runs", state.runs, dirs_exist_ok=True)
    shutil.copytree(root / "store", state.store, dirs_exist_ok=True)
    settings = state.runs / name / RUN_FILE
    settings.write_text(settings.read_text().replace(str(root / "store"), str(state.store)))
    return state.runs / name


@cache
def _planned(more: tuple[str, ...]) -> tuple[Path, str]:
    root = Path(mkdtemp(prefix="rlhf-people-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root, prepare_people_run(root / "runs", root / "store", *more).name


def comparisons(name: str, number: int = 12) -> list[dict[str, Any]]:
    """Return rows of a batch; another name gives other rows."""
    draw = random.Random(name)
    return [
        {
            "id": f"{name}-{i}",
            "prompt": [{"role": "user", "content": " ".join(draw.choices(WORDS, k=9)) + f" {i}"}],
            "chosen": " ".join(draw.choices(WORDS, k=8)),
            "rejected": " ".join(draw.choices(WORDS, k=8)),
            "strength": draw.choice(["better", "slightly_better"]),
            "axis": ("helpfulness", "safety")[i % 2],
        }
        for i in range(number)
    ]


def write_batch(path: Path, number: int = 12) -> Path:
    """Write a file that ingest accepts; its rows follow from its name."""
    write_jsonl(path, comparisons(path.name.partition(".")[0], number))
    return path
