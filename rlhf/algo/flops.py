"""FLOP counts of the recipe's stages, from model size and tokens.

One multiplication and one addition per weight and token: a forward pass costs 2 N, the backward
pass twice that, so training costs 6 N per token (Kaplan et al. 2020, section 2.1). N counts the
weights that a token is multiplied with: the trunk, without the input embedding, which is a look-up,
plus the output head at the positions whose logits are computed. Attention adds

    4 x layers x attention width x context       per token and forward pass,

for Q K^T and its product with V, counted in full (kernels that skip the masked half do less).
Norms, softmax, optimizer steps and recomputed activations are left out, as they are in the usual
definition of utilisation (model FLOPs over peak; Chowdhery et al. 2022, appendix B).

With five models of one size N, no attention and all logits, a PPO iteration over T tokens of
prompts and responses costs 24 N T: sampling 2, log-probabilities 2, reference 2, two reward models
4, values 2, training the policy 6 and the critic 6.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

TRAIN_FACTOR = 3
"""Forward and backward over forward: gradients of activations and of weights."""
ADAPTER_FACTOR = 2
"""The same with frozen weights, as in LoRA: gradients of activations only."""


class Pass(Enum):
    """What a model does with tokens; each reaches another share of a device's peak."""

    generate = auto()
    """Token by token: mostly waiting for memory."""
    forward = auto()
    """Whole sequences without gradient."""
    train = auto()
    """Whole sequences with gradient."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Weights of a language model, by what they cost."""

    trunk: int
    """Weights of all layers: everything but embedding and output head."""
    head: int
    """Weights of the output head, vocabulary x hidden size; tied weights stand here."""
    embedding: int
    """Weights of the input embedding; 0 where they are tied to the head."""
    num_layers: int
    attention_width: int
    """Heads x head size."""

    @property
    def parameters(self) -> int:
        """Return the number of parameters as models are named by it, embedding included."""
        return self.trunk + self.head + self.embedding


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens that a model reads or writes in one kind of pass, over a whole node."""

    kind: Pass
    tokens: float
    """Tokens that go through the trunk."""
    logits: float
    """Positions whose logits over the vocabulary are computed; a scorer computes none."""
    context: float
    """Mean number of positions that a token attends to."""
    factor: int = 1
    """Cost over a forward pass: TRAIN_FACTOR or ADAPTER_FACTOR in training."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of a prompt and of a response."""

    prompt: float
    response: float

    @property
    def whole(self) -> float:
        """Return the tokens of prompt and response."""
        return self.prompt + self.response


def llama_size(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    vocab_size: int,
    is_tied: bool,
) -> ModelSize:
    """Return the size of a Llama: grouped-query attention, gated feed-forward, RMS norms.

    Per layer: Q and O h x w each, K and V h x (kv heads x head size) each, three h x f matrices and
    two norms; one norm at the end. Norm weights count as weights although they cost next to
    nothing.
    """
    width, kv_width = num_heads * head_size, num_kv_heads * head_size
    layer = 2 * hidden_size * width + 2 * hidden_size * kv_width
    layer += 3 * hidden_size * intermediate_size + 2 * hidden_size
    return ModelSize(
        trunk=num_layers * layer + hidden_size,
        head=vocab_size * hidden_size,
        embedding=0 if is_tied else vocab_size * hidden_size,
        num_layers=num_layers,
        attention_width=width,
    )


def work_flops(size: ModelSize, work: Work) -> float:
    """Return the FLOPs of a piece of work, by the formulas at the top."""
    weights = 2 * (size.trunk * work.tokens + size.head * work.logits)
    attention = 4 * size.num_layers * size.attention_width * work.tokens * work.context
    return work.factor * (weights + attention)


def total_flops(size: ModelSize, works: Iterable[Work]) -> float:
    """Return the FLOPs of all pieces of work by models of one size."""
    return sum(work_flops(size, work) for work in works)


def sample(prompts: float, lengths: Lengths, *, num_samples: float = 1) -> Work:
    """Return the work of writing responses: each prompt is read once, however many it gets.

    The last token is written without being read again, and the prompt's last position gives the
    first token: logits and response tokens are equally many. A token attends to what is before it.
    """
    written = num_samples * lengths.response
    tokens = lengths.prompt + written
    attended = lengths.prompt**2 + written * (lengths.prompt + lengths.response / 2)
    return Work(Pass.generate, prompts * tokens, prompts * written, attended / tokens)


def score(responses: float, lengths: Lengths) -> Work:
    """Return the work of one reward model on prompts with responses."""
    return Work(Pass.forward, responses * lengths.whole, 0.0, lengths.whole)


def log_probabilities(responses: float, lengths: Lengths) -> Work:
    """Return the work of one language model that rates responses, logits at their tokens only."""
    logits = responses * lengths.response
    return Work(Pass.forward, responses * lengths.whole, logits, lengths.whole)


def fine_tune(rows: float, lengths: Lengths, *, epochs: int, factor: int) -> Work:
    """Return the work of training on rows; logits are computed at the labelled tokens only."""
    tokens, logits = rows * epochs * lengths.whole, rows * epochs * lengths.response
    return Work(Pass.train, tokens, logits, lengths.whole, factor)


def rank(comparisons: float, lengths: Lengths, *, epochs: int, factor: int) -> Work:
    """Return the work of training a reward model: both sides of every comparison."""
    tokens = 2 * comparisons * epochs * lengths.whole
    return Work(Pass.train, tokens, 0.0, lengths.whole, factor)


def ppo_iteration(
    rollouts: float,
    lengths: Lengths,
    *,
    epochs: int,
    factor: int,
    trains_policy: bool = True,
    has_start: bool = False,
) -> list[Work]:
    """Return the work of one PPO iteration: roll out, score twice, measure, train two models.

    `has_start` adds the round's starting policy where it is not the reference. In the critic's
    warm-up the policy is not trained.
    """
    reads = log_probabilities(rollouts, lengths)
    reads_value = score(rollouts, lengths)
    measured = [*rollout(rollouts, lengths), reads, reads, reads_value]
    if has_start:
        measured.append(reads)
    trains = [Work(Pass.train, reads.tokens * epochs, 0.0, reads.context, factor)]
    if trains_policy:
        logits = reads.logits * epochs
        trains.append(Work(Pass.train, reads.tokens * epochs, logits, reads.context, factor))
    return [*measured, *trains]


def rollout(rollouts: float, lengths: Lengths) -> list[Work]:
    """Return the work of sampling one response per prompt and scoring it with two models."""
    scores = score(rollouts, lengths)
    return [sample(rollouts, lengths), scores, scores]


def best_of(prompts: float, lengths: Lengths, *, num_samples: int) -> list[Work]:
    """Return the work of K responses per prompt, each scored by two reward models."""
    scores = score(prompts * num_samples, lengths)
    return [sample(prompts, lengths, num_samples=num_samples), scores, scores]


def expected_seconds(
    flops: Sequence[tuple[Pass, float]],
    *,
    peak: float,
    training_utilisation: float,
    generation_utilisation: float,
) -> float:
    """Return device-seconds at a peak in FLOP/s: FLOPs over peak times the utilisation of each."""
    shares = {
        Pass.generate: generation_utilisation,
        Pass.forward: training_utilisation,
        Pass.train: training_utilisation,
    }
    return sum(value / (peak * shares[kind]) for kind, value in flops)
