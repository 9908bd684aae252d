"""Record the golden numbers of PPO and of rejection sampling on micro models.

Run `python tests/golden/record_ppo.py` only when the numbers are meant to move, and say why in the
commit that changes the JSON files.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import micro_models as micro  # noqa: E402
import micro_ppo  # noqa: E402
import micro_stages  # noqa: E402
from golden.record import environment  # noqa: E402

from rlhf.config import Rejection, Sampling  # noqa: E402
from rlhf.data.records import AXES  # noqa: E402
from rlhf.inference.best_of import Part, sample_and_score  # noqa: E402
from rlhf.inference.winners import choose_winner, selection_curves  # noqa: E402
from rlhf.models.loading import save_model, setup_torch  # noqa: E402

STAGES = ("ppo", "rejection")


def ppo_steps(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of 20 PPO iterations, two of them warm-up, with held-out scores."""
    made = micro_ppo.config(
        iterations=20, critic_warmup_iterations=2, heldout_every=5, patience=100, lr=3e-4
    )
    roles = micro_ppo.roles(made, finishes=True, tokenizer=micro_ppo.byte_tokenizer())
    loop = micro_ppo.loop(made, folder, given=roles)
    loop.run()
    return micro.rows_without_time(loop._directory.metrics)


def rejection_steps(folder: Path) -> list[dict[str, float]]:
    """Return per prompt what was sampled and who won, then the curves against N."""
    made = micro_stages.config(folder)
    made.model.max_length = 64
    made.rejection = Rejection(
        sampling=Sampling(temperature=1.2, max_new_tokens=6, batch_size=16), num_samples=4
    )
    tokenizer = micro_ppo.byte_tokenizer()
    models = {"policy": micro_ppo.save_finishing_policy(folder / "policy", tokenizer=tokenizer)}
    for seed, axis in enumerate(AXES, start=1):
        save_model(micro.scorer(seed), tokenizer, folder / axis)
        models[f"reward_{axis}"] = str(folder / axis)
    context = micro_stages.context(
        made, name="rejection", stage="rejection", models=models, data=[], seed=7
    )
    device = setup_torch(made.compute)
    rows = sample_and_score(
        context, micro_ppo.prompts(19), tokenizer, device, seed=context.seed, part=Part()
    )
    steps: list[dict[str, float]] = []
    for number, row in enumerate(rows):
        winner = choose_winner(row, threshold=made.gate.threshold)
        step: dict[str, float] = {"step": number, "winner": -1 if winner is None else winner}
        for index, response in enumerate(row["responses"]):
            for name in ("num_tokens", "helpfulness", "safety"):
                step[f"{name}/{index}"] = response[name]
        steps.append(step)
    curves = selection_curves(rows)
    steps.append(
        {
            f"{axis}/{name}/{n}": value
            for axis, curve in curves.items()
            for name in ("max", "median")
            for n, value in enumerate(curve[name], start=1)
        }
    )
    return steps


def steps(stage: str, folder: Path) -> list[dict[str, float]]:
    """Return the numbers of one stage."""
    setup_torch(micro.config().compute)
    return ppo_steps(folder) if stage == "ppo" else rejection_steps(folder)


def main() -> None:
    for stage in STAGES:
        with tempfile.TemporaryDirectory() as folder:
            recorded: dict[str, Any] = {
                "environment": environment(),
                "steps": steps(stage, Path(folder)),
            }
        path = FOLDER / f"{stage}.json"
        path.write_text(json.dumps(recorded, indent=1) + "\n")
        sys.stdout.write(f"wrote {path}\n")


if __name__ == "__main__":
    main()
