"""PPO's parts against a second implementation in plain loops, and the fixed order of prompts."""

import math
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import micro_ppo as ppo
import pytest
import torch

from rlhf.models.actor_critic import pack_responses
from rlhf.training.rollout import Experience, Rollout, iteration_prompts

PAD = 0


def slow_logprobs(model: Any, rollout: Rollout, temperature: float) -> list[float]:
    """One forward pass of the whole model per token, no padding, no cache."""
    found, ids = [], list(rollout.prompt_ids)
    for token in rollout.response.token_ids:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double() / temperature
        logits[PAD] = -math.inf
        found.append(float(logits[token] - torch.logsumexp(logits, 0)))
        ids.append(token)
    return found


def slow_values(critic: Any, rollout: Rollout) -> list[float]:
    found, ids = [], list(rollout.prompt_ids)
    for token in rollout.response.token_ids:
        with torch.no_grad():
            state = critic.trunk(torch.tensor([ids])).last_hidden_state[0, -1]
        found.append(float((state * critic.head.weight[0].detach()).sum()))
        ids.append(token)
    return found


def slow_whiten(values: list[float]) -> list[float]:
    return [(value - fmean(values)) / math.sqrt(pstdev(values) ** 2 + 1e-8) for value in values]


def slow_experience(
    rollouts: list[Rollout],
    logprobs: list[list[float]],
    ref_logprobs: list[list[float]],
    values: list[list[float]],
) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Return rewards, whitened advantages and returns for the settings of the test below."""
    gated = []
    for rollout in rollouts:
        is_low = 1 / (1 + math.exp(-rollout.score_safety)) < 0.15
        use_safety = rollout.prompt.is_safety or is_low
        gated.append(rollout.score_safety if use_safety else rollout.score_helpfulness)
    rewards, advantages, returns = [], [], []
    for row, score in enumerate(slow_whiten(gated)):
        steps = range(len(values[row]))
        reward = [-0.3 * (logprobs[row][t] - ref_logprobs[row][t]) for t in steps]
        reward[-1] += score - (0.0 if rollouts[row].response.finished else 0.7)
        # A_t = sum over l of (gamma lambda)^l delta_(t+l), summed forwards.
        after = [*values[row][1:], 0.0]
        delta = [reward[t] + 0.98 * after[t] - values[row][t] for t in steps]
        advantage = [
            sum((0.98 * 0.9) ** (later - t) * delta[later] for later in steps if later >= t)
            for t in steps
        ]
        rewards.append(reward)
        advantages.append(advantage)
        returns.append([advantage[t] + values[row][t] for t in steps])
    flat = iter(slow_whiten([value for row in advantages for value in row]))
    return rewards, [[next(flat) for _ in row] for row in advantages], returns


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """One iteration's experience in float64, and its two optimizer steps on the whole batch."""
    config = ppo.config(
        kl_coef=0.3,
        gamma=0.98,
        gae_lambda=0.9,
        no_eos_penalty=0.7,
        num_minibatches=1,
        num_ppo_epochs=2,
        micro_batch_size=3,
        clip_range=0.05,
        value_clip_range=0.01,
    )
    roles = ppo.roles(
        config,
        dtype=torch.float64,
        helpfulness=lambda text: len(text) / 10,
        safety=lambda text: text.count("e") - 3.0,
        reference_seed=3,
        finishes=True,
    )
    loop = ppo.loop(config, tmp_path, given=roles, heldout=0)
    loop.state.iteration = 1
    return roles, loop, loop._collect()


def rows(table: torch.Tensor, experience: Experience) -> list[list[float]]:
    return [
        row[keep].tolist() for row, keep in zip(table, experience.response_mask_BT, strict=True)
    ]


def assert_rows(found: list[list[float]], expected: list[list[float]], bound: float) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=bound, rel=0)


def test_experience_equals_plain_loops(made: Any) -> None:
    roles, _loop, experience = made
    rollouts, measured = experience.rollouts, experience.measured
    finished = {rollout.response.finished for rollout in rollouts}
    assert finished == {True, False}
    assert len({bool(x) for x in experience.safety_selected_B}) == 2
    logprobs = [slow_logprobs(roles.joint.actor.policy, rollout, 0.9) for rollout in rollouts]
    ref_logprobs = [slow_logprobs(roles._reference, rollout, 0.9) for rollout in rollouts]
    values = [slow_values(roles.joint.critic, rollout) for rollout in rollouts]
    assert_rows(rows(measured.logprobs_BT, experience), logprobs, 1e-10)
    assert_rows(rows(measured.ref_logprobs_BT, experience), ref_logprobs, 1e-10)
    assert_rows(rows(measured.values_BT, experience), values, 1e-10)
    rewards, advantages, returns = slow_experience(rollouts, logprobs, ref_logprobs, values)
    # Scores are float32, as reward models give them.
    assert_rows(rows(experience.token_rewards_BT, experience), rewards, 1e-6)
    assert_rows(rows(experience.advantages_BT, experience), advantages, 1e-5)
    assert_rows(rows(experience.returns_BT, experience), returns, 1e-6)
    kl = [sum(a) - sum(b) for a, b in zip(logprobs, ref_logprobs, strict=True)]
    assert experience.kl_B.tolist() == pytest.approx(kl, abs=1e-9)


def test_nothing_is_rewarded_behind_the_last_token(made: Any) -> None:
    _roles, _loop, experience = made
    outside = ~experience.response_mask_BT
    assert bool(outside.any())
    for table in (
        experience.token_rewards_BT,
        experience.advantages_BT,
        experience.returns_BT,
        experience.measured.logprobs_BT,
        experience.measured.values_BT,
    ):
        assert float(table[outside].abs().sum()) == 0.0


def test_losses_equal_plain_loops(made: Any) -> None:
    """The second step's losses: the weights have moved, so ratio and clips are at work."""
    roles, loop, experience = made
    engine = loop._engine
    loop._settings.num_ppo_epochs = 1
    engine.update(experience, iteration=1, with_policy=True)
    old = rows(experience.measured.logprobs_BT, experience)
    old_values = rows(experience.measured.values_BT, experience)
    advantages = rows(experience.advantages_BT, experience)
    returns = rows(experience.returns_BT, experience)
    policy_sum = value_sum = clipped_tokens = approx_kl = num_tokens = 0.0
    clipped_values = 0
    for i, rollout in enumerate(experience.rollouts):
        logprobs = slow_logprobs(roles.joint.actor.policy, rollout, 0.9)
        values = slow_values(roles.joint.critic, rollout)
        for t in range(len(logprobs)):
            ratio = math.exp(logprobs[t] - old[i][t])
            inside = min(max(ratio, 0.95), 1.05)
            plain, clipped = -advantages[i][t] * ratio, -advantages[i][t] * inside
            policy_sum += max(plain, clipped)
            clipped_tokens += clipped > plain
            approx_kl += ratio - 1 - math.log(ratio)
            near = min(max(values[t], old_values[i][t] - 0.01), old_values[i][t] + 0.01)
            clipped_values += near != values[t]
            value_sum += max((values[t] - returns[i][t]) ** 2, (near - returns[i][t]) ** 2) / 2
            num_tokens += 1
    assert clipped_tokens > 0
    assert clipped_values > 0
    [step] = engine.update(experience, iteration=1, with_policy=True)
    assert step["tokens"] == num_tokens
    assert step["policy_loss"] == pytest.approx(policy_sum / num_tokens, abs=1e-8)
    assert step["value_loss"] == pytest.approx(value_sum / num_tokens, abs=1e-8)
    assert step["clipfrac"] == clipped_tokens
    assert step["approx_kl"] == pytest.approx(approx_kl, abs=1e-8)


def test_gradients_are_clipped_apart(made: Any) -> None:
    """Policy and critic each keep a norm of 1 at most, whatever the other's is."""
    roles, loop, experience = made
    engine = loop._engine
    norms: dict[str, list[float]] = {"policy": [], "critic": []}
    optimizer = engine._trained.optimizers["policy"]
    step = optimizer.step

    def spy() -> None:
        for role, parameters in (
            ("policy", roles.policy_parameters()),
            ("critic", roles.critic_parameters()),
        ):
            squares = [float(p.grad.square().sum()) for p in parameters.values()]
            norms[role].append(math.sqrt(sum(squares)))
        step()

    optimizer.step = spy
    found = engine.update(experience, iteration=1, with_policy=True)
    for role, seen in norms.items():
        for norm, before in zip(seen, [one[f"{role}_grad_norm"] for one in found], strict=True):
            assert norm == pytest.approx(min(1.0, before), abs=1e-5)
    assert max(one["critic_grad_norm"] for one in found) > 1.0


def test_packed_states_are_those_before_each_token() -> None:
    batch = pack_responses(
        [([11, 12, 13], [14, 1]), ([15], [16, 17, 1])], pad_id=0, device=torch.device("cpu")
    )
    assert batch.input_ids_BL.tolist() == [[11, 12, 13, 14, 1], [15, 16, 17, 1, 0]]
    assert batch.attention_mask_BL.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.tokens_BT.tolist() == [[14, 1, 0], [16, 17, 1]]
    assert batch.states_BT.tolist() == [[2, 3, 0], [0, 1, 2]]
    seen = batch.input_ids_BL.gather(1, batch.states_BT)[batch.response_mask_BT]
    assert seen.tolist() == [13, 14, 15, 16, 17]
    assert batch.spread(batch.tokens_N).tolist() == batch.tokens_BT.tolist()


def test_prompts_come_in_shuffled_epochs() -> None:
    prompts = ppo.prompts(10)
    seen = []
    for iteration in range(5):
        seen += iteration_prompts(prompts, iteration=iteration, batch_size=4, seed=3)
    ids = [prompt.id for prompt, _ in seen]
    assert sorted(ids[:10]) == sorted(ids[10:]) == sorted(prompt.id for prompt in prompts)
    assert ids[:10] != ids[10:]
    assert len({key for _, key in seen}) == 20
    again = iteration_prompts(prompts, iteration=2, batch_size=4, seed=3)
    assert again == seen[8:12]
    other = iteration_prompts(prompts, iteration=2, batch_size=4, seed=4)
    assert [p.id for p, _ in other] != [p.id for p, _ in again]
    # More rollouts than prompts: the repeat is another sample.
    twice = iteration_prompts(prompts, iteration=0, batch_size=20, seed=3)
    assert len({key for _, key in twice}) == 20
