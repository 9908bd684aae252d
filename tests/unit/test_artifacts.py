"""Atomic files, checkpoints and manifests, and what is left after a kill at each boundary."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf.artifacts import (
    NodeDir,
    atomic_folder,
    digest_json,
    list_files,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_manifest,
    write_parts,
)
from rlhf.errors import ArtifactError


def run_killed(code: str, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run code in a process that the fault injection kills."""
    monkeypatch.setenv("RLHF_KILL_AT", at)
    imports = "from pathlib import Path; from rlhf.artifacts import *; "
    done = subprocess.run([sys.executable, "-c", imports + code], check=False)
    monkeypatch.delenv("RLHF_KILL_AT")
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("at", "expected"), [("before-temp", "old"), ("before-rename", "old"), ("after-rename", "new")]
)
def test_a_killed_write_leaves_the_old_file_or_the_new(
    at: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value.json"
    write_json(path, "old")
    run_killed(f"write_json(Path({str(path)!r}), 'new')", f"{at}:value", monkeypatch)
    assert read_json(path) == expected


@pytest.mark.parametrize(("at", "step"), [("before-rename", 1), ("after-rename", 2)])
def test_a_killed_checkpoint_is_whole_or_absent(
    at: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        f"d = NodeDir(Path({str(tmp_path)!r})); "
        'exec(\'for s in (1, 2):\\n d.metrics.append({"s": s})\\n'
        ' with d.checkpoint(s, {"s": s}) as f: write_json(f / "w.json", s)\')'
    )
    run_killed(code, f"{at}:checkpoints/step-00000002", monkeypatch)
    directory = NodeDir(tmp_path)
    saved = directory.resume()
    assert saved is not None
    assert (saved.step, saved.state) == (step, {"s": step})
    assert read_json(saved.path / "w.json") == step
    assert read_jsonl(directory.metrics.path) == [{"s": s} for s in range(1, step + 1)]


def test_threads_that_write_a_file_at_once_write_one_after_the_other(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=30)

    def parts(text: bytes) -> Iterator[bytes]:
        yield text
        together.wait()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(write_parts, tmp_path / "a", parts(t)) for t in (b"x", b"yy")]:
            done.result()
    assert (tmp_path / "a").read_bytes() in (b"x", b"yy")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_resume_passes_over_incomplete_checkpoints_and_cuts_the_logs(tmp_path: Path) -> None:
    directory = NodeDir(tmp_path, keep=5)
    for step in (1, 2, 3):
        directory.metrics.append({"step": step})
        directory.samples.append({"sample": step})
        with directory.checkpoint(step, {"at": step}) as folder:
            (folder / "weights.bin").write_bytes(b"x" * step)
    directory.metrics.append({"step": 4})
    (directory.checkpoints / "step-00000003/weights.bin").write_bytes(b"short")
    (directory.checkpoints / "step-00000009").mkdir()

    saved = directory.resume()
    assert saved is not None
    assert (saved.step, saved.state) == (2, {"at": 2})
    assert [row["step"] for row in read_jsonl(directory.metrics.path)] == [1, 2]
    assert [row["sample"] for row in read_jsonl(directory.samples.path)] == [1, 2]


def test_without_a_checkpoint_the_logs_start_again(tmp_path: Path) -> None:
    directory = NodeDir(tmp_path)
    directory.metrics.append({"step": 1})
    assert directory.resume() is None
    assert read_jsonl(directory.metrics.path) == []


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    directory = NodeDir(tmp_path, keep=2)
    for step in range(1, 5):
        with directory.checkpoint(step, {}):
            pass
    assert [path.name for path in sorted(directory.checkpoints.iterdir())] == [
        "step-00000003",
        "step-00000004",
    ]


def test_a_failed_block_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        write_json(folder / "a.json", 1)

    def fail() -> None:
        with atomic_folder(target) as folder:
            write_json(folder / "b.json", 2)
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fail()
    assert [path.name for path in target.iterdir()] == ["a.json"]


def test_a_node_is_done_when_its_manifest_matches_its_files(tmp_path: Path) -> None:
    directory = NodeDir(tmp_path)
    write_json(directory.model / "weights.json", 1)
    assert not directory.is_done()
    with pytest.raises(ArtifactError, match="is not finished"):
        directory.manifest()
    write_manifest(tmp_path, {"node": "sft"})
    assert directory.is_done()
    assert directory.manifest()["node"] == "sft"
    write_json(directory.model / "weights.json", 12345)
    assert not directory.is_done()


def test_the_digest_covers_results_but_not_logs(tmp_path: Path) -> None:
    directory = NodeDir(tmp_path)
    write_json(directory.model / "weights.json", 1)
    first = write_manifest(tmp_path, {})["digest"]
    for name in ("metrics.jsonl", "provenance.json", "config.yaml", "log.txt", "progress.json"):
        write_json(tmp_path / name, "other")
    assert write_manifest(tmp_path, {"wall_seconds": 3})["digest"] == first
    write_json(directory.model / "weights.json", 2)
    assert write_manifest(tmp_path, {})["digest"] != first


def test_leases_logs_checkpoints_and_hidden_files_are_no_artifacts(tmp_path: Path) -> None:
    for name in ("lease.json", "log.txt", "progress.json", ".x.tmp", "wandb/a", "checkpoints/b"):
        write_json(tmp_path / name, 1)
    write_json(tmp_path / "scores.json", 1)
    assert list(list_files(tmp_path)) == ["scores.json"]


def test_rows_survive_a_round_trip_and_a_missing_file_is_empty(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b \u00e9"}, {"text": "line\nbreak"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"a.json is not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ArtifactError, match=r"b.json is missing"):
        read_json(tmp_path / "b.json")


def test_json_digests_ignore_key_order() -> None:
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json(json.loads('{"b":[1,2],"a":1}'))
    assert digest_json({"a": [1, 2]}) != digest_json({"a": [2, 1]})
