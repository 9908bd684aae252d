"""PPO's metrics over 20 iterations and rejection's choices stay what they were."""

import json
from pathlib import Path

import pytest
from golden.record_ppo import FOLDER, STAGES, steps


@pytest.mark.parametrize("stage", STAGES)
def test_steps_equal_the_recorded_ones(tmp_path: Path, stage: str) -> None:
    recorded = json.loads((FOLDER / f"{stage}.json").read_text())["steps"]
    found = steps(stage, tmp_path)
    assert len(found) == len(recorded) >= 20
    for number, (ours, golden) in enumerate(zip(found, recorded, strict=True), start=1):
        assert ours == pytest.approx(golden, rel=1e-3, abs=1e-5), f"step {number}"
    # Small errors of one sign add up to a drift that no single step shows.
    for name in ("ppo/value_loss", "rollout/score", "helpfulness/0"):
        residuals = [
            ours[name] - golden[name]
            for ours, golden in zip(found, recorded, strict=True)
            if name in golden
        ]
        assert abs(sum(residuals)) <= 1e-5 * max(1, len(residuals))
