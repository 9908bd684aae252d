"""The uninterrupted run, a server that starts nodes, and references with their checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny_run import TinyRun, shared_run

pytest.register_assert_rewrite("workbench")

from workbench import Workbench  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return shared_run(tmp_path_factory)


@pytest.fixture(scope="session")
def bench(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with Workbench.open(tiny, tmp_path_factory.mktemp("faults")) as opened:
        yield opened
