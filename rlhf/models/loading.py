"""Load, adapt and save models and tokenizers; set up the device.

Weights are fp32 and come from safetensors only; no code that lies beside a model is ever run.
Dropout is off everywhere: the recipe states none, and resume and PPO's ratio need a deterministic
forward pass.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from rlhf.artifacts import NodeDir, atomic_folder
from rlhf.config import Compute, Lora, Model, Precision
from rlhf.data.chat import ensure_chat
from rlhf.errors import ArtifactError, ConfigError
from rlhf.models.fused import fuse
from rlhf.models.heads import HEAD, init_head
from rlhf.models.packing import let_pack
from rlhf.toy.model import build_model, build_tokenizer

log = logging.getLogger(__name__)

TOY = "toy"
"""The path that stands for the built-in random tiny Llama."""


def setup_torch(compute: Compute) -> torch.device:
    """Fix threads and determinism for this process; returns the device to train on.

    Raises ConfigError when `cuda` is asked for and there is none.
    """
    # cuBLAS reads it when the first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(compute.num_threads)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor would make reads of unwritten memory repeatable; nothing reads that.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Its reports of new weights say less than our errors; its bars break up the log.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if compute.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device=cuda cannot work: torch sees no GPU; use auto or cpu")
    return torch.device(compute.device)


def autocast(model: Model, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of a forward pass: bf16 autocast over fp32 weights, or nothing."""
    if model.precision is Precision.bf16:
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer and give it our chat template and a pad token where they are missing."""
    if str(path) == TOY:
        return build_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(_folder(path), trust_remote_code=False)
    ensure_chat(tokenizer)
    return tokenizer


def load_policy(path: str | Path, *, model: Model, seed: int) -> PreTrainedModel:
    """Load a language model in fp32 and eval mode; `toy` builds the tiny Llama from the seed.

    Raises ArtifactError when a weight is missing, has another shape or is not in the model.
    """
    if str(path) == TOY:
        policy = build_model(seed)
        policy.set_attn_implementation(model.attention)
        fuse(policy)
        let_pack(policy)
        return policy.eval()
    policy, info = AutoModelForCausalLM.from_pretrained(
        _folder(path), config=_config(path), **_load_options(model)
    )
    tied = set(policy._tied_weights_keys or ()) if policy.config.tie_word_embeddings else set()
    _refuse_odd_weights(path, info, new=tied, unused=set())
    return _prepare(policy, load_tokenizer(path)).eval()


def load_reward_model(
    path: str | Path, *, model: Model, new_head: bool, seed: int
) -> PreTrainedModel:
    """Load a scorer: the trunk of `path` under a linear head with one output, fp32, eval mode.

    With `new_head` the path holds a language model and exactly `score.weight` is new, drawn from
    the seed. Without it the path holds a reward model and nothing may be new. Raises ArtifactError
    otherwise, naming the weights.
    """
    scorer, info = AutoModelForSequenceClassification.from_pretrained(
        _folder(path), config=_config(path, num_labels=1), **_load_options(model)
    )
    if new_head:
        if HEAD not in info["missing_keys"]:
            raise ArtifactError(
                f"{path} cannot get a new {HEAD}: it has a score head already, or its architecture "
                "names it otherwise; give the folder of a language model"
            )
        _refuse_odd_weights(path, info, new={HEAD}, unused={"lm_head.weight"})
        init_head(scorer, seed=seed)
    else:
        _refuse_odd_weights(path, info, new=set(), unused=set())
    return _prepare(scorer, load_tokenizer(path)).eval()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights, configuration, tokenizer and template; the folder appears when complete."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def save_trained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: NodeDir
) -> None:
    """Write a node's model/, once; returns when it is there for all processes."""
    if directory.processes.is_main:
        save_model(model, tokenizer, directory.model)
    directory.processes.wait("the trained model on disk")


def add_adapter(model: PreTrainedModel, lora: Lora, *, task_type: str, seed: int) -> Any:
    """Wrap a model in a trainable low-rank adapter; `task_type` is peft's CAUSAL_LM or SEQ_CLS.

    The model's own layers are replaced in place; `merge_adapter` puts plain ones back. A score head
    stays fully trainable. The adapter's start is drawn from the seed.
    """
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.target_modules,
        task_type=task_type,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, adapter)


def merge_adapter(wrapped: Any, folder: Path | None) -> None:
    """Write the adapter to `folder`, if any, and fold it into the wrapped model, in place."""
    if folder is not None:
        with atomic_folder(folder) as temporary:
            wrapped.save_pretrained(temporary)
    wrapped.merge_and_unload()


def _load_options(model: Model) -> dict[str, Any]:
    return {
        "dtype": torch.float32,
        "attn_implementation": model.attention,
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }


def _folder(path: str | Path) -> str:
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(
            f"{path} is not a model folder: it has no config.json; give a Hugging Face folder "
            f"or model.path={TOY}"
        )
    return str(path)


def _config(path: str | Path, **changes: Any) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(_folder(path), trust_remote_code=False, **changes)
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def _refuse_odd_weights(
    path: str | Path, info: dict[str, Any], *, new: set[str], unused: set[str]
) -> None:
    problems = {
        "newly initialised": set(info["missing_keys"]) - new,
        "unexpected": set(info["unexpected_keys"]) - unused,
        "of another shape": {str(entry) for entry in info["mismatched_keys"]},
    }
    for what, names in problems.items():
        if names:
            raise ArtifactError(
                f"{path} does not fit: weights {what}: {', '.join(sorted(names)[:5])}; "
                "use the folder that the earlier stage saved"
            )


def _prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Give a new token of the tokenizer a row of zeros, agree on special tokens, and fuse."""
    embeddings = model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        old = embeddings.num_embeddings
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
                layer.weight[old:] = 0.0
        log.info("%d token rows added for the tokenizer's new tokens", len(tokenizer) - old)
    fuse(model)
    let_pack(model)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model
