"""The benchmark command on the toy model: generation and fine-tuning, one round."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import ROOT

SIZES = (
    "generation.prompts=4",
    "generation.samples=2",
    "generation.new_tokens=6",
    "sft.steps=2",
    "sft.batch_size=4",
)


def measure(folder: Path, *suites: str, who: tuple[str, ...], check_steps: int) -> dict[str, Any]:
    """Run the command and return what it wrote, Markdown under `page`."""
    command = [sys.executable, "-m", "benchmarks", *suites, "--rounds", "1", "--threads", "1"]
    command += ["--folder", str(folder / "work"), "--out", str(folder / "out")]
    command += ["--wait-seconds", "0", "--repeats", "0", "--precision", "fp32"]
    command += ["--size", *SIZES, f"sft.check_steps={check_steps}", "--contender", *who]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (data,), (page,) = (list((folder / "out").glob(f"*.{end}")) for end in ("json", "md"))
    return {**json.loads(data.read_text()), "page": page.read_text()}


def rows(result: dict[str, Any], suite: str) -> dict[str, dict[str, Any]]:
    """Return a suite's contenders by name."""
    (found,) = (entry for entry in result["suites"] if entry["suite"] == suite)
    return {row["name"]: row for row in found["contenders"]}


def test_one_round_of_generation_and_fine_tuning(tmp_path: Path) -> None:
    who = ("ours", "generate, tuned")
    result = measure(tmp_path, "generation", "sft", who=who, check_steps=0)
    generation, sft = rows(result, "generation"), rows(result, "sft")
    assert set(generation) == set(who)
    for name in who:
        (attempt,) = generation[name]["attempts"]
        assert attempt["facts"]["sequences"] == 8
        assert 8 <= attempt["units"] <= 48
    assert sft["ours"]["attempts"][0]["units"] > 8
    assert "Against Hugging Face generate, best (generate, tuned)" in result["page"]


@pytest.mark.slow
def test_losses_agree_with_a_plain_loop_and_with_trl(tmp_path: Path) -> None:
    result = measure(tmp_path, "sft", who=("machine", "ours", "TRL fp32"), check_steps=2)
    found = rows(result, "sft")
    assert found["ours"]["attempts"][0]["units"] == found["TRL fp32"]["attempts"][0]["units"]
    assert 0 < found["ours"]["mfu"] < 1
    assert found["TRL fp32"]["loss"] == pytest.approx(found["ours"]["loss"], rel=0.01)
    (check,) = (entry["check"] for entry in result["suites"])
    assert check["ours"] == pytest.approx(check["plain"], abs=1e-4)
    assert check["start"] - check["ours"] > 1e-3
