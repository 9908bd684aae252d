"""vLLM on processors: the engine's own process, no seeds, no text made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from benchmarks.contenders.common import Clock, read_work
from benchmarks.worker import Contender

CACHE_BYTES = 2 * 2**30
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def open_contender(job: Mapping[str, Any]) -> Contender:
    """Start the engine; `engine` of the options is what LLM is told besides."""
    os.environ.update(job["options"]["environment"])
    os.environ.update({"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"})
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    sizes = job["sizes"]
    eos = AutoTokenizer.from_pretrained(job["policy"]).eos_token_id
    llm = LLM(
        model=job["policy"],
        skip_tokenizer_init=True,
        dtype=DTYPES[job["precision"]],
        max_model_len=job["max_length"],
        generation_config="vllm",
        kv_cache_memory_bytes=CACHE_BYTES,
        disable_log_stats=True,
        **job["options"]["engine"],
    )
    prompts = read_work(job)["prompt_ids"][: sizes["prompts"]]
    params = SamplingParams(
        n=sizes["samples"],
        temperature=sizes["temperature"],
        max_tokens=sizes["new_tokens"],
        stop_token_ids=[eos],
        detokenize=False,
    )

    def once(request: Mapping[str, Any]) -> dict[str, Any]:
        chosen = prompts[:2] if request.get("warmup") else prompts
        # Prompts of an earlier round must not be known already.
        llm.reset_prefix_cache()
        clock = Clock()
        with clock.running():
            found = llm.generate(
                [{"prompt_token_ids": ids} for ids in chosen], params, use_tqdm=False
            )
        written = [output for request_output in found for output in request_output.outputs]
        return {
            "seconds": clock.seconds,
            "units": sum(len(output.token_ids) for output in written),
            "sequences": len(written),
            "finished": sum(output.finish_reason == "stop" for output in written),
        }

    return Contender(once, {"cache_bytes": CACHE_BYTES})
