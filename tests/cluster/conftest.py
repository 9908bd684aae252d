"""One virtual cluster for all of its tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster.lab import SlurmLab, install


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    reason = install()
    if reason:
        pytest.skip(reason)
    with SlurmLab(tmp_path_factory.mktemp("slurm")) as started:
        yield started
