"""One server that forks nodes, and one-process trainings to compare with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("trainings", "workbench")

from tiny_run import TinyRun, shared_run  # noqa: E402
from trainings import STAGES, Cluster, Outcome, environment  # noqa: E402
from workbench import Workbench  # noqa: E402

from rlhf.launch.local import NodeServer  # noqa: E402


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    paths = f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}"
    with NodeServer(
        tmp_path_factory.mktemp("server"),
        stages=STAGES,
        environment={**environment(), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
    ) as server:
        yield Cluster(server)


@pytest.fixture(scope="session")
def alone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """Return a function that trains in one process, once for all tests that compare with it."""
    made: dict[str, Outcome] = {}

    def train(stage: str, **settings: Any) -> Outcome:
        key = f"{stage} {sorted(settings.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(f"alone-{stage}")
            made[key] = cluster.run(folder, stage, processes=1, **settings).done()
        return made[key]

    return train


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return shared_run(tmp_path_factory)


@pytest.fixture(scope="session")
def bench(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with Workbench.open(tiny, tmp_path_factory.mktemp("stages")) as opened:
        yield opened
