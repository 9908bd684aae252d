"""PPO over micro models and planted scorers, small enough for a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import micro_models as micro
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.artifacts import NodeDir
from rlhf.config import Checkpoint, Compute, Config, Optimizer, Ppo, Sampling
from rlhf.data.records import Message, Prompt
from rlhf.inference.generation import HfGenerator
from rlhf.models.actor_critic import ValueModel
from rlhf.models.loading import save_model
from rlhf.toy.model import CHAT_TEMPLATE
from rlhf.training.ppo import PpoLoop
from rlhf.training.roles import SeparateRoles

EOS = 1

# These models are too small for two threads to pay.
torch.set_num_threads(1)

TOPICS = ["the cat", "the dog eats", "is the apple red", "a fish", "bread", "the cat eats a fish"]
Score = Callable[[str], float]


def prompts(number: int = 12, *, heldout: bool = False) -> list[Prompt]:
    """Return prompts of different lengths; every third one is a safety prompt."""
    return [
        Prompt(
            id=f"{'h' if heldout else 't'}{i}",
            prompt=[{"role": "user", "content": f"{TOPICS[i % 6]} {TOPICS[(i // 6) % 6]}"}],
            is_safety=i % 3 == 0,
            source="test",
            heldout=heldout,
        )
        for i in range(number)
    ]


def planted(score: Score) -> Any:
    """Return a scorer that applies a function to each response."""

    def scorer(_prompts: Sequence[list[Message]], responses: Sequence[str]) -> Tensor:
        return torch.tensor([score(response) for response in responses], dtype=torch.float32)

    return scorer


def by_length(text: str) -> float:
    return float(len(text)) / 10


def config(*, every_steps: int | None = None, lr: float = 1e-3, **ppo: Any) -> Config:
    settings = Ppo(
        **{
            "sampling": Sampling(temperature=0.9, max_new_tokens=6, batch_size=32),
            "optimizer": Optimizer(lr=lr, lr_floor=1.0, warmup_fraction=0.0, warmup_steps_min=0),
            "iterations": 3,
            "batch_size": 8,
            "num_minibatches": 2,
            "micro_batch_size": 4,
            "critic_warmup_iterations": 0,
            "heldout_every": 2,
            "heldout_prompts": 4,
            "kl_stop": 1e9,
            **ppo,
        }
    )
    made = Config(recipe="test", ppo=settings)
    made.checkpoint = Checkpoint(every_seconds=1e9, every_steps=every_steps)
    made.compute = Compute(num_threads=1, device="cpu")
    made.model.max_length = 64
    return made


@lru_cache(maxsize=1)
def byte_tokenizer() -> Any:
    """Return a tokenizer of single bytes, for numbers that must not move with the toy's words."""
    words = ["<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
    words += sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(words[:5])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def finishing(model: Any) -> Any:
    """Give a policy a head of its own in which every fifth token or so is EOS."""
    weight = model.lm_head.weight.detach()
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()
        head.bias[EOS] = 4.2
    model.lm_head = head
    return model


def roles(
    made: Config,
    *,
    dtype: torch.dtype = torch.float32,
    helpfulness: Score = by_length,
    safety: Score = by_length,
    reference_seed: int = 0,
    finishes: bool = False,
    tokenizer: Any = None,
) -> SeparateRoles:
    policy = micro.policy(0, dtype)
    policy = finishing(policy) if finishes else policy
    tokenizer = tokenizer or micro.tokenizer()
    return SeparateRoles(
        policy=policy,
        critic=ValueModel(micro.scorer(1, dtype)),
        reference=micro.policy(reference_seed, dtype),
        start=None if reference_seed == 0 else micro.policy(0, dtype),
        scorers=(planted(helpfulness), planted(safety)),
        generator=HfGenerator(policy, tokenizer, max_length=made.model.max_length),
        tokenizer=tokenizer,
        settings=made.model,
        temperature=made.ppo.sampling.temperature,
    )


def loop(
    made: Config,
    folder: Path,
    *,
    given: SeparateRoles | None = None,
    heldout: int = 4,
    num_prompts: int = 12,
    on_step: Any = None,
    node: NodeDir | None = None,
) -> PpoLoop:
    return PpoLoop(
        given or roles(made),
        prompts=prompts(num_prompts),
        heldout=prompts(heldout, heldout=True),
        config=made,
        directory=node or NodeDir(folder, on_step=on_step),
        seed=5,
    )


def finishing_policy(
    seed: int = 0, *, eos: float = 0.9, token: int = EOS, hidden_size: int = 32
) -> Any:
    """Return a plain Llama whose every fifth token or so is EOS; the higher `eos`, the more."""
    policy = micro.policy(seed, hidden_size=hidden_size)
    settings = policy.config
    settings.tie_word_embeddings = False
    untied = LlamaForCausalLM(settings)
    with torch.no_grad():
        weights = {**policy.state_dict(), "lm_head.weight": policy.lm_head.weight.clone()}
        untied.load_state_dict(weights)
        # Dimension 0 is the same large number after every token, so that it works as a bias.
        untied.model.embed_tokens.weight[:, 0] = 3.0
        untied.lm_head.weight[:, 0] = 0.0
        untied.lm_head.weight[token, 0] = eos
    return untied.eval()


def save_finishing_policy(folder: Path, *, eos: float = 0.9, tokenizer: Any = None) -> str:
    """Save a finishing policy."""
    save_model(finishing_policy(eos=eos), tokenizer or micro.tokenizer(), folder)
    return str(folder)
