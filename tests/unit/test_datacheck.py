"""`rlhf drift` and `rlhf quality` from the command line, on generated batches and on real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drift_world import Recipe, batches, draw, for_vendor

from rlhf import cli, datacheck
from rlhf.artifacts import list_files, write_json
from rlhf.compose import load

WEEKLY = Path(__file__).parents[3] / "shared" / "data" / "weekly"
Rows = list[dict[str, Any]]
WEEKS = ("w1", "w2", "w3")


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def renamed(rows: Sequence[dict[str, Any]], *, seed: int) -> Rows:
    """Return the rows in another order under new ids."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [{**rows[i], "id": f"copy-{place}"} for place, i in enumerate(order)]


def alarms(reports: Sequence[Any]) -> list[str]:
    return [
        item["text"] for r in reports for item in r["lines"] if item["verdict"] != "as expected"
    ]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def weeks(here: Path) -> dict[str, Rows]:
    """Two weeks of one population, then one that turned to safety and has a new source."""
    recipe = Recipe(rows_per_prompt=4, safety=0.15)
    first, second = (rows[:400] for rows in batches(draw(recipe, 1500, seed=1), (400, 400), seed=1))
    third = draw(recipe.but(safety=0.75), 400, seed=2)
    third = [{**row, "source": "new-vendor"} if i % 3 == 0 else row for i, row in enumerate(third)]
    found = dict(zip(WEEKS, map(for_vendor, (first, second, third)), strict=True))
    for name, rows in found.items():
        write(here / f"{name}.jsonl", rows)
    return found


def ingest(*names: str) -> None:
    assert cli.main(["ingest", *(f"{name}.jsonl" for name in names)]) == 0


def test_ingest_says_the_verdict_of_every_batch(
    weeks: dict[str, Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    ingest(*WEEKS)
    lines = [text for text in capsys.readouterr().out.splitlines() if text.startswith("drift of")]
    assert lines[0] == "drift of w1: the first batch, nothing to compare with"
    assert lines[1] == "drift of w2 against w1: as expected"
    assert lines[2].startswith("drift of w3 against 2 earlier batches: stop (")
    assert "safety 1" in lines[2]
    ingest("w3")
    assert "drift of" not in capsys.readouterr().out


def test_ingest_of_other_kinds_says_nothing_of_drift(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here / "p.jsonl", [{"prompt": f"question {i}"} for i in range(9)])
    ingest("p")
    assert "drift" not in capsys.readouterr().out


def test_the_table_has_a_line_per_measure(
    weeks: dict[str, Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    ingest(*WEEKS)
    capsys.readouterr()
    assert cli.main(["drift"]) == 0
    out = capsys.readouterr().out
    assert "w3 (400 comparisons) against w1, w2" in out
    for word in (
        "strength:",
        "axis: safety",
        "source:",
        "new-vendor is new",
        "vocabulary: more",
    ):
        assert word in out
    assert cli.main(["drift", "w1", "w2"]) == 0
    out = capsys.readouterr().out
    assert "w1 (400 comparisons) against nothing: it is the first batch" in out
    assert out.count("drift of") == 2


def test_a_file_is_judged_as_if_it_were_ingested_and_nothing_is_written(
    weeks: dict[str, Rows], here: Path
) -> None:
    ingest("w1", "w2")
    before = list_files(here)
    config = load([], needs_run=False)
    (tried,) = datacheck.report_drift(config, ["w3.jsonl"], against=[])
    assert list_files(here) == before
    ingest("w3")
    (stored,) = datacheck.report_drift(config, ["w3"], against=[])
    assert tried == stored
    assert tried["verdict"] == "stop"
    assert tried["against"] == ["w1", "w2"]


def test_rows_that_repeat_the_store_are_left_out_unless_a_side_is_named(
    weeks: dict[str, Rows], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ingest("w1", "w2")
    write(here / "copy.jsonl", renamed(weeks["w2"], seed=1))
    assert cli.main(["drift", "copy.jsonl"]) == 2
    assert "all its rows are in stream weekly already" in capsys.readouterr().err
    config = load([], needs_run=False)
    (report,) = datacheck.report_drift(config, ["copy.jsonl"], against=["w2"])
    assert report["rows"] == 400
    assert report["verdict"] == "as expected"
    assert {item["effect"] for item in report["lines"]} <= {0.0, None}
    some = [*renamed(weeks["w2"], seed=2)[:100], *weeks["w3"]]
    write(here / "some.jsonl", some)
    (report,) = datacheck.report_drift(config, ["some.jsonl"], against=[])
    assert report["rows"] == 400


def test_withdrawn_rows_are_nobodys_original(weeks: dict[str, Rows], here: Path) -> None:
    """Rows that a vendor took back and delivers anew under other ids are new rows."""
    ingest("w1", "w2")
    taken_back = weeks["w1"][:60]
    write(here / "again.jsonl", renamed(taken_back, seed=0))
    assert cli.main(["drift", "again.jsonl"]) == 2
    (here / "ids.txt").write_text("".join(f"{row['id']}\n" for row in taken_back))
    assert cli.main(["ingest", "ingest.retract=ids.txt"]) == 0
    assert cli.main(["drift", "again.jsonl"]) == 0


def test_halves_of_a_file_are_compared_with_each_other(
    weeks: dict[str, Rows], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = renamed(weeks["w3"], seed=3)
    write(here / "a.jsonl", mixed[:200])
    write(here / "b.jsonl", mixed[200:])
    assert cli.main(["drift", "a.jsonl", "against=b.jsonl"]) == 0
    assert "drift of a against b: as expected" in capsys.readouterr().out
    assert not (here / "store").exists()


def test_what_is_not_there_and_what_is_broken(
    weeks: dict[str, Rows], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["drift"]) == 2
    assert "has no batch" in capsys.readouterr().err
    ingest("w1")
    capsys.readouterr()
    for line, message in (
        ("drift w9", "w9 is neither a batch of the stream (there: w1) nor a file"),
        ("drift w1 against=w8", "w8 is neither a batch"),
        ("quality w9", "batch 'w9' is not in stream 'weekly'"),
        ("quality by=model", "by=model is unknown: choose one of annotator, source"),
    ):
        assert cli.main(line.split()) == 2
        assert message in capsys.readouterr().err
    write(here / "bad.jsonl", [{**weeks["w3"][0], "strength": "huge"}])
    assert cli.main(["drift", "bad.jsonl"]) == 2
    assert "strength='huge'" in capsys.readouterr().err


def test_a_run_adds_what_its_reward_models_said_on_arrival(
    weeks: dict[str, Rows], here: Path
) -> None:
    ingest(*WEEKS)
    config = load(["recipe=smollm2"])
    folder = here / "runs" / "smollm2"
    rounds = [{"round": k, "stage": "ppo", "batches": [f"w{k}"]} for k in (1, 2, 3)]
    plan = {"run": "smollm2", "recipe": "smollm2", "rounds": rounds, "nodes": []}
    write_json(folder / "plan.json", plan)
    for number, name, accuracy in ((2, "accuracy.json", 0.8), (3, "accuracy_before.json", 0.5)):
        limits = {"low": accuracy - 0.05, "high": accuracy + 0.05}
        cell = {"source": None, "batch": None, "n": 300, "prompts": 300, "accuracy": accuracy}
        cells = [
            {**cell, **limits, "axis": "safety", "strength": strength}
            for strength in ("better", None)
        ]
        write_json(folder / f"round-0{number}" / "reward-safety" / name, {"cells": cells})
    (report,) = datacheck.report_drift(config, ["w3"], against=[])
    found = report["lines"][-1]
    assert found["measure"] == "accuracy_safety"
    assert (found["value"], found["before"], found["verdict"]) == (0.5, 0.8, "stop")
    (report,) = datacheck.report_drift(config, ["w2"], against=[])
    assert report["lines"][-1]["measure"] == "vocabulary"


def test_quality_finds_the_person_who_only_says_one_thing(
    weeks: dict[str, Rows], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = [
        {**row, "strength": "slightly_better"} if row["annotator"] == "person-3" else row
        for row in weeks["w1"]
    ]
    write(here / "w1.jsonl", odd)
    ingest(*WEEKS[:2])
    capsys.readouterr()
    assert cli.main(["quality", "w1"]) == 0
    out = capsys.readouterr().out
    flags = [text for text in out.splitlines() if text.startswith("person-")]
    assert len(flags) == 1
    assert flags[0].startswith("person-3: says slightly_better in 100 % of ")
    assert cli.main(["quality", "w2"]) == 0
    assert "no flags" in capsys.readouterr().out


def test_quality_takes_scores_of_a_run(weeks: dict[str, Rows], here: Path) -> None:
    ingest("w1")
    config = load(["recipe=smollm2"])
    folder = here / "runs" / "smollm2"
    rounds = [{"round": 1, "stage": "ppo", "batches": ["w1"]}]
    plan = {"run": "smollm2", "recipe": "smollm2", "rounds": rounds, "nodes": []}
    write_json(folder / "plan.json", plan)
    node = folder / "round-01" / "reward-safety"
    node.mkdir(parents=True)
    graded = [row for row in weeks["w1"] if not row["tie"]]
    ids = [row["id"] for row in graded if row["axis"] == "safety"][:20]
    other = [row["id"] for row in graded if row["axis"] == "helpfulness"][:5]
    held = {"batch": "w1", "axis": "safety", "chosen_score": 1.0, "rejected_score": 0.0}
    rows = [{**held, "id": id} for id in ids]
    # A model's scores on the other axis say nothing about agreement.
    rows += [{**held, "id": id, "axis": "helpfulness"} for id in other]
    write(node / "scores.jsonl", rows)
    write(node / "scores_before.jsonl", [{**rows[0], "chosen_score": -1.0}])
    write_json(node / "manifest.json", {"files": {}})
    report = datacheck.report_quality(config, [], by="annotator")
    assert sum(row["agreement"]["n"] for row in report["rows"]) == 20
    agreed = sum(
        row["agreement"]["mean"] * row["agreement"]["n"]
        for row in report["rows"]
        if row["agreement"]["n"]
    )
    assert agreed == pytest.approx(19)


@pytest.mark.real_data
@pytest.mark.skipif(not WEEKLY.exists(), reason="../shared/data is not there")
def test_real_weeks_name_what_changes_and_nothing_else(here: Path) -> None:
    files = sorted(WEEKLY.glob("*.jsonl"))
    assert cli.main(["ingest", *map(str, files)]) == 0
    config = load([], needs_run=False)
    ids = [path.stem for path in files]
    reports = datacheck.report_drift(config, ids, against=[])
    assert [report["verdict"] for report in reports] == [
        *("as expected", "look", "stop", "stop", "stop", "stop")
    ]
    for report in reports[1:]:
        found = {item["measure"]: item for item in report["lines"]}
        assert found["source"]["verdict"] in ("look", "stop"), report["batch"]
        # W39 alone, whose prompts are few, might by chance have as many safety comparisons.
        loud = ("as expected",) if report["batch"] == "2026-W39" else ("look",)
        assert found["axis"]["verdict"] in loud, report["batch"]
        assert found["axis"]["value"]["safety"] > found["axis"]["before"]["safety"]
        for measure in ("strength", "response_length", "ties", "safety_bins"):
            assert found[measure]["verdict"] == "as expected"
    (far,) = datacheck.report_drift(config, ["2026-W43"], against=["2026-W38"])
    found = {item["measure"]: item for item in far["lines"]}
    assert found["axis"]["verdict"] == found["source"]["verdict"] == "stop"
    assert "safety 12 % -> 51 %" in found["axis"]["text"]
    assert "fastchat_vicuna_reviews 50 % -> 6 %" in found["source"]["text"]
    assert "pandalm_human is gone (was 29 %)" in found["source"]["text"]


@pytest.mark.real_data
@pytest.mark.skipif(not WEEKLY.exists(), reason="../shared/data is not there")
def test_real_weeks_are_quiet_about_copies_and_halves(here: Path) -> None:
    for path in sorted(WEEKLY.glob("*.jsonl")):
        assert cli.main(["ingest", str(path), f"ingest.stream={path.stem}"]) == 0
        rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        config = load([f"ingest.stream={path.stem}"], needs_run=False)
        copy = write(here / "copy.jsonl", renamed(rows, seed=1))
        copies = datacheck.report_drift(config, [str(copy)], against=[path.stem])
        assert alarms(copies) == []
        for seed in (1, 2):
            mixed = renamed(rows, seed=seed)
            sides = [
                write(here / f"{name}.jsonl", part)
                for name, part in (("a", mixed[::2]), ("b", mixed[1::2]))
            ]
            halves = datacheck.report_drift(config, [str(sides[0])], against=[str(sides[1])])
            assert alarms(halves) == []
