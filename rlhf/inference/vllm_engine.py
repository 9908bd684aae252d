"""A vLLM engine in a process of its own: started from a folder, holding one set of weights.

vLLM is imported here and late: it is optional, and its import takes as long as all the others.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.artifacts import digest_json, read_json
from rlhf.config import GeneratorSettings, Precision
from rlhf.errors import ArtifactError, ConfigError
from rlhf.inference.vllm import DTYPES, Batch

log = logging.getLogger(__name__)

INSTALL = (
    "pip install 'rlhf[vllm]'; beside a torch without CUDA, then also "
    "pip uninstall torchvision torchaudio torchcodec"
)
ENVIRONMENT = {
    # The trainer has threads, which a fork would not survive.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Other nodes compute on the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
GUARD = "import os, sys; sys.stdin.read(); [os.kill(int(pid), 9) for pid in sys.argv[1:]]"
"""Waits for the end of a pipe, which the kernel brings however the other side ends."""
VOLATILE = ("_name_or_path", "dtype", "transformers_version")
"""Entries of config.json that do not say which architecture it is."""


class Engine:
    """Samples with the weights that a call names, loading them first if others are loaded."""

    def __init__(
        self, folder: Path, *, max_length: int, precision: Precision, settings: GeneratorSettings
    ) -> None:
        self.architecture = architecture(folder)
        vllm = _import_vllm()
        self._params = vllm.SamplingParams
        before = set(multiprocessing.active_children())
        self._llm: Any = vllm.LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype=str(DTYPES[precision]).removeprefix("torch."),
            max_model_len=max_length,
            load_format="safetensors",
            trust_remote_code=False,
            # Sampling follows our settings alone, not what lies beside the weights.
            generation_config="vllm",
            seed=0,
            disable_log_stats=True,
            **_memory(settings),
        )
        self._loaded: Path | None = folder
        self._lock = threading.Lock()
        started = set(multiprocessing.active_children()) - before
        self.close = weakref.finalize(
            self, _stop, self._llm, guard([child.pid for child in started if child.pid])
        )

    def load(self, weights: Path) -> None:
        """Answer with the weights of this folder from now on; ConfigError for another model."""
        with self._lock:
            self._load(weights)

    def sample(self, weights: Path, batch: Batch) -> list[list[int]]:
        """Return a response for each prompt of the batch, sampled with exactly these weights."""
        with self._lock:
            self._load(weights)
            # A prefix that an earlier call left would change batch shapes, and so the last digits.
            self._llm.reset_prefix_cache()
            outputs = self._llm.generate(
                [{"prompt_token_ids": ids} for ids in batch.prompts],
                [self._params(**sampling_parameters(batch, seed)) for seed in batch.seeds],
                use_tqdm=False,
            )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _load(self, weights: Path) -> None:
        if weights == self._loaded:
            return
        if not any(weights.glob("*.safetensors")):
            raise ArtifactError(f"{weights} holds no safetensors; is it the folder of a model?")
        # vLLM keeps the old value of a weight that a folder lacks, and only warns.
        if architecture(weights) != self.architecture:
            raise ConfigError(
                f"{weights} holds another architecture or vocabulary than the model that vLLM was "
                "started with: start vLLM with a model of this run"
            )
        self._loaded = None
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})
        self._loaded = weights


def sampling_parameters(batch: Batch, seed: int) -> dict[str, Any]:
    """Return what vLLM is told about one response: softmax(logits / temperature) without pad."""
    return {
        "temperature": batch.temperature,
        # vLLM's word for the whole vocabulary is 0.
        "top_k": batch.top_k or 0,
        "top_p": batch.top_p,
        "max_tokens": batch.max_new_tokens,
        "seed": seed,
        # Only the tokenizer's EOS ends a response, whatever a model's files list besides.
        "ignore_eos": True,
        "stop_token_ids": [batch.eos_id],
        "logit_bias": {batch.pad_id: -torch.inf},
        "detokenize": False,
    }


def architecture(folder: Path) -> str:
    """Return a digest of what must be equal for one engine to serve two folders."""
    config = read_json(folder / "config.json")
    return digest_json({name: value for name, value in config.items() if name not in VOLATILE})


_ENGINES: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()


def shared_engine(
    folder: Path, *, max_length: int, precision: Precision, settings: GeneratorSettings
) -> Engine:
    """Return this process's engine for the folder's architecture; it ends with its last user.

    Two versions that answer in turn share an engine: memory holds no two.
    """
    key = f"{architecture(folder)}/{max_length}/{precision.name}"
    engine = _ENGINES.get(key)
    if engine is None:
        engine = Engine(folder, max_length=max_length, precision=precision, settings=settings)
        _ENGINES[key] = engine
    return engine


def _import_vllm() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm

        # The names are looked up late, so that a broken installation shows only here.
        _ = vllm.LLM, vllm.SamplingParams
    except (ImportError, OSError) as error:
        raise ConfigError(f"vLLM cannot be imported ({error}): {INSTALL}") from error
    return vllm


def _memory(settings: GeneratorSettings) -> dict[str, Any]:
    if torch.cuda.is_available():
        return {"gpu_memory_utilization": settings.gpu_memory_utilization}
    # Without a GPU vLLM would take a share of all memory, and compile for minutes.
    size = int(settings.cpu_kv_cache_gib * 2**30)
    return {"kv_cache_memory_bytes": size, "enforce_eager": True}


def guard(pids: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start what kills these processes when this one is gone, even after kill -9.

    vLLM's engine would stay and hold the device; its own workers do end with it.
    """
    command = [sys.executable, "-S", "-E", "-c", GUARD, *map(str, pids)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _stop(llm: Any, guarding: subprocess.Popen[bytes]) -> None:
    # First, so that it never meets a number that has become another process's.
    guarding.kill()
    guarding.communicate()
    llm.llm_engine.engine_core.shutdown()
