"""How much text a run's stages will read, from the store and the configuration.

Rows are counted in the manifests. Lengths are measured on the first SAMPLE_ROWS rows of the newest
sets of a kind, in characters, at CHARACTERS_PER_TOKEN characters a token; texts over
model.max_length leave the sample as they leave the training. What is not there yet (a toy world, a
batch that annotators have still to rate) is taken from the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.algo.flops import Lengths
from rlhf.artifacts import read_json
from rlhf.config import Config
from rlhf.data.ledger import FOLDERS, ROWS, Store
from rlhf.data.records import AXES, Kind
from rlhf.plan import Plan, node_name

CHARACTERS_PER_TOKEN = 4.0
"""Usual for English and vocabularies of 30,000 to 50,000 words; the toy world has 3.9."""
TOKENS_PER_MESSAGE = 3.0
"""What a chat template adds: role markers and EOS."""
SAMPLE_ROWS = 256
NEWEST = 3
"""Sets of a kind whose lengths are looked at."""

TOY_LENGTHS = Lengths(prompt=14.0, response=14.0)
"""Tokens of the toy world's prompts and demonstrations, before it is written."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Set:
    """Rows of one kind that stages may use, and what a mean row is like in tokens."""

    train: float
    heldout: float
    lengths: Lengths


@dataclass(frozen=True, slots=True)
class Supply:
    """All text that a run's nodes read."""

    sft: Set
    prompts: Set
    """`response` of its lengths is 0: nobody has answered yet."""
    batches: dict[str, dict[str, Set]]
    """Comparisons by batch and axis."""
    open: dict[str, Set]
    """Open comparisons by axis."""
    response_share: float
    """Mean response over the longest allowed one."""

    def answered(self, max_new_tokens: int) -> Lengths:
        """Return the lengths of a prompt and of a response sampled with this bound."""
        return Lengths(self.prompts.lengths.prompt, self.response_share * max_new_tokens)


def read_supply(config: Config, plan: Plan, run_dir: Path) -> Supply:
    """Count and measure what the plan's nodes will read."""
    store = Store(Path(config.paths.store), config.data.stream)
    measure = _Measure(config, store)
    share, _ = response_share(config, plan, run_dir)
    prompts = measure.set(Kind.prompts) or _toy_set(config, 3 * config.toy.prompts_per_kind)
    answered = Lengths(prompts.lengths.prompt, share * config.collect.max_new_tokens)
    known = set(store.ids(Kind.batch))
    lengths = measure.lengths(Kind.batch)[1] if known else answered
    return Supply(
        sft=measure.set(Kind.sft) or _toy_set(config, config.toy.sft_rows),
        prompts=prompts,
        batches={
            name: {
                axis: measure.comparisons(Kind.batch, [name], axis)
                if name in known
                else _split(config, config.collect.num_pairs, lengths)
                for axis in AXES
            }
            for item in plan.rounds
            for name in item.batches
        },
        open={axis: _open(config, measure, axis) for axis in AXES},
        response_share=share,
    )


def response_share(config: Config, plan: Plan, run_dir: Path) -> tuple[float, str]:
    """Return the mean response over evaluate's bound, and where it comes from.

    That is the run's newest evaluation if there is any.
    """
    for item in reversed(plan.rounds):
        path = run_dir / node_name(item.round, "evaluate") / "evaluation.json"
        if path.exists():
            mean = read_json(path)["response_length"]["candidate"]
            share = mean / config.evaluate.sampling.max_new_tokens
            return min(1.0, share), f"responses as long as in the evaluation of round {item.round}"
    share = config.cost.response_share
    return share, f"responses {share:.0%} as long as allowed (cost.response_share)"


class _Measure:
    """Counts and mean lengths of the store's sets; every kind is sampled once."""

    def __init__(self, config: Config, store: Store) -> None:
        self._config, self._store = config, store
        self._known: dict[Kind, tuple[float, Lengths]] = {}

    def ids(self, kind: Kind) -> list[str]:
        """Return the names of a kind's sets."""
        return self._store.ids(kind)

    def set(self, kind: Kind) -> Set | None:
        """Return all sets of a kind together; None where there is none."""
        manifests = [self._store.manifest(kind, id) for id in self._store.ids(kind)]
        if not manifests:
            return None
        rows = sum(manifest["rows"] for manifest in manifests)
        heldout = sum(manifest["counts"]["heldout"] for manifest in manifests)
        fitting, lengths = self.lengths(kind)
        return Set((rows - heldout) * fitting, heldout * fitting, lengths)

    def comparisons(self, kind: Kind, ids: Sequence[str], axis: str) -> Set:
        """Return the comparisons of an axis in some batches or open sets."""
        train = heldout = 0.0
        for id in ids:
            manifest = self._store.manifest(kind, id)
            rows = manifest["accepted_by"]["axis"].get(axis, 0)
            share = manifest["counts"]["heldout"] / max(manifest["rows"], 1)
            train, heldout = train + rows * (1 - share), heldout + rows * share
        fitting, lengths = self.lengths(kind)
        return Set(train * fitting, heldout * fitting, lengths)

    def lengths(self, kind: Kind) -> tuple[float, Lengths]:
        """Return the share of rows that fit model.max_length, and their mean tokens.

        A response of a comparison is the mean of its two sides; of a demonstration, the sum of what
        the assistant says.
        """
        if kind not in self._known:
            self._known[kind] = self._sample(kind)
        return self._known[kind]

    def _sample(self, kind: Kind) -> tuple[float, Lengths]:
        longest = self._config.model.max_length
        seen, kept = 0, []
        for id in self._store.ids(kind)[-NEWEST:]:
            path = self._store.folder / FOLDERS[kind] / id / ROWS
            for prompt, *responses in first_rows(path, kind):
                seen += 1
                if prompt + max(responses) <= longest:
                    kept.append(Lengths(prompt, sum(responses) / len(responses)))
        if not kept:
            return 0.0, Lengths(1.0, 1.0)
        mean = Lengths(
            sum(row.prompt for row in kept) / len(kept),
            sum(row.response for row in kept) / len(kept),
        )
        return len(kept) / seen, mean


def first_rows(path: Path, kind: Kind) -> list[list[float]]:
    """Return tokens of the prompt and of each response, for the first rows of a set."""
    import pyarrow.parquet as pq

    readers: dict[Kind, Callable[[Row], list[float]]] = {
        Kind.sft: _demonstration,
        Kind.prompts: lambda row: [tokens_of(row["prompt"]), 0.0],
        Kind.batch: _comparison,
        Kind.open: _comparison,
    }
    columns = {
        Kind.sft: ["messages"],
        Kind.prompts: ["prompt"],
        Kind.batch: ["prompt", "chosen", "rejected"],
        Kind.open: ["prompt", "chosen", "rejected"],
    }
    with pq.ParquetFile(path) as file:
        parts = file.iter_batches(batch_size=SAMPLE_ROWS, columns=columns[kind])
        rows = [row for part in islice(parts, 1) for row in part.to_pylist()]
    return [readers[kind](row) for row in rows]


def tokens_of(messages: Sequence[Row]) -> float:
    """Return the expected tokens of a conversation."""
    characters = sum(len(message["content"]) for message in messages)
    return characters / CHARACTERS_PER_TOKEN + TOKENS_PER_MESSAGE * len(messages)


def _demonstration(row: Row) -> list[float]:
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    answered = tokens_of(answers)
    return [tokens_of(row["messages"]) - answered, answered]


def _comparison(row: Row) -> list[float]:
    sides = [[{"content": row[side]}] for side in ("chosen", "rejected")]
    return [tokens_of(row["prompt"]), *(tokens_of(side) for side in sides)]


def _open(config: Config, measure: _Measure, axis: str) -> Set:
    ids = measure.ids(Kind.open)
    if ids:
        return measure.comparisons(Kind.open, ids, axis)
    rows = config.toy.open_rows / len(AXES) if config.toy.enabled else 0.0
    return _split(config, rows, TOY_LENGTHS)


def missing_kinds(config: Config) -> list[str]:
    """Return the kinds of sets that are not in the store yet, and count as nothing."""
    store = Store(Path(config.paths.store), config.data.stream)
    needed = {Kind.sft: not config.sft.skip, Kind.prompts: True, Kind.open: True}
    absent = [kind.name for kind in needed if needed[kind] and not store.ids(kind)]
    return [] if config.toy.enabled else absent


def _toy_set(config: Config, rows: int) -> Set:
    return _split(config, rows if config.toy.enabled else 0, TOY_LENGTHS)


def _split(config: Config, rows: float, lengths: Lengths) -> Set:
    """Return rows as ingest will split them."""
    share = config.data.heldout_share
    return Set(rows * (1 - share), rows * share, lengths)
