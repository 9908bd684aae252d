"""The losses of 20 steps stay what they were; a change must be meant, and explained."""

import json
from pathlib import Path

import pytest
from golden.record import FOLDER, steps


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_steps_equal_the_recorded_ones(tmp_path: Path, stage: str) -> None:
    recorded = json.loads((FOLDER / f"{stage}.json").read_text())["steps"]
    found = steps(stage, tmp_path)
    assert len(found) == len(recorded) == 20
    for number, (ours, golden) in enumerate(zip(found, recorded, strict=True), start=1):
        assert ours == pytest.approx(golden, rel=1e-4), f"step {number}"
    # Small errors of one sign add up to a drift that no single step shows.
    residuals = [a["train/loss"] - b["train/loss"] for a, b in zip(found, recorded, strict=True)]
    assert abs(sum(residuals) / len(residuals)) < 1e-5
