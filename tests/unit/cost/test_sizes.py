"""Model sizes from files and shapes, without loading weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf import compose
from rlhf.cost.sizes import folder_size, model_size
from rlhf.errors import ConfigError
from rlhf.toy.model import build_model


def test_the_toy_models_size_is_that_of_its_weights() -> None:
    size = model_size(compose.load(["recipe=quickstart"]).model)
    assert size is not None
    assert size.parameters == sum(p.numel() for p in build_model(0).parameters())


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("llama2_7b", 6_738_415_616), ("llama2_70b", 68_976_648_192), ("smollm2", 134_515_008)],
)
def test_recipes_tell_their_size_before_the_weights_are_there(recipe: str, parameters: int) -> None:
    size = model_size(compose.load([f"recipe={recipe}", "model.path=nowhere"]).model)
    assert size is not None
    assert size.parameters == parameters


def test_an_unknown_model_has_no_size(tmp_path: Path) -> None:
    assert model_size(compose.load(["recipe=quickstart", "model.path=nowhere"]).model) is None
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    assert folder_size(tmp_path) is None


def test_a_half_given_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"give all sizes of model\.shape"):
        compose.load(["recipe=quickstart", "model.shape.hidden_size=64"])


@pytest.mark.parametrize("tied", [True, False])
def test_headers_tell_what_config_tells(tmp_path: Path, tied: bool) -> None:
    model = build_model(0)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["tie_word_embeddings"] = tied
    (tmp_path / "config.json").write_text(json.dumps(settings))
    if not tied:
        head = torch.zeros(settings["vocab_size"], settings["hidden_size"])
        save_file({"lm_head.weight": head}, tmp_path / "model-2.safetensors")
    from_files = folder_size(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert from_files == folder_size(tmp_path)
    assert from_files is not None
    table = settings["vocab_size"] * settings["hidden_size"]
    assert (from_files.head, from_files.embedding) == (table, 0 if tied else table)
