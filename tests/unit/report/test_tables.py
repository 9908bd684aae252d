"""The report of a small made-up run, finished and unfinished."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf.artifacts import write_json, write_manifest
from rlhf.data.records import STRENGTHS
from rlhf.errors import ArtifactError
from rlhf.report.tables import interval, number, tables
from rlhf.report.write import MIN_WIDTH, write_report

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"
JUDGES = ("judge_helpfulness", "judge_safety")
SCORE_ROLES = (*JUDGES, "reward_helpfulness", "reward_safety")


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
        "versions": versions_under(int(candidate.removeprefix("v"))),
        "gold": golds if gold else None,
    }


def versions_under(round_: int) -> dict[str, Any]:
    """Return v0..vk under the judges of round k: 10 k + j, minus 100 for safety."""
    return {
        f"v{j}": {
            "judge_helpfulness": measured(10.0 * round_ + j),
            "judge_safety": measured(10.0 * round_ + j - 100),
        }
        for j in range(round_ + 1)
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
        summary["detection"] = {
            "labelled": 10,
            "unsafe": 4,
            "unsafe_recall": 0.912,
            "gate_threshold": 0.15,
            "gate_precision": 0.823,
            "gate_recall": None,
        }
    return {
        "accuracy.json": {
            "cells": [
                {**cell(axis, "better", prompts=9), "source": "vendor", "batch": "week-1"},
                cell(axis, None, prompts=50),
                cell(axis, "ungraded", prompts=33),
                cell(axis, "negligibly_better", prompts=12),
                cell(axis, "better", prompts=40),
                cell(axis, "significantly_better", prompts=31),
                cell(axis, "slightly_better", prompts=32),
                cell(other, None, prompts=50, accuracy=0.61),
            ],
            "summary": summary,
        },
        "accuracy_before.json": {
            "cells": [cell(axis, "better", prompts=44, accuracy=0.71)],
            "summary": {"axis": axis},
        },
        "mixture.json": {
            "rows": 100,
            "num_own": 50,
            "own_share": 0.5,
            "ties": 3,
            "sources": {"toy": 90, "open": 10},
            "batches": {"week-1": 100},
        },
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
        "heldout": [
            {"iteration": 0, "score": 0.0, "kl_to_start": 0.0},
            {"iteration": 4, "score": 0.456, "kl_to_start": 1.234},
            {"iteration": 7, "score": 0.3, "kl_to_start": 2.0},
        ],
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


def text_of(run: Path, *, width: int = 220) -> str:
    """Print the report as on a terminal of this width."""
    console = Console(width=width, file=StringIO(), force_terminal=True, color_system=None)
    with console.capture() as capture:
        write_report(run, console)
    return capture.get()


def rows_of(text: str, title: str) -> list[list[str]]:
    """Return the cells of a table by its title, header first; cells are two spaces apart."""
    lines = text.splitlines()
    start = [line.strip() for line in lines].index(title) + 1
    # An empty line ends a table; the one between its sections is padded.
    table = lines[start : lines.index("", start)]
    split = [re.split(r"  +", line.strip()) for line in table]
    return [cells for cells in split if len(cells) > 1]


def test_report_json_is_what_is_returned(run: Path) -> None:
    report = write_report(run)
    assert json.loads((run / "report.json").read_text()) == report
    assert (report["run"], report["recipe"]) == ("r", "q")
    assert (report["nodes_done"], report["nodes_planned"]) == (13, 14)


def test_versions_carry_the_newest_judges_scores_and_gold(run: Path) -> None:
    versions = {version["name"]: version for version in write_report(run)["versions"]}
    assert [(v["name"], v["promoted"]) for v in versions.values()] == [
        ("v0", True),
        ("v1", True),
        ("v2", False),
    ]
    for j in range(3):
        # All under the judges of round 2, none under those of the round that made it.
        assert versions[f"v{j}"]["scores"] == {
            "round": 2,
            "judge_helpfulness": measured(20.0 + j),
            "judge_safety": measured(20.0 + j - 100),
            "from": f"round-02/evaluate/evaluation.json#/versions/v{j}",
        }
    # v0 is known from the promoted side of round 1, v1 and v2 from their own evaluation.
    assert versions["v0"]["gold"]["helpfulness"]["mean"] == 0.25
    assert versions["v1"]["gold"]["helpfulness"]["mean"] == 0.5


def test_the_versions_table_puts_judges_beside_gold(run: Path) -> None:
    text = text_of(run, width=100)
    table = rows_of(text, "Versions")
    header = ["version", "state", "judge helpfulness", "judge safety", "gold helpfulness"]
    assert table[0] == header
    assert table[1] == [
        "v0",
        "promoted",
        "20.000 [19.900, 20.100]",
        "-80.000 [-80.100, -79.900]",
        "0.250 [0.150, 0.350]",
    ]
    assert [row[:2] for row in table[2:4]] == [["v1", "promoted"], ["v2", "refused"]]
    assert "under the judges of round 2, for all versions" in text
    assert rows_of(text, "Gold rates (toy world)")[1:] == [
        [f"v{j}", "0.100 [0.000, 0.200]", "0.200 [0.100, 0.300]"] for j in range(3)
    ]


def test_a_version_that_waits_for_its_evaluation_has_no_scores(run: Path) -> None:
    (run / "round-02/evaluate/manifest.json").unlink()
    versions = {version["name"]: version for version in write_report(run)["versions"]}
    assert versions["v1"]["scores"]["round"] == versions["v0"]["scores"]["round"] == 1
    assert versions["v2"]["scores"] is versions["v2"]["gold"] is None
    table = rows_of(text_of(run), "Versions")
    assert table[3] == ["v2", "refused", "-", "-", "-"]


def test_an_overruled_version_is_marked(run: Path) -> None:
    assert "set by an operator" not in text_of(run)
    rows = json.loads((run / "versions.json").read_text())
    rows[2] |= {"state": "promoted", "overruled": "read the samples"}
    write_json(run / "versions.json", rows)
    text = text_of(run)
    assert [row[1] for row in rows_of(text, "Versions")[1:4]] == [
        "promoted",
        "promoted",
        "promoted*",
    ]
    assert "*: set by an operator" in text


def test_reward_accuracy_has_totals_of_the_own_axis_only(run: Path) -> None:
    report = write_report(run)
    rows = report["reward_accuracy"]
    keys = [(row["round"], row["axis"], row["strength"], row["n"]) for row in rows]
    assert keys[:6] == [
        (1, "helpfulness", "significantly_better", 36),
        (1, "helpfulness", "better", 45),
        (1, "helpfulness", "slightly_better", 37),
        (1, "helpfulness", "negligibly_better", 17),
        (1, "helpfulness", "ungraded", 38),
        (1, "helpfulness", None, 55),
    ]
    assert len(keys) == 2 * 2 * 6
    needed = {"round", "axis", "strength", "n", "ties", "accuracy", "low", "high"}
    assert needed | {"control_longer", "control_swapped"} <= set(rows[0])
    assert len(report["judge_accuracy"]) == 24
    other = report["reward_accuracy_other_axis"]
    assert {(row["axis"], row["accuracy"]) for row in other} == {
        ("helpfulness", 0.61),
        ("safety", 0.61),
    }
    before = report["reward_accuracy_before"]
    assert [row["accuracy"] for row in before] == [0.71] * 4
    assert [row["role"] for row in report["safety_detection"]] == ["reward", "judge"] * 2


def test_small_cells_are_shown_but_not_compared(run: Path) -> None:
    few = {row["strength"] for row in write_report(run)["reward_accuracy"] if row["few"]}
    assert few == {"negligibly_better"}
    for axis in ("helpfulness", "safety"):
        table = rows_of(text_of(run), f"Reward accuracy on held-out comparisons: {axis}")
        compared = {tuple(row[1:2] + row[4:7]) for row in table[1:]}
        assert ("negligibly", "0.800 [0.700, 0.900]", "0.550", "few") in compared
        assert ("slightly", "0.800 [0.700, 0.900]", "0.550", "0.250 [0.100, 0.400]") in compared


def test_strengths_fall_and_the_judge_stands_beside_the_total(run: Path) -> None:
    table = rows_of(text_of(run), "Reward accuracy on held-out comparisons: safety")
    strengths = [name.removesuffix("_better") for name in STRENGTHS]
    expected = [("reward 1", name) for name in (*strengths, "ungraded", "all")]
    expected += [("judge 1", "all")]
    assert [tuple(row[:2]) for row in table[1:8]] == expected
    assert table[8][:2] == ["reward 2", "significantly"]


def test_accuracy_before_training_names_the_older_model(run: Path) -> None:
    title = "Reward accuracy on new batches before training on them"
    table = rows_of(text_of(run), title)
    assert table[1] == [
        "helpfulness 0 on round 1",
        "better",
        "49",
        "44",
        "0.710 [0.700, 0.900]",
        "0.550",
    ]


def test_judge_and_used_pair_stand_side_by_side(run: Path) -> None:
    text = text_of(run, width=100)
    wins = rows_of(text, "Win rate against the promoted version")
    assert [row[2] for row in wins[1:6]] == ["all", "helpfulness", "safety", "longer", "not longer"]
    assert wins[1] == ["v1", "v0", "all", "60", "0.600 [0.500, 0.700]", "0.700 [0.600, 0.800]"]
    shifts = rows_of(text, "Score shift from the promoted version, all prompts")
    both = ["0.500 [0.400, 0.600]"] * 2
    assert shifts[1:3] == [["v1", "v0", "helpfulness", *both], ["v1", "v0", "safety", *both]]


def test_the_terminal_says_what_matters(run: Path) -> None:
    text = text_of(run)
    assert ["v2", "v1", "min_win_rate", "0.500", "0.5", "NO"] in rows_of(text, "Promotion")
    assert ["2", "iterations", "length", "7", "4", "0.456", "1.234"] in rows_of(text, "PPO")
    assert ["2", "v1", "0.100 [0.000, 0.200]", "0.200 [0.100, 0.300]", "10.0", "0.900", "-"] in (
        rows_of(text, "Behaviour on held-out prompts")
    )
    assert ["judge 1", "10", "4", "0.912", "0.15", "0.823", "-"] in rows_of(
        text, "Responses labelled unsafe, found by the safety models"
    )
    assert ["round-01/judge-safety", "toy 90, open 10", "100", "0.500"] in rows_of(
        text, "Training mixtures"
    )
    # Best of 1, 2 and 3: gain 0, 1, 1.4.
    curve = rows_of(text, "Rejection sampling: best of N")[1:4]
    assert [(row[2], row[5]) for row in curve] == [("1", "0.000"), ("2", "1.000"), ("3", "1.400")]
    nothing = ["-"] * 6
    assert ["round-02/ppo", "30.0", "20%", "100", *nothing] in rows_of(text, "Time")
    assert "13 of 14 nodes are done, in 150 s" in text
    assert str(run / "report.json") in text


@pytest.mark.parametrize("width", [80, 100])
def test_no_column_is_cut_on_a_terminal(run: Path, width: int) -> None:
    text = text_of(run, width=width)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    # Paths stand on lines of any length.
    lines = [line for line in text.splitlines() if str(run) not in line]
    assert max(len(line.rstrip()) for line in lines) <= width
    # The widest values are whole at 100 columns and wrapped below.
    whole = re.search(r"0\.800 \[0\.700, 0\.900\] +0\.550 +0\.250 \[0\.100, 0\.400\]", text)
    assert (whole is not None) == (width == 100)


@pytest.mark.parametrize(("width", "expected"), [(80, MIN_WIDTH), (200, 200)])
def test_a_file_or_pipe_gets_a_minimum_width(run: Path, width: int, expected: int) -> None:
    console = Console(file=StringIO(), width=width, soft_wrap=True)
    write_report(run, console)
    assert console.width == expected
    assert isinstance(console.file, StringIO)
    assert "-80.000 [-80.100, -79.900]  0.250 [0.150, 0.350]" in console.file.getvalue()


def test_soft_wrap_of_the_caller_does_not_stretch_captions(run: Path) -> None:
    console = Console(file=StringIO(), width=120, soft_wrap=True)
    with console.capture() as capture:
        write_report(run, console)
    assert max(len(line.rstrip()) for line in capture.get().splitlines()[:-2]) <= 120


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
    text = text_of(run)
    assert "Gold rates (toy world)" not in text
    assert rows_of(text, "Versions")[0][-1] == "judge safety"


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
