"""The generator that the configuration asks for, and what speaks against it."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rlhf.config import Config, Engine, Precision
from rlhf.errors import ConfigError
from rlhf.inference.generation import HfGenerator, PolicyGenerator, Weights
from rlhf.inference.llama import LlamaGenerator, why_not

log = logging.getLogger(__name__)


def check_generator(config: Config) -> None:
    """Refuse an engine that cannot work here, before a model is loaded; ConfigError.

    StageError when the server does not answer.
    """
    engine = config.generator.engine
    if engine is Engine.vllm:
        if find_spec("vllm") is None:
            from rlhf.inference.vllm_engine import INSTALL

            raise ConfigError(f"generator.engine=vllm needs vLLM, which is not here: {INSTALL}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "generator.engine=vllm cannot work in several processes, each of which would start "
                "an engine on the same device: use generator.engine=vllm_server"
            )
    if engine is Engine.vllm_server:
        from rlhf.inference.vllm_client import check_server

        check_server(config)


def open_generator(
    config: Config,
    model: Any,
    tokenizer: Any,
    *,
    scratch: Path,
    device: torch.device,
    weights: Weights | None = None,
) -> PolicyGenerator:
    """Return the configured generator with the weights of `model`, or those that `weights` gives.

    transformers moves the model to the device and decodes with it; fused decoding copies its
    weights there. vLLM gets a copy of the weights below `scratch`, which lies in paths.runs, and
    does not keep the model.
    """
    max_length, precision = config.model.max_length, config.model.precision
    if config.generator.engine in (Engine.hf, Engine.fused):
        model = model.to(device)
        reason = why_not(model.config) if config.generator.engine is Engine.fused else ""
        if reason:
            log.warning("generator=fused cannot decode this model (%s): generator=hf does", reason)
        if reason or config.generator.engine is Engine.hf:
            return HfGenerator(model, tokenizer, max_length=max_length)
        return LlamaGenerator(
            model,
            tokenizer,
            max_length=max_length,
            weights=weights or model.state_dict,
            dtype=torch.bfloat16 if precision is Precision.bf16 else torch.float32,
        )
    from rlhf.inference.vllm import Backend, VllmGenerator, publish

    folder = publish(model, weights or model.state_dict, parent=scratch, precision=precision)
    backend: Backend
    if config.generator.engine is Engine.vllm:
        from rlhf.inference.vllm_engine import shared_engine

        backend = shared_engine(
            folder, max_length=max_length, precision=precision, settings=config.generator
        )
    else:
        from rlhf.inference.vllm_client import ServerClient

        backend = ServerClient(config.generator, root=Path(config.paths.runs))
    return VllmGenerator(backend, folder, tokenizer, max_length=max_length, precision=precision)
