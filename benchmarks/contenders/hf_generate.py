"""Hugging Face generate, sampling from the whole softmax at one temperature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.contenders.common import Clock, pad, read_work
from benchmarks.worker import Contender

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_contender(job: Mapping[str, Any]) -> Contender:
    """Load the policy; `rows` of the options is how many sequences are written together."""
    options, sizes = job["options"], job["sizes"]
    if options["tuned"]:
        torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["policy"])
    eos, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=DTYPES[job["precision"]])
    model.eval()
    prompts = read_work(job)["prompt_ids"][: sizes["prompts"]]
    if options["sorted"]:
        prompts = sorted(prompts, key=len)
    at_once = max(1, (options["rows"] or len(prompts) * sizes["samples"]) // sizes["samples"])

    @torch.no_grad()
    def write(ids: list[list[int]], new_tokens: int) -> tuple[int, int]:
        found = model.generate(
            input_ids=pad(ids, pad_id, left=True),
            attention_mask=pad([[1] * len(row) for row in ids], 0, left=True),
            do_sample=True,
            temperature=sizes["temperature"],
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            num_return_sequences=sizes["samples"],
            eos_token_id=eos,
            pad_token_id=pad_id,
            **options["generate"],
        )
        responses = found[:, max(len(row) for row in ids) :]
        ended = (responses == eos).any(1)
        lengths = (responses == eos).int().argmax(1) + 1
        return int(torch.where(ended, lengths, responses.shape[1]).sum()), int(ended.sum())

    def once(request: Mapping[str, Any]) -> dict[str, Any]:
        torch.manual_seed(request["round"])
        chosen = prompts[:2] if request.get("warmup") else prompts
        clock, tokens, finished = Clock(), 0, 0
        with clock.running():
            for start in range(0, len(chosen), at_once):
                written = write(chosen[start : start + at_once], sizes["new_tokens"])
                tokens, finished = tokens + written[0], finished + written[1]
        return {
            "seconds": clock.seconds,
            "units": tokens,
            "sequences": len(chosen) * sizes["samples"],
            "finished": finished,
        }

    return Contender(
        once, {"threads": torch.get_num_threads(), "sequences_at_once": at_once * sizes["samples"]}
    )
