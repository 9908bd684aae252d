"""The PPO loop: its steps, stop rules, warm-up, resume, and that it learns."""

import math
from itertools import count
from pathlib import Path
from typing import Any

import micro_models as micro
import micro_ppo as ppo
import pytest
import torch

from rlhf import metrics
from rlhf.artifacts import read_jsonl
from rlhf.config import Precision
from rlhf.errors import StageError
from rlhf.models import packing
from rlhf.training.roles import SeparateRoles


class Killed(Exception):
    pass


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / "metrics.jsonl")


def parameters(roles: SeparateRoles) -> dict[str, torch.Tensor]:
    return micro.weights(roles.joint)


@pytest.mark.parametrize("precision", list(Precision))
def test_first_ratio_is_exactly_one(tmp_path: Path, precision: Precision) -> None:
    config = ppo.config(micro_batch_size=3, num_ppo_epochs=2, iterations=2)
    config.model.precision = precision
    ppo.loop(config, tmp_path, heldout=0).run()
    assert [row[metrics.PPO_FIRST_RATIO] for row in rows_of(tmp_path)] == [1.0, 1.0]


def test_optimizer_steps_are_epochs_times_minibatches(tmp_path: Path) -> None:
    config = ppo.config(num_ppo_epochs=3, num_minibatches=4, iterations=2)
    loop = ppo.loop(config, tmp_path, heldout=0)
    loop.run()
    assert loop._engine.updates == {"policy": 24, "critic": 24}
    for optimizer in loop._engine._trained.optimizers.values():
        states = optimizer.state_dict()["state"].values()
        assert {int(state["step"]) for state in states} == {24}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_micro_batches_do_not_change_the_result(
    tmp_path: Path, dtype: torch.dtype, bound: float
) -> None:
    """1 x 8 equals 8 x 1 after 4 optimizer steps, with responses of different lengths."""
    found = []
    for size in (1, 8):
        config = ppo.config(micro_batch_size=size, num_ppo_epochs=2, iterations=1)
        roles = ppo.roles(config, dtype=dtype, finishes=True)
        loop = ppo.loop(config, tmp_path / str(size), given=roles, heldout=0)
        before = parameters(roles)
        loop.run()
        assert loop._engine.updates["policy"] == 4
        assert micro.largest_difference(before, parameters(roles)) > 1e-3
        found.append(parameters(roles))
    assert micro.largest_difference(*found) < bound


def test_packed_rows_and_micro_batches_without_padding_give_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One packed pass per minibatch equals one rectangle, and one pass per length."""
    found, passes = [], []
    for pass_tokens, packs in ((-1, True), (10**9, False), (-1, False)):
        monkeypatch.setitem(packing.PASS_TOKENS, "cpu", pass_tokens)
        monkeypatch.setattr(packing, "can_pack", lambda model, packs=packs: packs)
        config = ppo.config(micro_batch_size=8, num_ppo_epochs=2, iterations=1)
        roles = ppo.roles(config, dtype=torch.float64, finishes=True)
        loop = ppo.loop(config, tmp_path / str(len(found)), given=roles, heldout=0)
        pack = loop._engine._pack
        sizes: list[int] = []

        def counted(rollouts: Any, rows: Any, pack: Any = pack, sizes: Any = sizes) -> Any:
            sizes.append(len(rows))
            return pack(rollouts, rows)

        monkeypatch.setattr(loop._engine, "_pack", counted)
        loop.run()
        found.append(parameters(roles))
        passes.append(len(sizes))
    assert passes[2] > passes[1] == passes[0] == 2 + 4
    assert micro.largest_difference(found[0], found[1]) < 1e-10
    assert micro.largest_difference(found[2], found[1]) < 1e-10


def test_kl_is_measured_against_reference_and_start(tmp_path: Path) -> None:
    config = ppo.config(iterations=2)
    same, other = tmp_path / "same", tmp_path / "other"
    ppo.loop(config, same, heldout=0).run()
    ppo.loop(config, other, given=ppo.roles(config, reference_seed=3), heldout=0).run()
    first, second = rows_of(same)
    assert first[metrics.ROLLOUT_KL] == first[metrics.ROLLOUT_KL_TO_START] == 0.0
    assert second[metrics.ROLLOUT_KL] == second[metrics.ROLLOUT_KL_TO_START] != 0.0
    first = rows_of(other)[0]
    assert first[metrics.ROLLOUT_KL] > 0.01
    assert first[metrics.ROLLOUT_KL_TO_START] == 0.0


def test_only_the_critic_learns_in_its_warmup(tmp_path: Path) -> None:
    config = ppo.config(critic_warmup_iterations=2, iterations=3)
    roles = ppo.roles(config)
    before, seen = parameters(roles), []
    loop = ppo.loop(
        config, tmp_path, given=roles, on_step=lambda *_: seen.append(parameters(roles))
    )
    loop.run()
    for step, now in enumerate(seen, start=1):
        moved = {name.split(".")[0] for name in now if not torch.equal(now[name], before[name])}
        assert moved == ({"critic"} if step <= 2 else {"critic", "actor"})
    assert loop._engine.updates == {"policy": 2, "critic": 6}
    rows = rows_of(tmp_path)
    assert [metrics.PPO_POLICY_LOSS in row for row in rows] == [False, False, False, True]
    assert [row.get(metrics.TRAIN_LR) for row in rows] == [None, 0.0, 0.0, 1e-3]
    # Measured at the start and, after the warm-up, at the end.
    assert [metrics.PPO_HELDOUT_SCORE in row for row in rows] == [True, False, False, True]


def test_policy_and_critic_have_their_own_learning_rates(tmp_path: Path) -> None:
    config = ppo.config(critic_lr=5e-3, lr=2e-3)
    optimizers = ppo.loop(config, tmp_path)._engine._trained.optimizers
    found = {
        (role, group["lr"], group["weight_decay"])
        for role, optimizer in optimizers.items()
        for group in optimizer.param_groups
    }
    assert found == {
        ("policy", 2e-3, 0.1),
        ("policy", 2e-3, 0.0),
        ("critic", 5e-3, 0.1),
        ("critic", 5e-3, 0.0),
    }


@pytest.mark.parametrize("step", [1, 3])
def test_resumed_equals_uninterrupted(tmp_path: Path, step: int) -> None:
    """Killed after an iteration, between two checkpoints: same weights, optimizer and logs."""
    config = ppo.config(every_steps=1 if step == 1 else 2, critic_warmup_iterations=1, iterations=4)
    config.ppo.optimizer.lr_floor = 0.1
    straight = ppo.loop(config, tmp_path / "straight")
    straight_state = straight.run()

    def die(done: int, _total: int) -> None:
        if done == step:
            raise Killed

    broken = tmp_path / "broken"
    with pytest.raises(Killed):
        ppo.loop(config, broken, on_step=die).run()
    resumed = ppo.loop(config, broken)
    saved = resumed._directory.last_checkpoint()
    assert saved is not None
    assert saved.step == {1: 1, 3: 2}[step]
    assert resumed.run() == straight_state
    for ours, theirs in zip(
        parameters(resumed._roles).values(), parameters(straight._roles).values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    for role in ("policy", "critic"):
        ours, theirs = (
            loop._engine._trained.optimizers[role].state_dict()["state"]
            for loop in (resumed, straight)
        )
        for index, entry in theirs.items():
            assert all(torch.equal(ours[index][name], entry[name]) for name in entry)
    for log in ("metrics", "samples"):
        found = [
            micro.rows_without_time(getattr(loop._directory, log)) for loop in (straight, resumed)
        ]
        assert found[0] == found[1] != []


def test_the_best_policy_outlives_a_kill(tmp_path: Path) -> None:
    """Under a constant score the start is the best; it comes from the checkpoint, bit for bit."""
    config = ppo.config(every_steps=1, patience=9, heldout_every=1)
    scores = {"helpfulness": lambda _: 1.0, "safety": lambda _: 1.0}
    before = micro.weights(ppo.roles(config).joint.actor.policy)

    def die(done: int, _total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        ppo.loop(config, tmp_path, given=ppo.roles(config, **scores), on_step=die).run()
    roles = ppo.roles(config, **scores)
    state = ppo.loop(config, tmp_path, given=roles).run()
    assert (state.iteration, state.best_iteration) == (3, 0)
    assert micro.largest_difference(before, micro.weights(roles.joint.actor.policy)) == 0.0


def test_kl_stop_ends_the_run_and_keeps_a_policy_within_the_bound(tmp_path: Path) -> None:
    """Every measurement scores higher, yet a policy beyond the bound is not the best one."""
    config = ppo.config(lr=3e-2, kl_stop=0.5, iterations=6, heldout_every=1)
    roles = ppo.roles(config)
    measured = count()

    def score(prompts: Any, responses: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rise = next(measured) if len(prompts) == 4 else 0
        scores = torch.arange(len(prompts)).float() + rise
        return scores, scores

    roles.score = score  # type: ignore[method-assign]
    state = ppo.loop(config, tmp_path, given=roles).run()
    assert state.stopped == "kl_stop"
    assert state.iteration < 6
    assert state.kl_to_start > 0.5
    assert metrics.PPO_POLICY_LOSS not in rows_of(tmp_path)[-1]
    within = [row["iteration"] for row in state.heldout if row["kl_to_start"] <= 0.5]
    assert len(within) < len(state.heldout)
    assert state.best_iteration == within[-1]


def test_patience_ends_the_run_with_the_best_policy(tmp_path: Path) -> None:
    """Nothing beats the start under a constant score, so the start comes back, bit for bit."""
    config = ppo.config(patience=2, iterations=9, heldout_every=2)
    roles = ppo.roles(config, helpfulness=lambda _: 1.0, safety=lambda _: 1.0)
    before = micro.weights(roles.joint.actor.policy)
    state = ppo.loop(config, tmp_path, given=roles).run()
    assert (state.stopped, state.iteration, state.best_iteration) == ("patience", 4, 0)
    assert micro.largest_difference(before, micro.weights(roles.joint.actor.policy)) == 0.0


def test_a_better_policy_is_kept_and_patience_starts_over(tmp_path: Path) -> None:
    """The planted score depends on how many measurements came before: up, down, up, down, down."""
    config = ppo.config(patience=2, iterations=20, heldout_every=1)
    roles = ppo.roles(config)
    series = iter([0.0, 2.0, 1.0, 3.0, 2.0, 2.5, 9.0])

    def score(prompts: Any, responses: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.arange(len(prompts)).float()
        if len(prompts) == 4:
            scores = scores + next(series)
        return scores, scores

    roles.score = score  # type: ignore[method-assign]
    seen: list[dict[str, torch.Tensor]] = []
    loop = ppo.loop(
        config,
        tmp_path,
        given=roles,
        on_step=lambda *_: seen.append(micro.weights(roles.joint.actor.policy)),
    )
    state = loop.run()
    assert (state.stopped, state.iteration, state.best_iteration) == ("patience", 5, 3)
    assert micro.largest_difference(seen[2], micro.weights(roles.joint.actor.policy)) == 0.0
    # On the scale of the first measurement: scores 0, 1, 2, 3 have mean 1.5 and variance 1.25.
    expected = [shift / math.sqrt(1.25) for shift in (0.0, 2.0, 1.0, 3.0, 2.0, 2.5)]
    assert [row["score"] for row in state.heldout] == pytest.approx(expected, abs=1e-6)


def test_alarms_are_raised_once_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ppo.config(eos_alarm=1.1, length_alarm=0.5)
    state = ppo.loop(config, tmp_path, heldout=0).run()
    assert [(alarm["kind"], alarm["iteration"]) for alarm in state.alarms] == [
        ("eos", 1),
        ("length", 1),
    ]
    assert caplog.text.count("alarm eos") == caplog.text.count("alarm length") == 1
    quiet = ppo.loop(ppo.config(eos_alarm=0.0), tmp_path / "quiet", heldout=0).run()
    assert quiet.alarms == []


def test_nan_scores_and_losses_stop_the_stage(tmp_path: Path) -> None:
    config = ppo.config()
    with pytest.raises(StageError, match="8 of 8 helpfulness scores are NaN"):
        ppo.loop(
            config,
            tmp_path / "score",
            given=ppo.roles(config, helpfulness=lambda _: math.nan),
            heldout=0,
        ).run()
    roles = ppo.roles(config)
    with torch.no_grad():
        roles.joint.critic.head.weight[0, 0] = math.inf
    before = micro.weights(roles.joint.actor.policy)
    with pytest.raises(StageError, match=r"value_loss.* became NaN or infinite"):
        ppo.loop(config, tmp_path / "loss", given=roles, heldout=0).run()
    assert micro.largest_difference(before, micro.weights(roles.joint.actor.policy)) == 0.0


def test_it_learns_what_is_rewarded(tmp_path: Path) -> None:
    """The score counts the letter e; a control with an unrelated score does not raise the count."""

    def letters(text: str) -> float:
        return float(text.count("e"))

    def trained(folder: str, score: ppo.Score, *, iterations: int) -> SeparateRoles:
        config = ppo.config(
            lr=2e-2,
            iterations=iterations,
            batch_size=32,
            micro_batch_size=32,
            num_ppo_epochs=2,
        )
        roles = ppo.roles(config, helpfulness=score, safety=score)
        ppo.loop(config, tmp_path / folder, given=roles, heldout=0).run()
        return roles

    def mean_letters(roles: SeparateRoles) -> float:
        found = roles.generator.generate(
            [prompt.prompt for prompt in ppo.prompts(32)],
            num_samples=4,
            sampling=ppo.config().ppo.sampling,
            keys=[str(i) for i in range(32)],
        )
        return sum(letters(response.text) for row in found for response in row) / 128

    before = mean_letters(ppo.roles(ppo.config()))
    control = mean_letters(trained("control", lambda text: float(len(text) % 2), iterations=4))
    after = mean_letters(trained("reward", letters, iterations=7))
    assert after > 1.8 * before
    assert after > 1.5 * control
