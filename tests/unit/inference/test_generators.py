"""What is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import micro_models as micro
import pytest
import torch

from rlhf.config import Config, Engine
from rlhf.errors import ConfigError
from rlhf.inference import generators
from rlhf.inference.generation import HfGenerator
from rlhf.inference.generators import check_generator, open_generator
from rlhf.inference.vllm_client import TOKEN_VARIABLE


def config(engine: Engine) -> Config:
    made = Config(recipe="test")
    made.generator.engine = engine
    return made


def test_transformers_is_the_default_and_needs_nothing(tmp_path: Path) -> None:
    made = Config(recipe="test")
    check_generator(made)
    found = open_generator(
        made, micro.policy(), micro.tokenizer(), scratch=tmp_path, device=torch.device("cpu")
    )
    assert isinstance(found, HfGenerator)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generators, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"generator.engine=vllm .* pip install 'rlhf\[vllm\]'"):
        check_generator(config(Engine.vllm))


def test_an_engine_per_process_of_a_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generators, "find_spec", lambda name: object())
    check_generator(config(Engine.vllm))
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_generator(config(Engine.hf))
    with pytest.raises(ConfigError, match=r"use generator\.engine=vllm_server"):
        check_generator(config(Engine.vllm))


def test_a_server_elsewhere_without_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    made = config(Engine.vllm_server)
    made.generator.url = "http://gpu-7:8000"
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE):
        check_generator(made)
