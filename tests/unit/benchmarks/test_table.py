"""The page, and which contender a target is measured against."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.play import reached
from benchmarks.suites import BEST, DEFAULT, ENTRIES, OURS, SIZES, TARGETS, UNITS, Target, entries
from benchmarks.table import number, section, without_folders


def row(name: str, library: str, rate: float | None, **changes: Any) -> dict[str, Any]:
    attempts = [] if rate is None else [{"units": 10 * rate, "seconds": 10.0, "loaded": False}]
    return {
        "name": name,
        "library": library,
        "kind": BEST,
        "note": "",
        "tuned": True,
        "problem": "",
        "attempts": attempts,
        "rate": rate and {"median": rate, "low": rate, "high": rate},
        "seconds": rate and {"median": 10.0, "low": 10.0, "high": 10.0},
        "mfu": None,
        "limit_share": None,
        "peak_memory_mb": 100.0,
        "loss": None,
        **changes,
    }


def suite(*rows: dict[str, Any], targets: Any = (), check: Any = None) -> dict[str, Any]:
    return {
        "suite": "sft",
        "precision": "fp32",
        "sizes": {"steps": 4},
        "contenders": list(rows),
        "targets": list(targets),
        "check": check,
    }


def test_the_best_setting_counts_whatever_its_name() -> None:
    rows = [
        row("ours", OURS, 90.0),
        row("a", "TRL", 20.0, kind=DEFAULT),
        row("b", "TRL", 30.0),
        row("c", "TRL", 25.0),
        row("other", "vllm", 80.0),
    ]
    found = reached(Target("TRL", BEST, 2), rows, limit=100)
    assert (found["reached"], found["against"]) == (pytest.approx(3.0), "b")
    found = reached(Target("TRL", DEFAULT, 4), rows, limit=100)
    assert (found["reached"], found["against"]) == (pytest.approx(4.5), "a")


def test_the_default_may_be_the_best() -> None:
    rows = [row("ours", OURS, 90.0), row("a", "TRL", 45.0, kind=DEFAULT), row("b", "TRL", 30.0)]
    assert reached(Target("TRL", BEST, 2), rows, limit=100)["against"] == "a"


def test_who_was_stopped_gives_a_bound() -> None:
    rows = [row("ours", OURS, 90.0), row("a", "TRL", None, problem="more than 300 s")]
    found = reached(Target("TRL", BEST, 2), rows, limit=300)
    assert found["is_bound"]
    assert found["reached"] == pytest.approx(30.0)


def test_who_failed_gives_no_figure() -> None:
    rows = [row("ours", OURS, 90.0), row("a", "TRL", None, problem="ended: no output")]
    assert reached(Target("TRL", BEST, 2), rows, limit=300)["reached"] is None


def test_a_page_lists_every_attempt_and_marks_loaded_ones() -> None:
    attempts = [
        {"units": 50, "seconds": 10, "loaded": True},
        {"units": 80, "seconds": 10, "loaded": False},
    ]
    text = section(suite(row("ours", OURS, 8.0, attempts=attempts, mfu=0.25, loss=1.5)))
    line = next(line for line in text.splitlines() if line.startswith("| ours"))
    assert "| 5* 8 |" in line
    assert "25.0%" in line
    assert "1.50000" in line


def test_a_round_of_one_unit_shows_its_seconds() -> None:
    attempts = [{"units": 1, "seconds": 20.0, "loaded": False}]
    shown = {**suite(row("ours", OURS, 0.05, attempts=attempts)), "suite": "ppo"}
    assert "| 10.0 (10.0 to 10.0) | 20.0 |" in section(shown)


def test_a_contender_without_a_round_shows_why() -> None:
    text = section(suite(row("slow", "TRL", None, problem="more than 300 s")))
    assert "| slow | tuned | more than 300 s |" in text


def test_a_target_says_whether_it_is_reached() -> None:
    target = {
        "library": "TRL",
        "kind": BEST,
        "factor": 2.0,
        "reached": 2.5,
        "is_bound": False,
        "against": "TRL fp32",
    }
    low = {**target, "reached": 1.9, "is_bound": True}
    text = section(suite(targets=[target, low]))
    assert "Against TRL, best (TRL fp32): 2.50x; the aim of 2x is reached." in text
    assert "at least 1.90x; the aim of 2x is NOT reached." in text


def test_the_losses_compared_are_shown() -> None:
    check = {
        "steps": 50,
        "ours": 1.0,
        "plain": 1.02,
        "start": 2.0,
        "difference": 0.0196,
        "share": 0.01,
        "is_within": False,
    }
    assert "1.960% apart, NOT within 1%" in section(suite(check=check))


@pytest.mark.parametrize(
    ("value", "text"), [(1234.4, "1,234"), (99.94, "99.9"), (1.234, "1.23"), (0.01234, "0.0123")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_every_suite_has_a_unit_and_targets_name_libraries() -> None:
    assert SIZES.keys() == UNITS.keys()
    for name, targets in TARGETS.items():
        if name in ENTRIES:
            libraries = {entry.library for entry in ENTRIES[name]}
            assert {target.library for target in targets} <= libraries


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_suite_has_ours_and_distinct_names(precision: str) -> None:
    for suite_name in ENTRIES:
        found = entries(suite_name, precision)
        assert sum(entry.library == OURS for entry in found) == 1
        assert len({entry.name for entry in found}) == len(found)


def test_a_page_does_not_say_where_things_lie() -> None:
    found = {
        "command": ["--model", "/models/smollm2", "vllm=/envs/vllm", "sft.steps=2"],
        "n": [1.5],
    }
    shown = {"command": ["--model", "smollm2", "vllm=vllm", "sft.steps=2"], "n": [1.5]}
    assert without_folders(found) == shown
