"""What vLLM is told, and what is refused before it is asked."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fake_vllm
import micro_models as micro
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config import GeneratorSettings, Precision
from rlhf.errors import ArtifactError, ConfigError
from rlhf.inference.vllm import Batch, publish
from rlhf.inference.vllm_engine import (
    Engine,
    _stop,
    guard,
    sampling_parameters,
    shared_engine,
)

BATCH = Batch(
    [[5, 6]],
    seeds=[7],
    temperature=0.7,
    top_k=None,
    top_p=1.0,
    max_new_tokens=3,
    eos_id=1,
    pad_id=0,
)


def folder(parent: Path, seed: int = 0) -> Path:
    model = micro.policy(seed)
    return publish(model, model.state_dict, parent=parent, precision=Precision.fp32)


def engine(path: Path, **settings: float) -> Engine:
    return Engine(
        path, max_length=32, precision=Precision.bf16, settings=GeneratorSettings(**settings)
    )


def test_sampling_is_softmax_over_everything_but_pad() -> None:
    assert sampling_parameters(BATCH, 7) == {
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
        "max_tokens": 3,
        "seed": 7,
        "ignore_eos": True,
        "stop_token_ids": [1],
        "logit_bias": {0: -torch.inf},
        "detokenize": False,
    }


def test_vllm_gets_tokens_weights_and_no_other_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = fake_vllm.install(monkeypatch).made
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = folder(tmp_path)
    engine(path, cpu_kv_cache_gib=0.5)
    llm = made[0]
    assert (llm.model, llm.dtype, llm.max_model_len) == (str(path), "bfloat16", 32)
    assert (llm.skip_tokenizer_init, llm.trust_remote_code) == (True, False)
    assert (llm.load_format, llm.generation_config) == ("safetensors", "vllm")
    assert (llm.kv_cache_memory_bytes, llm.gpu_memory_utilization) == (2**29, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine(path, gpu_memory_utilization=0.3)
    assert (made[1].kv_cache_memory_bytes, made[1].gpu_memory_utilization) == (None, 0.3)


def test_other_weights_are_loaded_before_sampling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_vllm.install(monkeypatch)
    one, two = folder(tmp_path), folder(tmp_path, seed=1)
    found = engine(one)
    calls = fake_vllm.LLM.made[0].calls
    found.sample(two, BATCH)
    found.sample(two, BATCH)
    found.load(one)
    sample = ["reset_prefix_cache", "generate 1"]
    reload = "reload_weights"
    assert calls == [f"{reload} {two.name}", *sample, *sample, f"{reload} {one.name}"]


def test_weights_that_failed_to_load_are_not_taken_for_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_vllm.install(monkeypatch)
    one, two = folder(tmp_path), folder(tmp_path, seed=1)
    found = engine(one)
    llm = fake_vllm.LLM.made[0]
    (two / "model.safetensors").write_bytes(b"")
    with pytest.raises(Exception, match="header"):
        found.load(two)
    found.load(one)
    assert llm.calls[-1] == f"reload_weights {one.name}"


def test_another_architecture_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_vllm.install(monkeypatch)
    found = engine(folder(tmp_path))
    config = LlamaConfig(**{**micro.policy().config.to_dict(), "num_hidden_layers": 1})
    smaller = LlamaForCausalLM(config)
    path = publish(smaller, smaller.state_dict, parent=tmp_path, precision=Precision.fp32)
    with pytest.raises(ConfigError, match="another architecture"):
        found.load(path)
    assert fake_vllm.LLM.made[0].calls == []


def test_a_folder_without_safetensors_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_vllm.install(monkeypatch)
    found = engine(folder(tmp_path))
    other = folder(tmp_path, seed=1)
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="no safetensors"):
        found.load(other)


def test_an_engine_ends_with_its_last_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_vllm.install(monkeypatch)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    path = folder(tmp_path)
    options = {"max_length": 32, "precision": Precision.fp32, "settings": GeneratorSettings()}
    one = shared_engine(path, **options)
    two = shared_engine(path, **options)
    assert one is two
    calls = fake_vllm.LLM.made[-1].calls
    del one
    gc.collect()
    assert "shutdown" not in calls
    del two
    gc.collect()
    assert calls == ["shutdown"]


def test_an_engine_does_not_outlive_its_process() -> None:
    processes = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    guarding = guard([process.pid for process in processes])
    time.sleep(0.2)
    assert [process.poll() for process in processes] == [None, None]
    # What the kernel does when this process ends.
    guarding.communicate(timeout=60)
    assert [process.wait(timeout=60) for process in processes] == [-9, -9]


def test_an_engine_that_is_stopped_ends_by_itself() -> None:
    stopped = []
    with subprocess.Popen(["sleep", "60"]) as process:

        def shutdown() -> None:
            # Long enough for a signal that was sent to arrive.
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=2)
            stopped.append(process.pid)

        core = SimpleNamespace(shutdown=shutdown)
        _stop(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core)), guard([process.pid]))
        process.kill()
    assert stopped


def test_a_missing_or_broken_vllm_is_one_clear_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf\[vllm\]'"):
        engine(folder(tmp_path))
