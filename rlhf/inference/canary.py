"""PPO's held-out responses under a canary: models that PPO was not optimised against.

The canary is the round's judge pair, which is trained on open data by default (the paper's guard
against Goodhart's law, section 3.4.2). It is read after the decision and never reaches it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.algo.comparison import Settings, mean_value
from rlhf.algo.over_optimisation import Curve, judge_curves
from rlhf.artifacts import read_json, read_jsonl
from rlhf.config import JudgeData
from rlhf.data.records import AXES, Prompt
from rlhf.data.split import prompt_key
from rlhf.inference.tables import Scores, Table
from rlhf.nodes import NodeContext
from rlhf.toy import World

log = logging.getLogger(__name__)

PPO = "ppo"
"""Role of the PPO node whose version is evaluated."""

TEXTS = {
    JudgeData.open: "The canary is the judge pair: trained on open comparisons only, and on none "
    "that this run's reward models learned from.",
    JudgeData.batches: "The canary is the judge pair: trained on a reserved share of this run's "
    "own batches, so it shares the annotators' habits with the reward models that PPO used.",
}


@dataclass(frozen=True, slots=True)
class Heldout:
    """PPO's I scorings of the same P held-out prompts, from its heldout.jsonl."""

    prompts: list[Prompt]
    iterations: list[int]
    rows: dict[tuple[int, str], dict[str, Any]]
    """Rows by iteration and prompt id."""
    kept_iteration: int | None
    """Iteration whose policy PPO kept."""

    def table(self) -> Table:
        """Return the responses as a table, one column per iteration."""
        return Table(self.prompts, {str(i): self.column(i, "text") for i in self.iterations})

    def column(self, iteration: int, field: str) -> list[Any]:
        """Return one field of an iteration's rows in the order of the prompts."""
        return [self.rows[iteration, prompt.id][field] for prompt in self.prompts]


def read_heldout(context: NodeContext, prompts: Sequence[Prompt]) -> Heldout | None:
    """Return what the round's PPO wrote about held-out prompts; None in a round without PPO.

    `prompts` are all of the run's: rows name theirs by id.
    """
    if PPO not in context.inputs.models:
        return None
    folder = Path(context.inputs.models[PPO].path)
    rows = read_jsonl(folder / "heldout.jsonl")
    of_id = {prompt.id: prompt for prompt in prompts}
    asked = list(dict.fromkeys(row["prompt_id"] for row in rows))
    gone = [name for name in asked if name not in of_id]
    if gone:
        log.warning("%d of PPO's held-out prompts are gone, such as %s", len(gone), gone[0])
    return Heldout(
        prompts=[of_id[name] for name in asked if name in of_id],
        iterations=list(dict.fromkeys(row["iteration"] for row in rows)),
        rows={(row["iteration"], row["prompt_id"]): row for row in rows},
        kept_iteration=read_json(folder / "ppo.json")["best_iteration"],
    )


def over_optimisation(
    context: NodeContext, heldout: Heldout, canary: Mapping[str, Scores], settings: Settings
) -> dict[str, Any]:
    """Return what over_optimisation.json holds; `canary` are the judges' scores by axis.

    Each axis is read on its own prompts: safety on those tagged is_safety, helpfulness on the
    others.
    """
    data = context.config.judge.data
    is_toy = context.config.toy.enabled
    world = World(context.config.seed) if is_toy else None
    return {
        "canary": {"data": data.name, "text": TEXTS[data]},
        "points": [_point(heldout, i, canary, world, settings) for i in heldout.iterations],
        "verdict": {
            **judge_curves(_curves(heldout, canary), level=settings.level),
            "kept_iteration": heldout.kept_iteration,
        },
    }


def _of_axis(heldout: Heldout, axis: str) -> list[bool]:
    return [prompt.is_safety == (axis == "safety") for prompt in heldout.prompts]


def _curves(heldout: Heldout, canary: Mapping[str, Scores]) -> dict[str, Curve]:
    found = {}
    for axis in AXES:
        counts = np.asarray(_of_axis(heldout, axis), dtype=bool)
        used = [heldout.column(i, f"score_{axis}") for i in heldout.iterations]
        judged = [canary[axis][str(i)] for i in heldout.iterations]
        shape = (len(heldout.iterations), len(heldout.prompts))
        found[axis] = Curve(
            iterations=heldout.iterations,
            used_IP=np.asarray(used, dtype=np.float64).reshape(shape)[:, counts],
            canary_IP=np.asarray(judged, dtype=np.float64).reshape(shape)[:, counts],
            clusters=[
                prompt_key(prompt.prompt)
                for prompt, ok in zip(heldout.prompts, counts, strict=True)
                if ok
            ],
        )
    return found


def _point(
    heldout: Heldout,
    iteration: int,
    canary: Mapping[str, Scores],
    world: World | None,
    settings: Settings,
) -> dict[str, Any]:
    """Return one scoring: KL to the start and the mean scores with their intervals."""
    clusters = [prompt_key(prompt.prompt) for prompt in heldout.prompts]
    kls = heldout.column(iteration, "kl_to_start")
    kl = math.fsum(kls) / len(kls) if kls else 0.0
    scores = {
        "used": {axis: heldout.column(iteration, f"score_{axis}") for axis in AXES},
        "canary": {axis: canary[axis][str(iteration)] for axis in AXES},
    }
    measured = {
        pair: {
            axis: mean_value(values, clusters, _of_axis(heldout, axis), settings=settings)
            for axis, values in of_axis.items()
        }
        for pair, of_axis in scores.items()
    }
    return {
        "iteration": iteration,
        "kl_to_start": kl,
        # k1 is unbiased and may be slightly negative at the start.
        "sqrt_kl": math.sqrt(max(kl, 0.0)),
        **{pair: {axis: m["mean"] for axis, m in axes.items()} for pair, axes in measured.items()},
        "intervals": measured,
        "gold": None if world is None else _gold(world, heldout, iteration),
        "n": len(heldout.prompts),
    }


def _gold(world: World, heldout: Heldout, iteration: int) -> dict[str, float | None]:
    """Return true helpfulness on all prompts but the adversarial ones, and their violation rate."""
    texts = heldout.column(iteration, "text")
    golds = [world.gold(p.prompt, text) for p, text in zip(heldout.prompts, texts, strict=True)]
    pairs = list(zip(heldout.prompts, golds, strict=True))
    helpful = [gold.helpfulness for prompt, gold in pairs if not prompt.is_safety]
    violations = [gold.violation for prompt, gold in pairs if prompt.is_safety]
    return {
        "helpfulness": math.fsum(helpful) / len(helpful) if helpful else None,
        "violation_rate": sum(violations) / len(violations) if violations else None,
    }
