"""TRL's PPOTrainer of release 1.12, the last one that has it, in an environment of its own.

It scores with one reward model, where our iteration has two.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders.common import Clock, read_work
from benchmarks.worker import Contender


def open_contender(job: Mapping[str, Any]) -> Contender:
    """Load four models; a round is one iteration of the same trainer."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    options, sizes = job["options"], job["sizes"]
    if options["tuned"]:
        torch.set_num_threads(job["threads"])
    dtype = torch.bfloat16 if options.get("weights") == "bf16" else torch.float32
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(job["policy"], dtype=dtype) for _ in range(2)
    )
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(job["scorer"], num_labels=1, dtype=dtype)
        for _ in range(2)
    )
    rows = Dataset.from_list(
        [{"input_ids": ids} for ids in read_work(job)["prompt_ids"][: sizes["prompts"]]]
    )
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(Path(job["scratch"]) / "trl-ppo"),
            per_device_train_batch_size=sizes["prompts"],
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=sizes["epochs"],
            total_episodes=sizes["prompts"],
            response_length=sizes["new_tokens"],
            temperature=sizes["temperature"],
            stop_token="eos",
            missing_eos_penalty=1.0,
            learning_rate=1e-6,
            num_sample_generations=0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **options["arguments"],
        ),
        processing_class=AutoTokenizer.from_pretrained(job["policy"], padding_side="left"),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows,
    )

    def once(request: Mapping[str, Any]) -> dict[str, Any]:
        clock = Clock()
        with clock.running():
            trainer.train()
        logged = trainer.state.log_history[-1] if trainer.state.log_history else {}
        return {"seconds": clock.seconds, "units": 1, "metrics": logged}

    return Contender(once, {"threads": torch.get_num_threads(), "reward_models": 1})
