"""The real vLLM, in this process's care and as a server, beside transformers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import micro_models as micro
import micro_ppo
import micro_stages
import pytest
import torch

from rlhf.artifacts import list_files, read_json, read_jsonl
from rlhf.config import Config, Engine, Precision, Rejection, Sampling
from rlhf.data.chat import encode_prompt
from rlhf.errors import StageError
from rlhf.inference.generation import PolicyGenerator, Response
from rlhf.inference.generators import check_generator, open_generator
from rlhf.inference.vllm import publish
from rlhf.inference.vllm_client import TOKEN_VARIABLE, ServerClient
from rlhf.inference.vllm_engine import sampling_parameters, shared_engine
from rlhf.models.loading import save_model
from rlhf.stages import ppo, rejection

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

ROOT = Path(__file__).parents[2]
MAX_LENGTH = 64
PROMPTS = [prompt.prompt for prompt in micro_ppo.prompts(12)]
KEYS = [f"key/{index}" for index in range(12)]
START_SECONDS = 900
TOKEN = "a secret of this test"


def model(seed: int = 0, *, eos: float = 2.0) -> Any:
    """Return a policy with heads as wide as vLLM wants them on a CPU; ends every fourth token."""
    return micro_ppo.finishing_policy(seed, eos=eos, hidden_size=64)


def talkative(seed: int) -> Any:
    """Return a policy that hardly ever ends: what is likeliest then depends on all weights."""
    return model(seed, eos=-2.0)


def configured(folder: Path, engine: Engine) -> Config:
    made = micro_stages.config(folder)
    made.generator.engine = engine
    made.generator.cpu_kv_cache_gib = 0.1
    made.model.max_length = MAX_LENGTH
    return made


def opened(made: Config, seed: int = 0) -> PolicyGenerator:
    return open_generator(
        made,
        model(seed),
        micro.tokenizer(),
        scratch=Path(made.paths.runs) / "node",
        device=torch.device("cpu"),
    )


def sample(generator: PolicyGenerator, temperature: float = 1.0) -> list[list[Response]]:
    return generator.generate(
        PROMPTS,
        num_samples=3,
        sampling=Sampling(temperature=temperature, max_new_tokens=8, batch_size=16),
        keys=KEYS,
    )


def greedy(seed: int, prompt: Sequence[int]) -> list[int]:
    """Decode with transformers, always the likeliest token but pad."""
    row, policy = list(prompt), talkative(seed)
    while len(row) < len(prompt) + 8 and row[-1] != micro.EOS:
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([row])).logits[0, -1]
        logits[micro.PAD] = -torch.inf
        row.append(int(logits.argmax()))
    return row[len(prompt) :]


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, str, subprocess.Popen[bytes]]]:
    """Start a server over a folder of runs; gives the folder's parent, the URL and the process."""
    folder = tmp_path_factory.mktemp("server")
    save_model(model(5), micro.tokenizer(), folder / "base")
    (folder / "runs").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rlhf.inference.vllm_server", "--port", str(port)]
    command += ["--model", str(folder / "base"), "--folder", str(folder / "runs")]
    command += ["--max-length", str(MAX_LENGTH), "--cpu-kv-cache-gib", "0.1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), TOKEN_VARIABLE: TOKEN}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    yield folder, f"http://127.0.0.1:{port}", process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keep this process's engine alive, so that the tests share it."""
    policy, folder = model(), tmp_path_factory.mktemp("engine")
    path = publish(policy, policy.state_dict, parent=folder, precision=Precision.fp32)
    settings = configured(folder, Engine.vllm).generator
    return shared_engine(path, max_length=MAX_LENGTH, precision=Precision.fp32, settings=settings)


@pytest.fixture
def made(engine: Any, tmp_path: Path) -> Config:
    return configured(tmp_path, Engine.vllm)


def test_the_same_keys_give_the_same_text(made: Config) -> None:
    generator = opened(made)
    first = sample(generator)
    assert sample(generator) == first
    assert sample(opened(made)) == first
    alone = generator.generate(
        PROMPTS[4:5],
        num_samples=1,
        sampling=Sampling(temperature=1.0, max_new_tokens=8, batch_size=1),
        keys=KEYS[4:5],
    )
    assert alone[0][0].token_ids == first[4][0].token_ids
    assert len({tuple(response.token_ids) for row in first for response in row}) > 20


def test_responses_end_as_those_of_transformers_do(made: Config) -> None:
    responses = [response for row in sample(opened(made)) for response in row]
    finished = [response for response in responses if response.finished]
    assert 0 < len(finished) < len(responses)
    for response in responses:
        assert response.finished == (response.token_ids[-1] == micro.EOS)
        assert response.finished or len(response.token_ids) == 8
        assert micro.EOS not in response.token_ids[:-1]
        assert micro.PAD not in response.token_ids


def test_logprobs_are_those_of_transformers(engine: Any, made: Config) -> None:
    from vllm import SamplingParams

    generator = opened(made)
    sampled = sample(generator)
    encoded = [encode_prompt(micro.tokenizer(), prompt) for prompt in PROMPTS]
    found = []
    batch = None

    def spy(weights: Path, given: Any) -> list[list[int]]:
        nonlocal batch
        batch = given
        engine.load(weights)
        params = [SamplingParams(**sampling_parameters(given, s), logprobs=0) for s in given.seeds]
        prompts = [{"prompt_token_ids": ids} for ids in given.prompts]
        outputs = engine._llm.generate(prompts, params, use_tqdm=False)
        for output in outputs:
            completion = output.outputs[0]
            steps = zip(completion.token_ids, completion.logprobs, strict=True)
            found.append([step[token].logprob for token, step in steps])
        return [list(output.outputs[0].token_ids) for output in outputs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "sample", spy)
        assert sample(generator) == sampled
    rows = [(encoded[r.prompt_index], r.token_ids) for responses in sampled for r in responses]
    largest = 0.0
    for (prompt, response), logprobs in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model()(input_ids=torch.tensor([prompt + response])).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected = expected[torch.arange(len(response)), torch.tensor(response)]
        largest = max(largest, float((expected - torch.tensor(logprobs)).abs().max()))
    print(f"largest difference of log-probabilities: {largest:.2e}")
    assert largest < 1e-3


def test_new_weights_decode_as_transformers_with_them(made: Config) -> None:
    generator, earlier = opened(made), set[tuple[int, ...]]()
    for seed in (0, 1, 2):
        generator.update_weights(talkative(seed), talkative(seed).state_dict)
        found, written = sample(generator, temperature=0.0), set()
        for prompt, responses in zip(PROMPTS, found, strict=True):
            wanted = greedy(seed, encode_prompt(micro.tokenizer(), prompt))
            assert [response.token_ids for response in responses] == [wanted] * 3
            written.add(tuple(wanted))
        # Or the old weights would have passed too.
        assert not written & earlier
        earlier |= written


def stage_models(folder: Path) -> dict[str, str]:
    save_model(model(), micro.tokenizer(), folder / "policy")
    helpfulness = micro_stages.save_scorer(folder / "helpfulness", seed=1)
    return {
        "policy": str(folder / "policy"),
        "init": str(folder / "policy"),
        "reference": str(folder / "policy"),
        "critic": helpfulness,
        "reward_helpfulness": helpfulness,
        "reward_safety": micro_stages.save_scorer(folder / "safety", seed=2),
    }


def add_prompts(made: Config) -> None:
    rows = [
        {"id": f"p{i}", "prompt": prompt.prompt, "is_safety": prompt.is_safety}
        for i, prompt in enumerate(micro_ppo.prompts(20))
    ]
    micro_stages.add(made, "prompts", "some", rows)


def test_a_rejection_node_runs_to_the_end(made: Config, tmp_path: Path) -> None:
    made.rejection = Rejection(
        sampling=Sampling(temperature=1.2, max_new_tokens=8, batch_size=16),
        num_samples=3,
        num_prompts=8,
        shard_prompts=3,
        pool_share=0.0,
        batch_size=4,
        micro_batch_size=4,
    )
    add_prompts(made)
    context = micro_stages.context(
        made,
        name="round-01/rejection",
        stage="rejection",
        models=stage_models(tmp_path),
        data=[("prompts", "some", 0)],
        round=1,
    )
    rejection.run(context)
    path = context.directory.path
    assert len(read_jsonl(path / "winners.jsonl")) == 8
    assert (path / "model" / "model.safetensors").is_file()
    assert [file.name for file in path.iterdir() if file.name.startswith(".")] == []


def test_ppo_samples_from_the_policy_that_it_trains(
    made: Config, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.ppo = micro_ppo.config(iterations=2, lr=1e-2).ppo
    add_prompts(made)
    context = micro_stages.context(
        made,
        name="round-01/ppo",
        stage="ppo",
        models=stage_models(tmp_path),
        data=[("prompts", "some", 0)],
        round=1,
    )
    used = []
    answer = engine.sample
    monkeypatch.setattr(engine, "sample", lambda w, b: used.append(w.name) or answer(w, b))
    ppo.run(context)
    summary = read_json(context.directory.path / "ppo.json")
    assert summary["iterations"] == 2
    # Held out at the start, a rollout each iteration, held out at the end: three sets of weights.
    assert len(set(used)) == 3
    assert used == sorted(used, key=used.index)
    assert not any("weights-" in name for name in list_files(context.directory.path))
    kl = [row["rollout/kl_to_start"] for row in read_jsonl(context.directory.metrics.path)[1:]]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert abs(kl[1]) > 1e-6


def test_a_server_answers_as_the_engine_does(
    server: tuple[Path, str, subprocess.Popen[bytes]], made: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url, process = server
    remote = configured(folder, Engine.vllm_server)
    remote.generator.url = url
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            health = ServerClient(remote.generator, root=folder / "runs").health()
            break
        except StageError:
            assert process.poll() is None, (folder / "log.txt").read_text()
            assert time.monotonic() < deadline, (folder / "log.txt").read_text()
    assert health == {"max_length": MAX_LENGTH, "precision": "fp32"}
    check_generator(remote)
    here, there = opened(made), opened(remote)
    assert sample(there) == sample(here)
    there.update_weights(model(3), model(3).state_dict)
    here.update_weights(model(3), model(3).state_dict)
    assert sample(there) == sample(here)


def test_a_killed_server_takes_its_engine_along(
    server: tuple[Path, str, subprocess.Popen[bytes]],
) -> None:
    _, _, process = server
    engine = descendants(process.pid)
    assert engine
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while any(map(is_alive, engine)):
        assert time.monotonic() < deadline, f"still there: {engine}"
        time.sleep(0.5)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def descendants(pid: int) -> list[int]:
    """Return the processes below one, all generations."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, check=True).stdout
    parents = {int(row.split()[0]): int(row.split()[1]) for row in listed.splitlines()}
    found = [pid]
    for parent in found:
        found += [child for child, above in parents.items() if above == parent]
    return found[1:]
