"""Which files of its parents a node checks before it reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.artifacts import write_json, write_manifest
from rlhf.errors import ArtifactError
from rlhf.nodes import Inputs, ModelInput
from rlhf.resolve import verify

FILES = ("model/weights.json", "shards/00000.json", "adapter/weights.json", "winners.json")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for name in FILES:
        write_json(tmp_path / "node" / name, "good")
    write_manifest(tmp_path / "node", {})
    return tmp_path


def inputs(run_dir: Path, *, whole: bool) -> Inputs:
    path = run_dir / "node" if whole else run_dir / "node" / "model"
    return Inputs({"role": ModelInput(str(path), "node", "digest")}, ())


@pytest.mark.parametrize(
    ("whole", "read"), [(True, {"winners.json"}), (False, {"model/weights.json"})]
)
def test_a_changed_file_is_refused_where_it_is_read(
    run_dir: Path, whole: bool, read: set[str]
) -> None:
    """Weights are read through a node's model: a node read as a whole gives its tables only."""
    verify(inputs(run_dir, whole=whole), run_dir)
    refused = {}
    for name in FILES:
        path = run_dir / "node" / name
        good = path.read_bytes()
        path.write_bytes(good.replace(b"good", b"evil"))
        try:
            verify(inputs(run_dir, whole=whole), run_dir)
        except ArtifactError as error:
            refused[name] = str(error).partition(" changed after its node was done")[0]
        path.write_bytes(good)
    assert refused == {name: str(run_dir / "node" / name) for name in read}


def test_models_from_outside_the_run_are_not_checked(tmp_path: Path) -> None:
    outside = Inputs({"base": ModelInput(str(tmp_path / "elsewhere"), "base", "digest")}, ())
    verify(outside, tmp_path / "run")
