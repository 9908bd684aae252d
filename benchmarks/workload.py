"""The work that all contenders share: prompts, chats and pairs as token ids, made once.

Real text where a folder with it is given (prompts/*.jsonl, sft/*.jsonl, weekly/*.jsonl), else the
toy world. Everybody gets the same tokens, made by our chat format, and loads the same folders.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.algo.flops import ModelSize
from rlhf.algo.losses import margin_for
from rlhf.config import Model
from rlhf.cost.sizes import folder_size
from rlhf.data.chat import IGNORED, encode_conversation, encode_pair_side, encode_prompt
from rlhf.data.records import Message
from rlhf.models.loading import TOY, load_policy, load_reward_model, load_tokenizer, save_model
from rlhf.toy.world import World

CHAT_TOKENS = (30, 400)
"""Bounds of a chat and of each side of a pair, on real text."""
PROMPT_TOKENS = 200
SOURCES = {"prompts": "prompts/benign.jsonl", "chats": "sft/*.jsonl", "pairs": "weekly/*.jsonl"}


@dataclass(frozen=True, slots=True)
class Work:
    """Rows of each kind; `measured` rows are never trained on and give the losses compared."""

    prompts: list[list[Message]]
    prompt_ids: list[list[int]]
    chats: list[dict[str, Any]]
    measured_chats: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    measured_pairs: list[dict[str, Any]]
    text: str
    """Where the text comes from."""


@dataclass(frozen=True, slots=True)
class Folders:
    """What contenders load."""

    policy: str
    scorer: str
    work: str


@dataclass(frozen=True, slots=True)
class Material:
    """What all contenders work on."""

    folders: Folders
    work: Work
    size: ModelSize


def prepare(
    folder: Path, *, model: Path | None, data: Path | None, counts: Mapping[str, int]
) -> Material:
    """Write models and work below `folder`, as many rows of each kind as `counts` says."""
    path, settings = str(model or TOY), Model(max_length=2 * CHAT_TOKENS[1])
    tokenizer = load_tokenizer(path)
    policy = load_policy(path, model=settings, seed=0)
    folders = Folders(str(folder / "policy"), str(folder / "scorer"), str(folder / "work.json"))
    save_model(policy, tokenizer, Path(folders.policy))
    scorer = load_reward_model(folders.policy, model=settings, new_head=True, seed=0)
    save_model(scorer, tokenizer, Path(folders.scorer))
    work = build(tokenizer, data=data, counts=counts)
    Path(folders.work).write_text(json.dumps(asdict(work)), encoding="utf-8")
    size = folder_size(Path(folders.policy))
    assert size is not None, "what was just saved is a Llama"
    return Material(folders, work, size)


def build(tokenizer: Any, *, data: Path | None, counts: Mapping[str, int]) -> Work:
    """Choose and encode the rows."""
    source = _real(data) if data else _toy(counts)
    bounds = CHAT_TOKENS if data else (1, CHAT_TOKENS[1])
    measured = counts["measured"]
    prompts = _take(_prompts(tokenizer, source["prompts"]), counts["prompts"], "prompts")
    chats = _take(_chats(tokenizer, source["chats"], bounds), counts["chats"] + measured, "chats")
    pairs = _take(_pairs(tokenizer, source["pairs"], bounds), counts["pairs"] + measured, "pairs")
    return Work(
        prompts=[prompt for prompt, _ in prompts],
        prompt_ids=[ids for _, ids in prompts],
        chats=chats[measured:],
        measured_chats=chats[:measured],
        pairs=pairs[measured:],
        measured_pairs=pairs[:measured],
        text="real" if data else "toy world",
    )


def _prompts(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[list[Message], list[int]]]:
    for row in rows:
        ids = encode_prompt(tokenizer, row["prompt"])
        if len(ids) <= PROMPT_TOKENS:
            yield row["prompt"], ids


def _chats(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], bounds: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    low, high = bounds
    for row in rows:
        encoded = encode_conversation(tokenizer, row["messages"])
        is_labelled = any(label != IGNORED for label in encoded.labels[1:])
        if low <= len(encoded.input_ids) <= high and is_labelled:
            yield {"input_ids": encoded.input_ids, "labels": encoded.labels}


def _pairs(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], bounds: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    low, high = bounds
    for row in rows:
        sides = [
            encode_pair_side(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")
        ]
        if all(low <= len(ids) <= high for ids in sides):
            margin = margin_for(row["strength"], "small", False)
            yield {"chosen_ids": sides[0], "rejected_ids": sides[1], "margin": margin}


def _take(rows: Iterator[Any], number: int, what: str) -> list[Any]:
    found = [row for row, _ in zip(rows, range(number), strict=False)]
    if len(found) < number:
        raise SystemExit(
            f"only {len(found)} {what} fit, {number} are needed: ask for smaller sizes"
        )
    return found


def _real(data: Path) -> dict[str, list[dict[str, Any]]]:
    return {kind: _read(data, pattern) for kind, pattern in SOURCES.items()}


def _read(data: Path, pattern: str) -> list[dict[str, Any]]:
    """Read the lines of all files, in an order that depends on them alone."""
    paths = sorted(data.glob(pattern))
    if not paths:
        raise SystemExit(f"{data / pattern} does not exist: give another --data, or none")
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(pattern).shuffle(lines)
    return [json.loads(line) for line in lines]


def _toy(counts: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    world = World(0)
    extra = counts["measured"]
    pairs = world.comparison_set(counts["pairs"] + extra, axis="helpfulness", seed=0)
    third = counts["prompts"] // 3 + 1
    return {
        "prompts": [{"prompt": row.prompt} for row in world.prompt_set(third, third, third)],
        "chats": [{"messages": row.messages} for row in world.sft_set(counts["chats"] + extra)],
        "pairs": [
            {
                "prompt": row.prompt,
                "chosen": row.chosen,
                "rejected": row.rejected,
                "strength": row.strength,
            }
            for row in pairs
        ],
    }
