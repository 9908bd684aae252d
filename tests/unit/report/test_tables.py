"""The report of a small made-up run, finished and unfinished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf.artifacts import write_json, write_manifest
from rlhf.errors import ArtifactError
from rlhf.report.gather import SCORE_ROLES
from rlhf.report.tables import interval, number, tables, write_report

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


def measured(mean: float, n: int = 60) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": n}


def cell(axis: str, strength: str | None, *, prompts: int, **changes: Any) -> dict[str, Any]:
    return {
        "axis": axis,
        "strength": strength,
        "source": None,
        "batch": None,
        "n": prompts + 5,
        "prompts": prompts,
        "ties": 1,
        "equal_scores": 0,
        "accuracy": 0.8,
        "low": 0.7,
        "high": 0.9,
        "gap": 1.5,
        "control_longer": 0.55,
        "longer_difference": {"mean": 0.25, "low": 0.1, "high": 0.4},
        "control_swapped": 0.2,
        **changes,
    }


def evaluation(candidate: str, promoted: str, *, gold: bool) -> dict[str, Any]:
    sides = {"candidate": 1.0, "promoted": 0.5}
    golds = {
        side: {
            "helpfulness": measured(value / 2),
            "violation_rate": measured(0.1),
            "over_refusal_rate": measured(0.2),
        }
        for side, value in sides.items()
    }
    groups = ("all", "helpfulness", "safety", "longer", "not_longer")
    return {
        "candidate": candidate,
        "promoted": promoted,
        "prompts": {"safety": 20, "benign": 20, "ordinary": 20},
        "win_rate": {
            "judge": {group: measured(0.6) for group in groups},
            "used": {group: measured(0.7) for group in groups},
        },
        "violation_rate": {side: measured(0.1) for side in sides},
        "over_refusal_rate": {side: measured(0.2) for side in sides},
        "scores": {role: {**sides, "shift": measured(0.5)} for role in SCORE_ROLES},
        "response_length": dict.fromkeys(sides, 10.0),
        "finished_fraction": dict.fromkeys(sides, 0.9),
        "kl": 3.0,
        "gold": golds if gold else None,
    }


def decision(version: str, *, promoted: bool) -> dict[str, Any]:
    reasons = [{"rule": "min_win_rate", "value": 0.5, "bound": 0.5, "ok": promoted}]
    return {"version": version, "against": "v0", "promoted": promoted, "reasons": reasons}


def add_node(run: Path, name: str, files: dict[str, Any], *, seconds: float = 10.0) -> None:
    folder = run / name
    for file, content in files.items():
        write_json(folder / file, content)
    write_manifest(folder, {"wall_seconds": seconds, "peak_memory_mb": 100.0, "exact": True})


def reward_files(axis: str) -> dict[str, Any]:
    other = "safety" if axis == "helpfulness" else "helpfulness"
    summary: dict[str, Any] = {"axis": axis}
    if axis == "safety":
        summary["detection"] = {"labelled": 10, "unsafe_recall": 0.9}
    return {
        "accuracy.json": {
            "cells": [
                {**cell(axis, "better", prompts=9), "source": "vendor", "batch": "week-1"},
                cell(axis, "better", prompts=40),
                cell(axis, "negligibly_better", prompts=12),
                cell(axis, None, prompts=50),
                cell(other, None, prompts=50, accuracy=0.61),
            ],
            "summary": summary,
        },
        "accuracy_before.json": {
            "cells": [cell(axis, "better", prompts=44, accuracy=0.71)],
            "summary": {"axis": axis},
        },
        "mixture.json": {"rows": 100, "own_share": 0.5, "sources": {"toy": 90, "open": 10}},
    }


def plan_node(name: str, stage: str, round_: int, **options: str) -> dict[str, Any]:
    return {"name": name, "stage": stage, "round": round_, "options": options}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run of two rounds: rejection, promoted; PPO, refused. The last node is missing."""
    curve = {"prompts": 5, "max": [0.0, 1.0, 1.5], "median": [0.0, 0.0, 0.1]}
    ppo = {
        "stopped": "iterations",
        "iterations": 7,
        "best_iteration": 4,
        "kl_to_start": 2.5,
        "alarms": [{"kind": "length", "iteration": 3, "value": 9.0, "bound": 2.0}],
    }
    found: list[tuple[dict[str, Any], dict[str, Any]]] = [(plan_node("sft", "sft", 0), {})]
    for k in (1, 2):
        for role in ("reward", "judge"):
            for axis in ("helpfulness", "safety"):
                name = f"round-0{k}/{role}-{axis}"
                node = plan_node(name, "reward", k, axis=axis, role=role)
                found.append((node, reward_files(axis)))
    found += [
        (plan_node("round-01/rejection", "rejection", 1), {
            "selection.json": {"against_n": {"helpfulness": curve}}
        }),
        (plan_node("round-01/evaluate", "evaluate", 1), {
            "evaluation.json": evaluation("v1", "v0", gold=True),
            "decision.json": decision("v1", promoted=True),
        }),
        (plan_node("round-02/ppo", "ppo", 2), {"ppo.json": ppo}),
        (plan_node("round-02/evaluate", "evaluate", 2), {
            "evaluation.json": evaluation("v2", "v1", gold=True),
            "decision.json": decision("v2", promoted=False),
        }),
    ]  # fmt: skip
    for node, files in found:
        add_node(tmp_path, node["name"], files, seconds=30.0 if node["stage"] == "ppo" else 10.0)
    nodes = [node for node, _ in found] + [plan_node("round-03/collect", "collect", 3)]
    write_json(tmp_path / "plan.json", {"run": "r", "recipe": "q", "rounds": [], "nodes": nodes})
    states = {"v0": "promoted", "v1": "promoted", "v2": "refused"}
    versions = [
        {"name": name, "state": state, "node": "n", "against": "", "overruled": "", "reasons": []}
        for name, state in states.items()
    ]
    write_json(tmp_path / "versions.json", versions)
    return tmp_path


def text_of(run: Path) -> str:
    console = Console(record=True, width=220, file=open("/dev/null", "w"))  # noqa: SIM115
    write_report(run, console)
    return console.export_text()


def test_report_json_is_what_is_returned(run: Path) -> None:
    report = write_report(run)
    assert json.loads((run / "report.json").read_text()) == report
    assert (report["run"], report["recipe"]) == ("r", "q")
    assert (report["nodes_done"], report["nodes_planned"]) == (13, 14)


def test_versions_carry_scores_and_gold(run: Path) -> None:
    versions = {version["name"]: version for version in write_report(run)["versions"]}
    assert [(v["name"], v["promoted"]) for v in versions.values()] == [
        ("v0", True),
        ("v1", True),
        ("v2", False),
    ]
    # v0 is known from the promoted side of round 1, v1 and v2 from their own evaluation.
    assert versions["v0"]["scores"] == {"round": 1, **dict.fromkeys(SCORE_ROLES, 0.5)}
    assert versions["v1"]["scores"] == {"round": 1, **dict.fromkeys(SCORE_ROLES, 1.0)}
    assert versions["v2"]["scores"] == {"round": 2, **dict.fromkeys(SCORE_ROLES, 1.0)}
    assert versions["v0"]["gold"]["helpfulness"]["mean"] == 0.25
    assert versions["v1"]["gold"]["helpfulness"]["mean"] == 0.5


def test_reward_accuracy_has_totals_of_the_own_axis_only(run: Path) -> None:
    report = write_report(run)
    rows = report["reward_accuracy"]
    keys = [(row["round"], row["axis"], row["strength"], row["n"]) for row in rows]
    assert keys[:3] == [
        (1, "helpfulness", "better", 45),
        (1, "helpfulness", "negligibly_better", 17),
        (1, "helpfulness", None, 55),
    ]
    assert len(keys) == 2 * 2 * 3
    needed = {"round", "axis", "strength", "n", "accuracy", "low", "high"}
    assert needed | {"control_longer", "control_swapped"} <= set(rows[0])
    assert len(report["judge_accuracy"]) == 12
    other = report["reward_accuracy_other_axis"]
    assert {(row["axis"], row["accuracy"]) for row in other} == {
        ("helpfulness", 0.61),
        ("safety", 0.61),
    }
    before = report["reward_accuracy_before"]
    assert [row["accuracy"] for row in before] == [0.71] * 4
    assert [row["role"] for row in report["safety_detection"]] == ["reward", "judge"] * 2


def test_small_cells_are_shown_but_not_compared(run: Path) -> None:
    flags = {row["strength"]: row["few"] for row in write_report(run)["reward_accuracy"]}
    assert flags == {"better": False, "negligibly_better": True, None: False}
    lines = [line for line in text_of(run).splitlines() if "negligibly_better" in line]
    assert len(lines) == 4
    for line in lines:
        assert "few" in line
        assert "0.250" not in line
        assert "0.800 [0.700, 0.900]" in line


def test_the_terminal_says_what_matters(run: Path) -> None:
    text = text_of(run)
    assert "v2" in text
    assert "refused" in text
    assert "NO" in text
    assert "0.710 [0.700, 0.900]" in text  # accuracy before training on the batch
    assert "toy 90, open 10" in text
    assert "13 of 14 nodes are done, in 150 s" in text
    assert "20%" in text  # PPO's 30 of 150 seconds
    assert "length" in text  # PPO's alarm
    # Best of 1, 2 and 3: gain 0, 1, 1.4.
    assert "1.400" in text


def test_a_node_without_a_manifest_is_not_read(run: Path) -> None:
    (run / "round-02/evaluate/manifest.json").unlink()
    (run / "round-01/reward-safety/manifest.json").unlink()
    report = write_report(run)
    assert [item["candidate"] for item in report["evaluations"]] == ["v1"]
    assert {"name": "v2", "scores": None, "gold": None}.items() <= report["versions"][2].items()
    assert not [
        row for row in report["reward_accuracy"] if (row["round"], row["axis"]) == (1, "safety")
    ]


def test_a_run_that_has_only_a_plan_gives_an_empty_report(tmp_path: Path) -> None:
    nodes = [plan_node("sft", "sft", 0)]
    write_json(tmp_path / "plan.json", {"run": "r", "recipe": "q", "rounds": [], "nodes": nodes})
    report = write_report(tmp_path, Console(quiet=True))
    assert (report["nodes_done"], report["versions"], report["reward_accuracy"]) == (0, [], [])
    assert tables(report) == []


def test_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"plan\.json is missing"):
        write_report(tmp_path)


def test_a_real_run_has_no_gold(run: Path) -> None:
    for k, names in ((1, ("v1", "v0")), (2, ("v2", "v1"))):
        folder = run / f"round-0{k}/evaluate"
        (folder / "manifest.json").unlink()
        files = {"evaluation.json": evaluation(*names, gold=False)}
        add_node(run, f"round-0{k}/evaluate", files)
    report = write_report(run, Console(quiet=True))
    assert [version["gold"] for version in report["versions"]] == [None] * 3


def test_numbers_and_intervals_as_text() -> None:
    assert number(None) == interval(None) == interval(measured(0.5) | {"mean": None}) == "-"
    assert interval({"mean": 0.5, "low": None, "high": None}) == "0.500"
    assert interval({"accuracy": 0.5, "low": 0.25, "high": 1}, middle="accuracy") == (
        "0.500 [0.250, 1.000]"
    )


def test_every_field_of_the_report_is_documented(run: Path) -> None:
    documented = DOCS.read_text(encoding="utf-8")
    missing = [name for name in write_report(run) if f"`{name}" not in documented]
    assert missing == []
