"""Supervised fine-tuning: the base model and demonstrations become v0 (paper section 3.1).

Deviations: sequences are not packed; rows of similar length share a batch instead, which trains the
same tokens without any leak between conversations.
"""

from __future__ import annotations

import logging
import random

from transformers import PreTrainedTokenizerFast

from rlhf.config import Sft
from rlhf.data.chat import IGNORED, Encoded, encode_conversations
from rlhf.data.corrections import open_rows
from rlhf.data.records import Conversation
from rlhf.errors import DataError
from rlhf.models.loading import load_policy, load_tokenizer, save_trained, setup_torch
from rlhf.nodes import NodeContext
from rlhf.training.sft import fine_tune

log = logging.getLogger(__name__)

REVISION = 1


def run(context: NodeContext) -> None:
    """Train on every assistant turn of the demonstrations; writes data_counts.json and model/."""
    config, directory = context.config, context.directory
    setup_torch(config.compute)
    if directory.has("model"):
        return
    base = context.inputs.models["base"].path
    tokenizer = load_tokenizer(base)
    rows, counts = training_rows(
        read_demonstrations(context),
        tokenizer,
        settings=config.sft,
        max_length=config.model.max_length,
        seed=context.seed,
    )
    directory.write_json("data_counts.json", counts)
    log.info("%d demonstrations to train on: %s", len(rows), counts)
    model = load_policy(base, model=config.model, seed=context.seed)
    fine_tune(
        model,
        tokenizer,
        rows,
        optimizer=config.sft.optimizer,
        epochs=config.sft.epochs,
        batch_size=config.sft.batch_size,
        micro_batch_size=config.sft.micro_batch_size,
        config=config,
        directory=directory,
        seed=context.seed,
    )
    save_trained(model, tokenizer, directory)


def read_demonstrations(context: NodeContext) -> list[Conversation]:
    """Return the conversations of all SFT sets of the node, in plan order."""
    store = open_rows(context)
    sets = context.inputs.of_kind("sft")
    return [row for entry in sets for row in store.conversations(entry.id)]


def training_rows(
    conversations: list[Conversation],
    tokenizer: PreTrainedTokenizerFast,
    *,
    settings: Sft,
    max_length: int,
    seed: int,
) -> tuple[list[Encoded], dict[str, int]]:
    """Encode what may be trained on; returns rows and how many conversations went where.

    Held-out, over-long and unanswered conversations are left out and counted. Raises DataError when
    nothing is left.
    """
    kept = [conversation.messages for conversation in conversations if not conversation.heldout]
    heldout = len(conversations) - len(kept)
    counts = {"read": len(conversations), "heldout": heldout, "over_long": 0, "no_answer": 0}
    rows = []
    for encoded in encode_conversations(tokenizer, kept, last_turn_only=settings.last_turn_only):
        if len(encoded.input_ids) > max_length:
            counts["over_long"] += 1
        elif all(label == IGNORED for label in encoded.labels[1:]):
            counts["no_answer"] += 1
        else:
            rows.append(encoded)
    random.Random(seed).shuffle(rows)
    if settings.max_rows is not None:
        counts["over_cap"] = max(0, len(rows) - settings.max_rows)
        rows = rows[: settings.max_rows]
    if not rows:
        raise DataError(
            f"no demonstration is left to train on ({counts}): ingest an SFT set or raise "
            f"model.max_length={max_length}"
        )
    counts["trained"] = len(rows)
    counts["trained_tokens"] = sum(label != IGNORED for row in rows for label in row.labels[1:])
    return rows, counts
