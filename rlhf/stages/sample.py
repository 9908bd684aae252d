"""Sample: one job's part of a rejection node's responses, so that many jobs sample side by side.

The rejection node merges the parts. Prompts, random keys and shards are those that it would use
alone, so the merged responses are the same bits.
"""

from __future__ import annotations

from rlhf.inference.best_of import Part, choose_prompts, sample_and_score
from rlhf.models.loading import load_tokenizer, setup_torch
from rlhf.nodes import NodeContext, node_seed

REVISION = 1


def run(context: NodeContext) -> None:
    """Write responses.jsonl: one row per prompt of this part."""
    device = setup_torch(context.config.compute)
    context.directory.resume()
    options = context.node.options
    seed = node_seed(context.config.seed, options["for"])
    tokenizer = load_tokenizer(context.inputs.models["policy"].path)
    prompts, _ = choose_prompts(context, tokenizer, seed=seed)
    part = Part(options["shard"], options["of"])
    rows = sample_and_score(context, prompts, tokenizer, device, seed=seed, part=part)
    context.directory.write_jsonl("responses.jsonl", rows)
