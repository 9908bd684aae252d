"""Our stages, called as their nodes call them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders.common import Clock, chat_loss, copy_weights, pair_loss, read_work
from benchmarks.worker import Contender
from rlhf import metrics
from rlhf.artifacts import NodeDir, read_jsonl
from rlhf.config import (
    Checkpoint,
    Compute,
    Config,
    Engine,
    GeneratorSettings,
    Model,
    Optimizer,
    Ppo,
    Precision,
    Sampling,
)
from rlhf.data.chat import Encoded
from rlhf.data.records import Prompt
from rlhf.inference.generators import open_generator
from rlhf.inference.scoring import HfScorer
from rlhf.models.actor_critic import ValueModel
from rlhf.models.loading import (
    autocast,
    load_policy,
    load_reward_model,
    load_tokenizer,
    setup_torch,
)
from rlhf.training.ppo import PpoLoop
from rlhf.training.reward import RankedPair, train_ranking
from rlhf.training.roles import SeparateRoles
from rlhf.training.sft import fine_tune

SEED = 0


def open_contender(job: Mapping[str, Any]) -> Contender:
    """Load what the suite needs."""
    return OPEN[job["suite"]](job)


def config_of(job: Mapping[str, Any], **groups: Any) -> Config:
    """Return a node's configuration; no checkpoint comes from the clock."""
    return Config(
        recipe="benchmark",
        model=Model(
            path=job["policy"], precision=Precision[job["precision"]], max_length=job["max_length"]
        ),
        compute=Compute(num_threads=job["threads"], device="cpu"),
        checkpoint=Checkpoint(every_seconds=1e9),
        **groups,
    )


def open_generation(job: Mapping[str, Any]) -> Contender:
    """Sample K responses to every prompt; a unit is a sampled token."""
    engine = Engine[job["options"]["engine"]]
    config = config_of(job, generator=GeneratorSettings(engine=engine))
    device = setup_torch(config.compute)
    tokenizer = load_tokenizer(job["policy"])
    policy = load_policy(job["policy"], model=config.model, seed=SEED)
    writes = Unstopping(tokenizer) if job["suite"] == "growth" else tokenizer
    generator = open_generator(config, policy, writes, scratch=Path(job["scratch"]), device=device)
    prompts, sizes = read_work(job)["prompts"], job["sizes"]

    def once(request: Mapping[str, Any]) -> dict[str, Any]:
        asked = {**sizes, **request}
        chosen = prompts[:2] if request.get("warmup") else prompts[: asked["prompts"]]
        if "prompt_tokens" in asked:
            chosen = _of_length(tokenizer, prompts, asked["prompt_tokens"], number=len(chosen))
        sampling = Sampling(
            temperature=asked["temperature"],
            max_new_tokens=asked["new_tokens"],
            batch_size=asked["batch_size"],
        )
        keys = [f"{request['round']}/{index}" for index in range(len(chosen))]
        clock = Clock()
        with clock.running(), autocast(config.model, device):
            found = generator.generate(
                chosen, num_samples=asked["samples"], sampling=sampling, keys=keys
            )
        lengths = [len(response.token_ids) for row in found for response in row]
        return {
            "seconds": clock.seconds,
            "units": sum(lengths),
            "sequences": len(lengths),
            "finished": sum(response.finished for row in found for response in row),
        }

    return Contender(once, {"engine": engine.name})


class Unstopping:
    """A tokenizer without an end: responses fill their budget, so that their lengths are known."""

    eos_token_id = -1

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode as the tokenizer does."""
        return self._tokenizer(*args, **kwargs)


def _of_length(tokenizer: Any, prompts: Any, length: int, *, number: int) -> Any:
    """Return so many prompts whose text has about so many tokens, cut out of all prompts' text."""
    text = " ".join(message["content"] for prompt in prompts for message in prompt)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = ids * (1 + (number + length) // len(ids))
    return [
        [{"role": "user", "content": tokenizer.decode(ids[start : start + length])}]
        for start in range(number)
    ]


def open_sft(job: Mapping[str, Any]) -> Contender:
    """Fine-tune on the chats from the same weights in every round; a unit is an answer token."""
    work, sizes = read_work(job), job["sizes"]
    rows = [Encoded(row["input_ids"], row["labels"]) for row in work["chats"]]
    config = config_of(job)
    setup_torch(config.compute)
    tokenizer = load_tokenizer(job["policy"])
    model = load_policy(job["policy"], model=config.model, seed=SEED)

    def train(number: int, batch_size: int, directory: NodeDir) -> int:
        fine_tune(
            model,
            tokenizer,
            rows[:number],
            optimizer=_optimizer(sizes),
            epochs=1,
            batch_size=batch_size,
            micro_batch_size=sizes["micro_batch_size"],
            config=config,
            directory=directory,
            seed=SEED,
        )
        return sum(label != -100 for row in rows[:number] for label in row.labels[1:])

    return _trainer(job, model, train, lambda: chat_loss(model, work["measured_chats"]))


def open_reward(job: Mapping[str, Any]) -> Contender:
    """Train the scorer on the pairs from the same weights in every round; a unit is a pair."""
    work, sizes = read_work(job), job["sizes"]
    rows = [RankedPair(**row) for row in work["pairs"]]
    config = config_of(job)
    setup_torch(config.compute)
    tokenizer = load_tokenizer(job["scorer"])
    model = load_reward_model(job["scorer"], model=config.model, new_head=False, seed=SEED)

    def train(number: int, batch_size: int, directory: NodeDir) -> int:
        train_ranking(
            model,
            tokenizer,
            rows[:number],
            optimizer=_optimizer(sizes),
            epochs=1,
            batch_size=batch_size,
            micro_batch_size=sizes["micro_batch_size"],
            safety_loss_weight=0.0,
            config=config,
            directory=directory,
            seed=SEED,
        )
        return len(rows[:number])

    return _trainer(job, model, train, lambda: pair_loss(model, work["measured_pairs"]))


def open_ppo(job: Mapping[str, Any]) -> Contender:
    """Take one PPO iteration, optimizer states from nothing; a unit is an iteration."""
    sizes = job["sizes"]
    config = config_of(
        job,
        ppo=Ppo(
            sampling=Sampling(
                temperature=sizes["temperature"],
                max_new_tokens=sizes["new_tokens"],
                batch_size=sizes["prompts"],
            ),
            iterations=1,
            batch_size=sizes["prompts"],
            num_minibatches=1,
            num_ppo_epochs=sizes["epochs"],
            micro_batch_size=sizes["prompts"],
            critic_warmup_iterations=0,
            kl_stop=1e9,
        ),
        generator=GeneratorSettings(engine=Engine[job["options"]["engine"]]),
    )
    roles = _roles(job, config)
    prompts = [
        Prompt(id=str(index), prompt=prompt, is_safety=index % 4 == 0, source="benchmark")
        for index, prompt in enumerate(read_work(job)["prompts"][: sizes["prompts"]])
    ]

    def once(request: Mapping[str, Any]) -> dict[str, Any]:
        directory = _directory(job, "ppo")
        loop = PpoLoop(
            roles,
            prompts=prompts,
            heldout=[],
            config=config,
            directory=directory,
            # The warm-up has no number that a seed could be.
            seed=max(request["round"], 0),
        )
        clock = Clock()
        with clock.running():
            loop.run()
        row = read_jsonl(directory.metrics.path)[-1]
        return {
            "seconds": clock.seconds,
            "units": 1,
            "response_length": row[metrics.ROLLOUT_RESPONSE_LENGTH],
        }

    return Contender(once, {"reward_models": 2})


def _roles(job: Mapping[str, Any], config: Config) -> SeparateRoles:
    device = setup_torch(config.compute)
    tokenizer = load_tokenizer(job["policy"])

    def scorer() -> Any:
        return load_reward_model(job["scorer"], model=config.model, new_head=False, seed=SEED)

    policy = load_policy(job["policy"], model=config.model, seed=SEED)
    scorers = tuple(HfScorer(scorer(), tokenizer, max_length=job["max_length"]) for _ in range(2))
    return SeparateRoles(
        policy=policy,
        critic=ValueModel(scorer()),
        reference=load_policy(job["policy"], model=config.model, seed=SEED),
        start=None,
        scorers=(scorers[0], scorers[1]),
        generator=open_generator(
            config, policy, tokenizer, scratch=Path(job["scratch"]), device=device
        ),
        tokenizer=tokenizer,
        settings=config.model,
        temperature=config.ppo.sampling.temperature,
    )


def _trainer(
    job: Mapping[str, Any],
    model: Any,
    train: Callable[[int, int, NodeDir], int],
    loss: Callable[[], float],
) -> Contender:
    start, sizes = copy_weights(model), job["sizes"]

    def once(request: Mapping[str, Any]) -> dict[str, Any]:
        asked = {**sizes, **request}
        steps = 1 if request.get("warmup") else asked["steps"]
        with torch.no_grad():
            model.load_state_dict(start)
        directory = _directory(job, "training")
        clock = Clock()
        with clock.running():
            units = train(steps * asked["batch_size"], asked["batch_size"], directory)
        measured = None if request.get("warmup") else loss()
        return {"seconds": clock.seconds, "units": units, "steps": steps, "loss": measured}

    return Contender(once, {})


def _optimizer(sizes: Mapping[str, Any]) -> Optimizer:
    """Return a constant learning rate, so that every library has the same schedule."""
    return Optimizer(lr=sizes["lr"], lr_floor=1.0, warmup_fraction=0.0, warmup_steps_min=0)


def _directory(job: Mapping[str, Any], name: str) -> NodeDir:
    folder = Path(job["scratch"]) / name
    shutil.rmtree(folder, ignore_errors=True)
    return NodeDir(folder)


OPEN = {
    "generation": open_generation,
    "sft": open_sft,
    "reward": open_reward,
    "ppo": open_ppo,
    "growth": open_generation,
}
