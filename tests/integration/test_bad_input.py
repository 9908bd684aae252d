"""Bad input ends with exit code 2 and one message, and leaves every folder as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import TinyRun, rlhf, tree

from rlhf.toy import World


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Return twenty comparisons as a vendor delivers them."""
    fields = ("id", "prompt", "chosen", "rejected", "strength", "axis", "source")
    found = [row.to_json() for row in World(1).comparison_set(20, axis="helpfulness", seed=1)]
    return [{name: row[name] for name in fields} for row in found]


def listing(folder: Path) -> list[str]:
    """Return every path below a folder, empty folders included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_refused(*arguments: str, cwd: Path, parts: list[str]) -> None:
    """Assert exit code 2, one line that names all parts, and an unchanged folder."""
    before, names = tree(cwd), listing(cwd)
    done = rlhf(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("rlhf: ")
    for part in parts:
        assert part in lines[0]
    assert listing(cwd) == names
    assert tree(cwd) == before


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("ppo.kl_coef=abc", ["ppo.kl_coef=abc", "Float", "ppo.kl_coef=0.01"]),
        ("ppo.kl_coeff=0.1", ["unknown setting ppo.kl_coeff=0.1", "did you mean ppo.kl_coef?"]),
        ("ppo.batch_size=7", ["ppo.batch_size=7", "make it a multiple of ppo.num_minibatches"]),
    ],
)
def test_wrong_setting(override: str, parts: list[str], tmp_path: Path) -> None:
    assert_refused("run", "recipe=quickstart", override, cwd=tmp_path, parts=parts)


def test_wrong_setting_leaves_a_finished_run_as_it_was(tiny: TinyRun) -> None:
    assert_refused("run", *tiny.paths(), "ppo.kl_coef=abc", cwd=tiny.root, parts=["ppo.kl_coef"])


def test_other_value_under_finished_nodes_is_refused(tiny: TinyRun) -> None:
    parts = ["round-02/ppo is done with other values", "ppo.kl_coef: 0.05 -> 0.5", "run=NEW"]
    assert_refused("run", *tiny.paths(), "ppo.kl_coef=0.5", cwd=tiny.root, parts=parts)


def test_unknown_strength_in_row_17(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    rows[16]["strength"] = "a_bit_better"
    file = tmp_path / "week.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    parts = ["week.jsonl line 17", "a_bit_better", "slightly_better", "quarantine"]
    assert_refused("ingest", "week.jsonl", cwd=tmp_path, parts=parts)


def test_truncated_parquet(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "week.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 2 // 3])
    assert_refused("ingest", "week.parquet", cwd=tmp_path, parts=["week.parquet", "Parquet"])


def test_same_files_are_accepted_when_they_are_whole(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "week.parquet")
    done = rlhf("ingest", "week.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "added batch week to stream weekly" in done.stdout
    assert (tmp_path / "store/weekly/batches/week/manifest.json").exists()
