"""Stands in for the package vllm: the same calls, decoded row by row with transformers."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM


@dataclass
class SamplingParams:
    """Takes what the engine gives; anything else is a TypeError."""

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    seed: int
    ignore_eos: bool
    stop_token_ids: list[int]
    logit_bias: dict[int, float]
    detokenize: bool


@dataclass
class LLM:
    """Loads a folder, samples, and reloads by the name of the method, as vLLM's workers do."""

    made: ClassVar[list[LLM]] = []

    model: str
    skip_tokenizer_init: bool
    dtype: str
    max_model_len: int
    load_format: str
    trust_remote_code: bool
    generation_config: str
    seed: int
    disable_log_stats: bool
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    enforce_eager: bool = False
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._read(self.model)
        core = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))
        self.llm_engine = SimpleNamespace(engine_core=core)
        LLM.made.append(self)

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(f"{method} {Path(kwargs['weights_path']).name}")
        self._read(kwargs["weights_path"])

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def generate(
        self, prompts: list[dict[str, list[int]]], params: list[SamplingParams], *, use_tqdm: bool
    ) -> list[Any]:
        self.calls.append(f"generate {len(prompts)}")
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=self._decode(prompt["prompt_token_ids"], how))]
            )
            for prompt, how in zip(prompts, params, strict=True)
        ]

    def _read(self, folder: str) -> None:
        dtype = getattr(torch, self.dtype)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.no_grad()
    def _decode(self, prompt: list[int], how: SamplingParams) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(how.seed)
        row = list(prompt)
        while len(row) < len(prompt) + how.max_tokens:
            logits = self._model(input_ids=torch.tensor([row])).logits[0, -1].float()
            for token, bias in how.logit_bias.items():
                logits[token] += bias
            chances = (logits / how.temperature).softmax(-1)
            row.append(int(chances.multinomial(1, generator=generator)))
            if row[-1] in how.stop_token_ids:
                break
        return tuple(row[len(prompt) :])


def install(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """Put the stand-in where `import vllm` finds it; returns its class, with no engine made."""
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("rlhf.inference.vllm_engine._ENGINES", {})
    LLM.made.clear()
    return LLM
