"""The benchmark command on the toy model: generation and fine-tuning, one round."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny_run import ROOT

SIZES = (
    "generation.prompts=4",
    "generation.samples=2",
    "generation.new_tokens=6",
    "sft.steps=2",
    "sft.batch_size=4",
    "sft.check_steps=0",
)
WHO = ("machine", "ours", "generate, tuned", "TRL fp32")


def test_one_round_of_generation_and_fine_tuning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "generation", "sft", "--rounds", "1"]
    command += ["--folder", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    command += ["--wait-seconds", "0", "--repeats", "0", "--threads", "1"]
    command += ["--precision", "fp32", "--size", *SIZES, "--contender", *WHO]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    generation, sft = result["suites"]
    found = {row["name"]: row for row in generation["contenders"]}
    assert set(found) == {"machine", "ours", "generate, tuned"}
    for name in ("ours", "generate, tuned"):
        (attempt,) = found[name]["attempts"]
        assert 8 <= attempt["units"] <= 48
        assert attempt["facts"]["sequences"] == 8
        assert 0 < found[name]["mfu"] < 1
    trained = {row["name"]: row for row in sft["contenders"]}
    units = {trained[name]["attempts"][0]["units"] for name in ("ours", "TRL fp32")}
    assert len(units) == 1
    # Other batches of the same rows: the losses agree, but not to the last digit.
    losses = [trained[name]["loss"] for name in ("ours", "TRL fp32")]
    assert abs(losses[0] / losses[1] - 1) < 0.01
    text = next((tmp_path / "out").glob("*.md")).read_text()
    assert "## generation, fp32" in text
    assert "Against TRL, best (TRL fp32)" in text
