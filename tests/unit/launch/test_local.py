"""What the server of nodes does once for all of them."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest

from rlhf.launch import local


@pytest.mark.parametrize(
    ("loaded", "gpus", "expected"),
    [
        ((), [], []),
        (("transformers",), [], ["transformers.conversion_mapping"]),
        (("accelerate",), [], ["deepspeed"]),
        (("accelerate",), ["NVIDIA H100"], []),
    ],
)
def test_what_trainings_begin_with_is_done_once(
    loaded: tuple[str, ...],
    gpus: list[str],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSpeed asks the driver for GPUs, and what has done so must not be forked."""
    for name in ("transformers", "accelerate"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in loaded:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    imported: list[str] = []
    built: list[str] = []
    module = SimpleNamespace(get_checkpoint_conversion_mapping=built.append)

    def import_module(name: str) -> SimpleNamespace:
        imported.append(name)
        return module

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(local, "gpu_names", lambda: gpus)
    local.warm_up()
    assert imported == expected
    assert built == ["llama"] * ("transformers" in loaded)
