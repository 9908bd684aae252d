"""Record the golden losses: 20 optimizer steps of SFT and of a reward model on fixed rows.

Run `python tests/golden/record.py` only when the numbers are meant to move, and say why in the
commit that changes the JSON files.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import micro_models as micro  # noqa: E402

from rlhf.models.loading import setup_torch  # noqa: E402

NAMES = ("train/loss", "train/lr", "train/grad_norm", "train/safety_loss")


def steps(stage: str, folder: Path) -> list[dict[str, float]]:
    """Train 20 steps (two epochs of 76 rows, the last batch of each incomplete)."""
    setup_torch(micro.config().compute)
    if stage == "sft":
        directory = micro.train_sft(micro.policy(), micro.conversations(76), folder, epochs=2)
    else:
        scorer = micro.scorer_over(micro.policy(), seed=0)
        directory = micro.train_reward(scorer, micro.pairs(76), folder, epochs=2)
    rows = micro.rows_without_time(directory.metrics)
    return [{name: row[name] for name in NAMES if name in row} for row in rows]


def environment() -> dict[str, str]:
    """Return where the numbers come from."""
    return {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "precision": "fp32",
        "num_threads": "1",
    }


def main() -> None:
    for stage in ("sft", "reward"):
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
