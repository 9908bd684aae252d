"""The tiny run of both rounds, shared with the other folders of this session."""

from __future__ import annotations

import pytest
from tiny_run import TinyRun, shared_run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return shared_run(tmp_path_factory)
