"""What each stage does with which models and how much text: one function per stage.

A function returns tasks in the stage's order. Rows that a stage leaves out for reasons only it can
see (responses that repeat, prompts without a finished sample) are counted all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rlhf.algo import flops
from rlhf.algo.flops import Lengths, Work
from rlhf.config import Config, JudgeData, Reference, Sampling
from rlhf.cost.tokens import Set, Supply
from rlhf.data.mixture import mixture_sizes
from rlhf.data.records import AXES
from rlhf.nodes import Node
from rlhf.plan import Plan

BASE = "base"
SIDES = 2
"""Responses of a comparison, and versions of an evaluation."""
CANDIDATE_AND_PROMOTED = 2


@dataclass(frozen=True, slots=True)
class Task:
    """Work of one model: the base model's size, or that of a given reward model."""

    model: str
    """`base`, or the axis of a reward model given by `reward.path`."""
    work: Work


@dataclass(frozen=True, slots=True)
class Context:
    """What a stage's work follows from."""

    config: Config
    plan: Plan
    node: Node
    supply: Supply

    @property
    def factor(self) -> int:
        """Return the cost of training over a forward pass."""
        is_adapter = self.config.model.lora.enabled
        return flops.ADAPTER_FACTOR if is_adapter else flops.TRAIN_FACTOR

    def comparisons(self, axis: str, *, newest_only: bool = False) -> list[Set]:
        """Return an axis's batches up to the node's round, or of it."""
        rounds = [item for item in self.plan.rounds if item.round <= self.node.round]
        chosen = rounds[-1:] if newest_only else rounds
        return [self.supply.batches[name][axis] for item in chosen for name in item.batches]


def tasks(context: Context) -> list[Task]:
    """Return the work of a node."""
    return STAGES[context.node.stage](context)


def _sft(context: Context) -> list[Task]:
    config, data = context.config.sft, context.supply.sft
    rows = data.train if config.max_rows is None else min(data.train, config.max_rows)
    return [_fine_tune(context, rows, data.lengths, epochs=config.epochs)]


def _fine_tune(context: Context, rows: float, lengths: Lengths, *, epochs: int) -> Task:
    return Task(BASE, flops.fine_tune(rows, lengths, epochs=epochs, factor=context.factor))


def _reward(context: Context) -> list[Task]:
    """Train on the mixture; score new batches before and held-out comparisons after."""
    config, axis = context.config, str(context.node.options["axis"])
    is_judge = context.node.options["role"] == "judge"
    own = context.comparisons(axis)
    rows = _judge_rows(context, axis) if is_judge else _mixture_rows(context, axis)
    lengths = own[-1].lengths if own else context.supply.open[axis].lengths
    found = [
        Task(
            BASE,
            flops.rank(rows, lengths, epochs=config.reward.epochs, factor=context.factor),
        )
    ]
    cap = config.reward.max_heldout
    axes = (axis,) if is_judge else AXES
    heldout = sum(_capped(data.heldout, cap) for name in axes for data in context.comparisons(name))
    passes = 1 if is_judge else 2
    scored = passes * heldout
    if "previous" in context.node.inputs and not is_judge:
        newest = context.comparisons(axis, newest_only=True)
        scored += sum(_capped(data.train + data.heldout, cap) for data in newest)
    return [*found, Task(BASE, flops.score(SIDES * scored, lengths))]


def _capped(rows: float, cap: int | None) -> float:
    return rows if cap is None else min(rows, cap)


def _mixture_rows(context: Context, axis: str) -> float:
    config, supply = context.config, context.supply
    share_open, share_batches = _shares_left(config)
    own = share_batches * sum(data.train for data in context.comparisons(axis))
    others = [name for name in AXES if name != axis]
    other = share_batches * sum(data.train for name in others for data in context.comparisons(name))
    open_rows = {name: share_open * data.train for name, data in supply.open.items()}
    own_share = config.reward.own_share_helpfulness
    if axis == "safety":
        own, own_share = own + open_rows.pop("safety"), config.reward.own_share_safety
    sizes = mixture_sizes(
        round(own),
        round(other + sum(open_rows.values())),
        own_share=own_share,
        max_comparisons=config.reward.max_comparisons,
    )
    return sum(sizes)


def _judge_rows(context: Context, axis: str) -> float:
    config = context.config
    if config.judge.data is JudgeData.open:
        rows = context.supply.open[axis].train
    else:
        rows = sum(data.train for data in context.comparisons(axis))
    return _capped(config.judge.share * rows, config.judge.max_comparisons)


def _shares_left(config: Config) -> tuple[float, float]:
    """Return the shares of open and of batch comparisons that the judges leave."""
    share = 1.0 - config.judge.share
    return (share, 1.0) if config.judge.data is JudgeData.open else (share, share)


def _sampled(context: Context, *, prompts: float, sampling: Sampling) -> list[Task]:
    lengths = context.supply.answered(sampling.max_new_tokens)
    sample, *scores = flops.best_of(
        prompts, lengths, num_samples=context.config.rejection.num_samples
    )
    tasks = [Task(axis, work) for axis, work in zip(AXES, scores, strict=True)]
    return [Task(BASE, sample), *tasks]


def _rejection_prompts(context: Context) -> float:
    return _capped(context.supply.prompts.train, context.config.rejection.num_prompts)


def _sample(context: Context) -> list[Task]:
    """Sample and score one job's part of the prompts."""
    prompts = _rejection_prompts(context) / int(context.node.options["of"])
    return _sampled(context, prompts=prompts, sampling=context.config.rejection.sampling)


def _rejection(context: Context) -> list[Task]:
    """Sample and score, unless sample nodes did; fine-tune on winners, pool and demonstrations."""
    settings = context.config.rejection
    prompts = _rejection_prompts(context)
    is_sampled = any(role.startswith("sampled_") for role in context.node.inputs)
    found = [] if is_sampled else _sampled(context, prompts=prompts, sampling=settings.sampling)
    per_share = prompts / (1.0 - settings.pool_share - settings.sft_share)
    earlier = sum(role.startswith("pool_") for role in context.node.inputs)
    pool = min(per_share * settings.pool_share, earlier * prompts)
    rows = prompts + pool + per_share * settings.sft_share
    lengths = context.supply.answered(settings.sampling.max_new_tokens)
    return [*found, _fine_tune(context, rows, lengths, epochs=settings.epochs)]


def _sweep(context: Context) -> list[Task]:
    """Sample and score the sweep's prompts once per temperature."""
    settings = context.config.rejection
    temperatures: list[float] = getattr(settings, "temperatures", [])
    prompts = min(_rejection_prompts(context), getattr(settings, "sweep_prompts", 0))
    once = _sampled(context, prompts=prompts, sampling=settings.sampling)
    return [task for _ in temperatures for task in once]


def _ppo(context: Context) -> list[Task]:
    settings = context.config.ppo
    lengths = context.supply.answered(settings.sampling.max_new_tokens)
    has_start = settings.reference is Reference.sft and context.node.round > 1
    warmup = min(settings.critic_warmup_iterations, settings.iterations)
    works: list[Work] = []
    for number, trains_policy in ((warmup, False), (settings.iterations - warmup, True)):
        works += flops.ppo_iteration(
            number * settings.batch_size,
            lengths,
            epochs=settings.num_ppo_epochs,
            factor=context.factor,
            trains_policy=trains_policy,
            has_start=has_start,
        )
    heldout = min(settings.heldout_prompts, context.supply.prompts.heldout)
    scorings = 1 + settings.iterations // settings.heldout_every
    reads = flops.log_probabilities(scorings * heldout, lengths)
    works += flops.rollout(scorings * heldout, lengths)
    works += [reads] * (3 if has_start else 2)
    works.append(flops.score(scorings * heldout, lengths))
    return [Task(BASE, work) for work in works]


def _evaluate(context: Context) -> list[Task]:
    """Two versions answer and rate; four models score them, judges every earlier version too."""
    settings = context.config.evaluate
    lengths = context.supply.answered(settings.sampling.max_new_tokens)
    prompts = min(settings.num_prompts, context.supply.prompts.heldout)
    answers = CANDIDATE_AND_PROMOTED * prompts
    versions = context.node.round + 1
    rates = flops.log_probabilities(answers, lengths)
    scores = flops.score(answers, lengths)
    return [
        Task(BASE, flops.sample(answers, lengths)),
        # The whole sequence's logits are computed here.
        Task(BASE, Work(rates.kind, rates.tokens, rates.tokens, rates.context)),
        *(Task(axis, scores) for axis in AXES),
        Task(BASE, flops.score(len(AXES) * (answers + versions * prompts), lengths)),
    ]


def _collect(context: Context) -> list[Task]:
    settings = context.config.collect
    lengths = context.supply.answered(settings.max_new_tokens)
    pairs = len(AXES) * settings.num_pairs
    available = context.supply.prompts.train + context.supply.prompts.heldout
    return [Task(BASE, flops.sample(SIDES * min(pairs, available), lengths))]


STAGES: Mapping[str, Callable[[Context], list[Task]]] = {
    "sft": _sft,
    "reward": _reward,
    "sample": _sample,
    "rejection": _rejection,
    "sweep": _sweep,
    "ppo": _ppo,
    "evaluate": _evaluate,
    "collect": _collect,
}
