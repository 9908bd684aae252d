"""Models, rows and settings that are small enough to train in a test."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhf.artifacts import JsonlLog, NodeDir, read_jsonl
from rlhf.config import Checkpoint, Compute, Config, Optimizer
from rlhf.data.chat import Encoded
from rlhf.models.heads import init_head
from rlhf.models.packing import let_pack
from rlhf.toy.model import build_tokenizer
from rlhf.training.reward import RankedPair, train_ranking
from rlhf.training.sft import fine_tune

PAD, EOS = 0, 1
VOCAB_SIZE = 687
"""Above every token of the toy tokenizer and of the random rows below."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
}
ARCHITECTURES: list[PreTrainedConfig] = [
    LlamaConfig(**SIZES),
    MistralConfig(**SIZES, sliding_window=None),
    MistralConfig(**SIZES, sliding_window=6),
    Qwen2Config(**SIZES),
    Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    Qwen3Config(**SIZES),
]
"""One of each causal architecture that has a fast path here, with and without a sliding window."""


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return build_tokenizer()


def policy(seed: int = 0, dtype: torch.dtype = torch.float32, *, hidden_size: int = 32) -> Any:
    """Build a model of fixed sizes: a change of the toy world must not move a test's numbers."""
    sizes = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=PAD,
        eos_token_id=EOS,
        attention_dropout=0.0,
        initializer_range=0.08,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(sizes).to(dtype).eval()
    let_pack(model)
    return model


def scorer(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    return scorer_over(policy(seed), seed=seed).to(dtype)


def scorer_over(source: Any, *, seed: int) -> Any:
    """Put a score head drawn from the seed on a copy of a policy's trunk."""
    source.config.num_labels = 1
    model = LlamaForSequenceClassification(source.config)
    model.model.load_state_dict(source.model.state_dict())
    init_head(model, seed=seed)
    let_pack(model)
    return model.eval()


def config(**checkpoint: Any) -> Config:
    made = Config(recipe="test", checkpoint=Checkpoint(**{"every_seconds": 1e9, **checkpoint}))
    made.compute = Compute(num_threads=1, device="cpu")
    return made


def token_lists(number: int, *, seed: int = 0, low: int = 5, high: int = 20) -> list[list[int]]:
    """Return random token lists of different lengths, each ending in EOS."""
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for _ in range(number):
        length = int(torch.randint(low, high, (1,), generator=generator))
        lists.append([*torch.randint(5, 600, (length,), generator=generator).tolist(), EOS])
    return lists


def conversations(number: int, *, seed: int = 0) -> list[Encoded]:
    """Return rows whose first tokens carry no label."""
    lists = token_lists(number, seed=seed)
    return [Encoded(ids, [-100] * (1 + i % 4) + ids[1 + i % 4 :]) for i, ids in enumerate(lists)]


def pairs(number: int, *, seed: int = 0) -> list[RankedPair]:
    """Return pairs with all margins and all kinds of safety labels."""
    lists = token_lists(2 * number, seed=seed)
    labels = [(True, False), (None, None), (False, None), (True, True), (None, False)]
    return [
        RankedPair(lists[2 * i], lists[2 * i + 1], (i % 4) / 3, *labels[i % 5])
        for i in range(number)
    ]


def train_sft(model: Any, rows: list[Encoded], folder: Path, **changes: Any) -> NodeDir:
    """Fine-tune with small defaults; `directory` and `config` can be replaced."""
    directory = changes.pop("directory", None) or NodeDir(folder)
    settings = {
        "optimizer": Optimizer(lr=1e-3),
        "epochs": 1,
        "batch_size": 8,
        "micro_batch_size": 4,
        "config": config(),
        "seed": 0,
        **changes,
    }
    fine_tune(model, tokenizer(), rows, directory=directory, **settings)
    return directory


def train_reward(model: Any, rows: list[RankedPair], folder: Path, **changes: Any) -> NodeDir:
    """Train a scorer with small defaults; `directory` and `config` can be replaced."""
    directory = changes.pop("directory", None) or NodeDir(folder)
    settings = {
        "optimizer": Optimizer(lr=1e-3),
        "epochs": 1,
        "batch_size": 8,
        "micro_batch_size": 4,
        "safety_loss_weight": 1.0,
        "config": config(),
        "seed": 0,
        **changes,
    }
    train_ranking(model, tokenizer(), rows, directory=directory, **settings)
    return directory


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def rows_without_time(log: JsonlLog) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_jsonl(log.path)
    ]
