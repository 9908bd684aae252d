"""Collect: two versions answer new prompts, annotators compare the answers, a batch comes back.

The newest version and the one before it answer each prompt at two temperatures; which version gets
which temperature, and which response is shown first, is random (paper sections 3.2.1 and 3.4.1).
In round 1 both are v0. Training and held-out prompts are both collected: ingest splits them.
People receive pairs.jsonl; simulated annotators rate at once and the result is ingested.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from rlhf.artifacts import read_jsonl
from rlhf.config import Annotators, OnBadRow, Sampling
from rlhf.data.corrections import open_rows
from rlhf.data.ingest import ingest_file
from rlhf.data.ledger import Store
from rlhf.data.prompts import by_kind, keyed_digest, keyed_order
from rlhf.data.records import AXES, Comparison, Kind, Message, Prompt
from rlhf.data.similar import RepeatRules
from rlhf.inference.versions import Version, open_version
from rlhf.models.loading import setup_torch
from rlhf.nodes import NodeContext
from rlhf.toy import AnnotatorSettings, World

log = logging.getLogger(__name__)

REVISION = 1

ROLES = ("newest", "other")
MIN_SHARD = 16
"""Prompts drawn at least when only a few pairs are missing."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to compare; `skipped` says why annotators do not get them, else it is empty."""

    id: str
    axis: str
    prompt: list[Message]
    response_a: str
    response_b: str
    model_a: str
    model_b: str
    temperature_a: float
    temperature_b: float
    skipped: str

    def to_json(self) -> dict[str, Any]:
        """Return the row of pairs.jsonl."""
        row = asdict(self)
        del row["skipped"]
        return row


def run(
    context: NodeContext,
    *,
    open_version: Callable[[NodeContext, str], Version] = open_version,
) -> None:
    """Sample pairs for both axes; writes pairs.jsonl and, if simulated, the rated batch."""
    directory = context.directory
    setup_torch(context.config.compute)
    directory.resume()

    versions = _open_both(context, open_version)
    prompts = _fitting_prompts(context, versions)
    pairs: list[Pair] = []
    for axis in AXES:
        ordered = prompts_for_axis(prompts, axis=axis, seed=context.seed)
        pairs += _collect_axis(context, versions, ordered, axis=axis, num_done=len(pairs))
    directory.write_jsonl("pairs.jsonl", [pair.to_json() for pair in pairs])

    if context.config.collect.annotators is Annotators.people:
        log.info(
            "%d pairs wait for annotators in %s; ingest their verdicts with `rlhf ingest FILE "
            "ingest.stream=%s`, then `rlhf run` goes on with the next round",
            len(pairs),
            directory.path / "pairs.jsonl",
            context.config.data.stream,
        )
        return
    if directory.processes.is_main:
        directory.write_jsonl("rated.jsonl", _rate(context, pairs))
        _ingest(context, directory.path / "rated.jsonl")


def prompts_for_axis(prompts: Sequence[Prompt], *, axis: str, seed: int) -> list[Prompt]:
    """Return an axis's prompts in random order; no prompt is in both.

    Benign look-alikes go to both axes by halves. Helpfulness: ordinary ones and look-alikes.
    Safety: adversarial ones and look-alikes in turn, so that refusing as such is neither right nor
    wrong; what is left of the longer kind comes last.
    """
    kinds = by_kind(keyed_order(prompts, seed=seed))
    if axis == "helpfulness":
        return keyed_order([*kinds["ordinary"], *kinds["benign"][::2]], seed=seed)
    in_turn = chain.from_iterable(zip_longest(kinds["safety"], kinds["benign"][1::2]))
    return [prompt for prompt in in_turn if prompt is not None]


def _open_both(
    context: NodeContext, open_version: Callable[[NodeContext, str], Version]
) -> dict[str, Version]:
    """Open the two versions; the same weights are loaded once."""
    newest = open_version(context, "newest")
    models = context.inputs.models
    same = models["newest"].digest == models["other"].digest
    return {"newest": newest, "other": newest if same else open_version(context, "other")}


def _fitting_prompts(context: NodeContext, versions: dict[str, Version]) -> list[Prompt]:
    store = open_rows(context)
    sets = [store.prompts(item.id) for item in context.inputs.of_kind("prompts")]
    prompts = [prompt for rows in sets for prompt in rows]
    length = context.config.collect.max_new_tokens
    fitting = versions["newest"].fitting(prompts, max_new_tokens=length)
    if len(fitting) < len(prompts):
        log.warning("left out %d over-long prompts", len(prompts) - len(fitting))
    return fitting


def _collect_axis(
    context: NodeContext,
    versions: dict[str, Version],
    prompts: Sequence[Prompt],
    *,
    axis: str,
    num_done: int,
) -> list[Pair]:
    """Sample shard by shard until there are enough usable pairs or no more prompts.

    How many shards there are depends on what is in them, so processes share the inside of each.
    """
    config, directory = context.config.collect, context.directory
    pairs: list[Pair] = []
    skipped: list[str] = []
    position = number = 0
    while len(pairs) < config.num_pairs and position < len(prompts):
        size = min(config.shard_prompts, max(MIN_SHARD, config.num_pairs - len(pairs)))
        name = f"shards/{axis}-{number:05d}.jsonl"
        if not directory.has(name):
            shard = _sample_pairs(context, versions, prompts[position : position + size], axis)
            directory.write_jsonl(name, [asdict(pair) for pair in shard])
            directory.stop_together(f"shard {axis} {number}")
        rows = [Pair(**row) for row in read_jsonl(directory.path / name)]
        pairs += [pair for pair in rows if not pair.skipped]
        skipped += [pair.skipped for pair in rows if pair.skipped]
        position, number = position + len(rows), number + 1
        progress = num_done + min(len(pairs), config.num_pairs)
        directory.step(progress, len(AXES) * config.num_pairs)
    for reason in sorted(set(skipped)):
        log.info("%s: skipped %d pairs with %s responses", axis, skipped.count(reason), reason)
    if len(pairs) < config.num_pairs:
        log.warning(
            "%s: only %d of %d pairs, there are no further prompts (%d used); "
            "ingest more prompts or lower collect.num_pairs",
            axis,
            len(pairs),
            config.num_pairs,
            position,
        )
    return pairs[: config.num_pairs]


def _sample_pairs(
    context: NodeContext, versions: dict[str, Version], prompts: Sequence[Prompt], axis: str
) -> list[Pair]:
    """Answer each prompt with both versions at the temperatures that the key assigns."""
    swap_temperatures = [_coin(context, prompt, "temperature") for prompt in prompts]
    texts: dict[tuple[str, int], str] = {}
    temperatures: dict[tuple[str, int], float] = {}
    processes = context.directory.processes
    calls = [(role, swap) for role in ROLES for swap in (False, True)]
    own: dict[tuple[str, bool], list[str]] = {}
    for role, swap in processes.share(calls):
        chosen = [
            p for p, swapped in zip(prompts, swap_temperatures, strict=True) if swapped is swap
        ]
        own[role, swap] = _answer(
            context, versions[role], role, chosen, _temperature(context, role, swap)
        )
    for found in processes.gather(own, "answers of all processes"):
        for (role, swap), answers in found.items():
            indices = [i for i, swapped in enumerate(swap_temperatures) if swapped is swap]
            for i, text in zip(indices, answers, strict=True):
                texts[role, i] = text
                temperatures[role, i] = _temperature(context, role, swap)
    pairs = []
    for i, prompt in enumerate(prompts):
        role_a, role_b = ROLES[::-1] if _coin(context, prompt, "order") else ROLES
        pairs.append(
            Pair(
                id=f"round-{context.node.round:02d}-{axis}-{prompt.id}",
                axis=axis,
                prompt=prompt.prompt,
                response_a=texts[role_a, i],
                response_b=texts[role_b, i],
                model_a=context.inputs.models[role_a].name,
                model_b=context.inputs.models[role_b].name,
                temperature_a=temperatures[role_a, i],
                temperature_b=temperatures[role_b, i],
                skipped=_unusable(texts[role_a, i], texts[role_b, i]),
            )
        )
    return pairs


def _temperature(context: NodeContext, role: str, swap: bool) -> float:
    return context.config.collect.temperatures[ROLES.index(role) ^ swap]


def _answer(
    context: NodeContext,
    version: Version,
    role: str,
    prompts: Sequence[Prompt],
    temperature: float,
) -> list[str]:
    """Answer prompts once each, in batches of their own."""
    config = context.config.collect
    drawn = version.generate(
        [prompt.prompt for prompt in prompts],
        num_samples=1,
        sampling=Sampling(temperature, config.max_new_tokens, config.batch_size),
        keys=[f"{context.seed}/{prompt.id}/{role}" for prompt in prompts],
    )
    return [response.text for [response] in drawn]


def _coin(context: NodeContext, prompt: Prompt, purpose: str) -> bool:
    return bool(keyed_digest(f"{context.seed}/{prompt.id}/{purpose}")[0] & 1)


def _unusable(response_a: str, response_b: str) -> str:
    """Say why annotators cannot compare two responses; empty if they can."""
    if not response_a.strip() or not response_b.strip():
        return "empty"
    return "identical" if response_a.strip() == response_b.strip() else ""


def _rate(context: NodeContext, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Let the toy world's annotators compare every pair; returns rows of a batch."""
    toy = context.config.toy
    world = World(context.config.seed)
    settings = AnnotatorSettings(length_bias=toy.length_bias, shuffle=toy.shuffle_labels)
    return [
        _batch_row(
            pair,
            world.rate(
                pair.prompt,
                pair.response_a,
                pair.response_b,
                axis=pair.axis,
                id=pair.id,
                seed=context.seed,
                settings=settings,
            ),
        )
        for pair in pairs
    ]


def _batch_row(pair: Pair, rated: Comparison) -> dict[str, Any]:
    """Return a comparison as vendors deliver it: without the fields that ingest fills in."""
    models = (pair.model_a, pair.model_b)
    temperatures = (pair.temperature_a, pair.temperature_b)
    order = 1 if rated.chosen == pair.response_a else -1
    row = rated.to_json()
    for field in ("batch_id", "heldout", "repeat_prompt"):
        del row[field]
    row["model_chosen"], row["model_rejected"] = models[::order]
    temperature_chosen, temperature_rejected = temperatures[::order]
    row["meta"] = {
        "temperature_chosen": temperature_chosen,
        "temperature_rejected": temperature_rejected,
    }
    return row


def _ingest(context: NodeContext, rated: Path) -> None:
    """Add the rated pairs to the run's stream as this round's batch; a repeat changes nothing."""
    config = context.config
    store = Store(Path(config.paths.store), config.data.stream)
    batch_id = f"round-{context.node.round:02d}"
    report = ingest_file(
        rated,
        store,
        kind=Kind.batch,
        id=batch_id,
        on_bad_row=OnBadRow.quarantine,
        heldout_share=config.data.heldout_share,
        heldout_salt=config.data.heldout_salt,
        max_chars=config.ingest.max_chars,
        repeats=RepeatRules.of(config.ingest),
    )
    manifest = store.manifest(Kind.batch, report.id)
    log.info("batch %s holds %d comparisons", report.id, manifest["rows"])
    batch = {
        "stream": config.data.stream,
        "id": report.id,
        "digest": manifest["digest"],
        "rows": manifest["rows"],
    }
    context.directory.write_json("batch.json", batch)
