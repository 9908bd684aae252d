"""The PPO loop on accelerate (paper section 3.2.3, Eq. 3 and 4; Schulman et al. 2017).

One iteration: sample a response to each prompt of the batch, score it with both reward models,
turn scores into advantages over the global batch, then take num_ppo_epochs x num_minibatches
optimizer steps. Policy and critic have an optimizer each; their gradients are clipped apart.
Deviations from the paper, which is silent on them: a critic warm-up, advantage whitening, stop
rules, and log-probabilities that the trainer computes itself, in the micro-batches of the first
epoch, so that the first ratio of an iteration is exactly 1.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlhf import metrics
from rlhf.algo.masked import masked_moments, mean_and_std, whiten_with
from rlhf.artifacts import NodeDir
from rlhf.config import Config
from rlhf.data.records import Prompt
from rlhf.training.layout import check_conditions, conditions
from rlhf.training.ppo_engine import PpoEngine
from rlhf.training.ppo_report import heldout_rows, mean, rollout_row, sample_rows, update_row
from rlhf.training.ppo_state import (
    PpoState,
    load_weights,
    read_weights,
    restore,
    save_weights,
    snapshot,
)
from rlhf.training.rollout import (
    Experience,
    Roles,
    build_experience,
    gated_scores,
    iteration_prompts,
    response_mask,
    sequence_kl,
)

log = logging.getLogger(__name__)


class PpoLoop:
    """Trains the policy of `roles` in place; `run` returns when a stop rule fires."""

    def __init__(
        self,
        roles: Roles,
        *,
        prompts: Sequence[Prompt],
        heldout: Sequence[Prompt],
        config: Config,
        directory: NodeDir,
        seed: int,
    ) -> None:
        self._roles, self._prompts, self._heldout = roles, prompts, heldout
        self._config, self._settings = config, config.ppo
        self._directory, self._seed = directory, seed
        self._engine = PpoEngine(roles, config=config, seed=seed, processes=directory.processes)
        self.state = PpoState()
        self._best: dict[str, Tensor] = {}
        self._last_checkpoint = time.monotonic()

    def run(self) -> PpoState:
        """Train until a stop rule fires, then put the best policy's weights back.

        Resumes from the directory's checkpoint. Best means highest held-out score; without
        held-out prompts it is the last policy. Raises StageError for NaN.
        """
        self._resume()
        if self._heldout and not self.state.heldout:
            score = self._measure_heldout()
            self._directory.metrics.append({"step": 0, metrics.PPO_HELDOUT_SCORE: score})
        while self.state.stopped is None:
            self._iterate()
            self._checkpoint_if_due()
            self._directory.step(self.state.iteration, self._settings.iterations)
        if self._heldout:
            restore(self._best, self._roles.policy_parameters(), source="the best policy")
        else:
            self.state.best_iteration = self.state.iteration
        return self.state

    def _iterate(self) -> None:
        state, started = self.state, time.monotonic()
        state.iteration += 1
        experience = self._collect()
        row = {"step": state.iteration, **rollout_row(experience)}
        state.kl_to_start = row[metrics.ROLLOUT_KL_TO_START]
        state.watch(
            finished_fraction=row[metrics.ROLLOUT_FINISHED_FRACTION],
            length=row[metrics.ROLLOUT_RESPONSE_LENGTH],
            settings=self._settings,
        )
        if not state.kl_to_start <= self._settings.kl_stop:
            state.stopped = "kl_stop"
        else:
            with_policy = state.iteration > self._settings.critic_warmup_iterations
            steps = self._engine.update(
                experience, iteration=state.iteration, with_policy=with_policy
            )
            row.update(update_row(steps, experience, with_policy=with_policy))
            if self._heldout_is_due():
                row[metrics.PPO_HELDOUT_SCORE] = self._measure_heldout()
            if state.without_improvement >= self._settings.patience:
                state.stopped = "patience"
            elif state.iteration >= self._settings.iterations:
                state.stopped = "iterations"
        seconds = time.monotonic() - started
        row[metrics.TIME_STEP] = seconds
        row[metrics.TIME_TOKENS_PER_SECOND] = int(experience.response_mask_BT.sum()) / seconds
        self._directory.metrics.append(row)
        for sample in sample_rows(experience, iteration=state.iteration):
            self._directory.samples.append(sample)

    # Rollouts

    def _collect(self) -> Experience:
        """Sample, score and measure one batch of rollouts."""
        chosen = iteration_prompts(
            self._prompts,
            iteration=self.state.iteration - 1,
            batch_size=self._settings.batch_size,
            seed=self._seed,
        )
        rollouts = self._engine.sample(chosen)
        groups = [
            micro
            for minibatch in self._engine.minibatches(iteration=self.state.iteration, epoch=0)
            for micro in self._engine.micros(minibatch, rollouts)
        ]
        return build_experience(
            rollouts,
            self._engine.measure(rollouts, groups),
            settings=self._settings,
            threshold=self._config.gate.threshold,
        )

    # Held-out prompts

    def _heldout_is_due(self) -> bool:
        since_warmup = self.state.iteration - self._settings.critic_warmup_iterations
        if not self._heldout or since_warmup <= 0:
            return False
        is_last = self.state.iteration == self._settings.iterations
        return is_last or since_warmup % self._settings.heldout_every == 0

    def _measure_heldout(self) -> float:
        """Score the policy on held-out prompts and keep its weights if it is the best so far.

        The score is the mean gated score on the scale of the first measurement. A policy beyond
        ppo.kl_stop is never the best one.
        """
        state = self.state
        rollouts = self._engine.sample(
            [(prompt, f"{self._seed}/heldout/{prompt.id}") for prompt in self._heldout]
        )
        groups = self._engine.micros(list(range(len(rollouts))), rollouts)
        measured = self._engine.measure(rollouts, groups)
        kl_B = sequence_kl(
            measured.logprobs_BT, measured.start_logprobs_BT, response_mask(rollouts)
        )
        gated_B, _ = gated_scores(rollouts, threshold=self._config.gate.threshold)
        if state.heldout_scale is None:
            center, spread = mean_and_std(masked_moments(gated_B))
            state.heldout_scale = (float(center), float(spread))
        score = float(whiten_with(gated_B, *state.heldout_scale).mean())
        found = {
            "iteration": state.iteration,
            "score": score,
            "score_helpfulness": mean([r.score_helpfulness for r in rollouts]),
            "score_safety": mean([r.score_safety for r in rollouts]),
            "kl_to_start": float(kl_B.mean()),
        }
        is_better = state.best_score is None or score > state.best_score
        if is_better and found["kl_to_start"] <= self._settings.kl_stop:
            state.best_iteration, state.best_score = state.iteration, score
            state.without_improvement = 0
            self._best = snapshot(self._roles.policy_parameters())
        else:
            state.without_improvement += 1
        state.heldout.append(found)
        for row in heldout_rows(rollouts, kl_B.tolist(), iteration=state.iteration):
            self._directory.heldout.append(row)
        return score

    # Records and checkpoints

    def _checkpoint_if_due(self) -> None:
        every = self._config.checkpoint
        by_steps = every.every_steps is not None and self.state.iteration % every.every_steps == 0
        by_time = time.monotonic() - self._last_checkpoint >= every.every_seconds
        if self._directory.save_now(self.state.iteration, is_due=by_steps or by_time):
            state = {
                "ppo": self.state.to_json(),
                "updates": self._engine.updates,
                **self._conditions(),
            }
            with self._directory.checkpoint(self.state.iteration, state) as folder:
                self._engine.save(folder)
                if self._directory.processes.is_main:
                    save_weights(folder / "policy.safetensors", self._roles.policy_parameters())
                    save_weights(folder / "critic.safetensors", self._roles.critic_parameters())
                    if self._best:
                        save_weights(folder / "best.safetensors", self._best)
            self._last_checkpoint = time.monotonic()

    def _conditions(self) -> dict[str, Any]:
        return conditions(self._config, self._directory.processes)

    def _resume(self) -> None:
        # Every process reads the checkpoint; the logs are cut by the first.
        saved = self._directory.resume()
        if saved is None:
            self._engine.start(None)
            return
        check_conditions(saved, self._conditions(), self._directory)
        self.state = PpoState.from_json(saved.state["ppo"])
        self._engine.updates = dict(saved.state["updates"])
        load_weights(saved.path / "policy.safetensors", self._roles.policy_parameters())
        load_weights(saved.path / "critic.safetensors", self._roles.critic_parameters())
        best = saved.path / "best.safetensors"
        self._best = read_weights(best) if best.exists() else {}
        self._engine.start(saved.path)
        log.info("continuing after iteration %d", self.state.iteration)
