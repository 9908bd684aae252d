"""The page: every visible number is the report's, nothing from outside, nothing executed."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from report_html import (
    Node,
    loose_numbers,
    read_page,
    written,
    wrong_marks,
    wrong_numbers,
    wrong_ticks,
    wrong_titles,
)
from report_run import HOSTILE, make_run
from report_tracing import Files, follow, same, untraced

from rlhf.report.compare import compare
from rlhf.report.page import SECTIONS as MODULES
from rlhf.report.page import comparison_page, page
from rlhf.report.view import refs
from rlhf.report.view.blocks import Figure
from rlhf.report.view.charts import Panel
from rlhf.report.view.marks import Point
from rlhf.report.view.refs import Ref
from rlhf.report.view.scales import axis, whole
from rlhf.report.write import PAGE, REPORT, write_comparison, write_report

MAX_BYTES = 10_000_000
SECTIONS = ("summary", "reward", "scores", "sampling", "ppo", "versions", "data", "cost", "guide")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("page"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return json.loads((run / REPORT).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def root(run: Path) -> Node:
    return read_page((run / PAGE).read_text(encoding="utf-8"))


def test_every_number_that_is_shown_is_the_reports(root: Node, report: dict[str, Any]) -> None:
    checked, wrong = wrong_numbers(root, report)
    assert wrong == []
    assert checked > 3000
    assert loose_numbers(root, report) == []


def test_every_mark_lies_where_its_value_is(root: Node, report: dict[str, Any]) -> None:
    checked, wrong = wrong_marks(root, report)
    assert wrong == []
    assert checked > 3000
    assert wrong_titles(root, report) == []
    assert wrong_ticks(root) == []


def test_the_checks_of_the_page_can_fail(root: Node, report: dict[str, Any]) -> None:
    changed = copy.deepcopy(report)
    changed["nodes_done"] += 1
    changed["reward_accuracy"][0]["accuracy"] += 0.01
    changed["ppo"][-1]["curves"]["ppo/entropy"][5] += 0.1
    changed["version_histograms"][0]["groups"][0]["counts"][0] += 1
    changed["conflicts"]["groups"][0]["safety"][3] += 1
    assert len(wrong_numbers(root, changed)[1]) >= 2
    assert len(wrong_marks(root, changed)[1]) >= 4
    assert wrong_titles(root, changed)
    stray = read_page("<p>about 17 of them</p>")
    assert loose_numbers(stray, report) == ["about 17 of them"]


def test_sections_stand_in_order_and_explain_themselves(root: Node) -> None:
    sections = root.all("section")
    assert tuple(section.attrs["id"] for section in sections) == SECTIONS
    for section in sections:
        leads = section.all("p", "lead")
        assert len(leads) == 1
    links = {a.attrs["href"] for a in root.all("nav")[0].all("a")}
    assert links == {f"#{name}" for name in SECTIONS}
    ids = [node.attrs["id"] for node in root.walk() if "id" in node.attrs]
    assert len(ids) == len(set(ids))


def test_every_figure_gives_its_data(root: Node, report: dict[str, Any]) -> None:
    """The link holds the values at the pointers that it names, and needs no network."""
    figures = root.all("figure")
    assert len(figures) > 15
    for figure in figures:
        [link] = figure.all("a", "download")
        head, _, body = link.attrs["href"].partition(",")
        assert head == "data:text/csv;charset=utf-8"
        rows = list(csv.DictReader(io.StringIO(unquote(body))))
        assert rows
        assert {row["panel"] for row in rows} == {
            svg.attrs["aria-label"] for svg in figure.all("svg", "panel")
        }
        for row in rows:
            for place in row["report_json"].split():
                value = follow(report, place)
                shown = [row[name] for name in ("x", "y", "low", "high") if row[name]]
                assert any(same(float(text), value) for text in shown), row


def test_nothing_comes_from_elsewhere_and_nothing_is_executed(run: Path, root: Node) -> None:
    html = (run / PAGE).read_text(encoding="utf-8")
    assert len(html.encode()) < MAX_BYTES
    assert len(root.all("script")) == 1
    assert not root.all("img")
    assert not root.all("iframe")
    for node in root.walk():
        assert not [name for name in node.attrs if name.startswith("on")]
        for name in ("src", "href"):
            value = node.attrs.get(name, "#")
            assert value.startswith(("#", "data:")) or value == REPORT, value
    style = root.all("style")[0].text
    assert "url(" not in style
    assert "@import" not in style
    # The hostile text is there, as text.
    texts = [node.text for node in root.all("p", "text")]
    assert HOSTILE in texts
    assert HOSTILE not in html


def test_sections_without_anything_say_why_and_what_to_do(tmp_path: Path) -> None:
    plan = {"run": "empty", "recipe": "q", "rounds": [], "nodes": []}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    write_report(tmp_path)
    root = read_page((tmp_path / PAGE).read_text(encoding="utf-8"))
    for section in root.all("section"):
        if section.attrs["id"] not in ("summary", "guide"):
            assert section.all("p", "empty"), section.attrs["id"]
    assert not root.all("figure")


def test_an_unfinished_run_has_a_page(run: Path, tmp_path: Path) -> None:
    """Every node in turn is the newest finished one."""
    plan = json.loads((run / "plan.json").read_text())
    for number in range(0, len(plan["nodes"]), 5):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("plan.json", "run.yaml", "versions.json"):
            (folder / name).symlink_to(run / name)
        for node in plan["nodes"][:number]:
            target = folder / node["name"]
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(run / node["name"])
        report = write_report(folder)
        root = read_page((folder / PAGE).read_text(encoding="utf-8"))
        assert report["nodes_done"] == number
        assert wrong_numbers(root, report)[1] == []
        assert wrong_marks(root, report)[1] == []


def test_two_runs_are_compared(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path, "other", seed=3, rounds=2)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    comparison = write_comparison([run, other])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    stem = run.parent / "compare-made-up-other"
    assert json.loads(stem.with_suffix(".json").read_text()) == comparison
    root = read_page(stem.with_suffix(".html").read_text(encoding="utf-8"))
    assert wrong_numbers(root, comparison)[1] == []
    assert wrong_marks(root, comparison)[1] == []
    assert loose_numbers(root, comparison) == []
    assert wrong_titles(root, comparison) == []
    for side, folder in (("a", run), ("b", other)):
        assert untraced(comparison["reports"][side], Files(folder)) == []
    assert [row["key"] for row in comparison["settings"]] == ["ppo.kl_coef"]


def test_comparisons_that_both_runs_scored_are_paired(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path, "other", seed=3, rounds=2)
    tables = {}
    for side, folder, k in (("a", run, 5), ("b", other, 2)):
        path = folder / f"round-{k:02}/reward-safety/scores.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        tables[side] = {
            (row["id"], row["strength"], row["prompt"], row["source"]): row
            for row in rows
            if row["axis"] == "safety" and not row["tie"]
        }
    shared = tables["a"].keys() & tables["b"].keys()
    right = {
        side: sum(
            tables[side][key]["chosen_score"] > tables[side][key]["rejected_score"]
            for key in shared
        )
        for side in tables
    }
    [row] = [r for r in compare([run, other])["paired_accuracy"] if r["axis"] == "safety"]
    assert row["shared"] == len(shared) > 20
    assert row["only"] == {side: len(tables[side]) - len(shared) for side in tables}
    for side in tables:
        assert same(row["accuracy"][side], right[side] / len(shared))
    assert same(row["difference"]["mean"], (right["b"] - right["a"]) / len(shared))
    assert row["difference"]["low"] < row["difference"]["mean"] < row["difference"]["high"]


def test_a_run_compared_with_itself_differs_in_nothing(run: Path) -> None:
    comparison = compare([run, run])
    assert comparison["settings"] == []
    for row in comparison["paired_accuracy"]:
        assert row["difference"]["mean"] == 0
        assert set(row["only"].values()) == {0}
    html = comparison_page(comparison, data_file="x.json")
    assert "The settings of both runs are the same" in html


def test_texts_are_cut_and_examples_bounded_so_that_the_page_stays_small(
    run: Path, report: dict[str, Any]
) -> None:
    """A page with texts of real length for five rounds is still under the limit."""
    big = copy.deepcopy(report)
    for part in big["examples"]:
        for row in part["rows"]:
            for side in row["responses"]:
                row["responses"][side] = "word " * 300
        part["rows"] = (part["rows"] * 5)[: 160 + 120]
    assert len(page(big, data_file=REPORT).encode()) < MAX_BYTES


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        (1234567, "d", "1\u2009234\u2009567"),
        (1234567, "i", "1234567"),
        (-0.0004, "f3", "0.000"),
        (-0.0006, "f3", "\u22120.001"),
        (0.1234, "p1", "12.3\u2009%"),
        (0.25, "s", "+0.250"),
        (-0.25, "s", "\u22120.250"),
        (1.5e-9, "g", "1.5e\u221209"),
        (None, "f3", "\u2013"),
    ],
)
def test_numbers_are_written_one_way(value: float | None, form: str, expected: str) -> None:
    assert refs.written(value, form) == expected
    if value is not None and form != "f3":
        assert written(value, form) == expected


@pytest.mark.parametrize(
    ("values", "options", "ends", "ticks"),
    [
        ([0.12, 0.87], {}, (0.0, 1.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0.0, 0.0], {"least": 0.0}, (0.0, 0.05), None),
        ([0.7, 0.99], {"most": 1.0}, (0.7, 1.0), None),
        ([1.0], {"limits": (0.0, 2.0)}, (0.0, 2.0), ["0.0", "0.5", "1.0", "1.5", "2.0"]),
    ],
)
def test_axes_end_on_round_numbers(
    values: list[float], options: Any, ends: tuple[float, float], ticks: list[str] | None
) -> None:
    found = axis("a", values, **options)
    assert (found.low, found.high) == pytest.approx(ends)
    if ticks is not None:
        assert [text for _, text in found.ticks] == ticks


@pytest.mark.parametrize(
    ("last", "ticks"),
    [(1, ["1"]), (10, [str(k) for k in range(1, 11)]), (12, ["2", "4", "6", "8", "10", "12"])],
)
def test_many_rounds_have_few_ticks(last: int, ticks: list[str]) -> None:
    assert [text for _, text in whole("round", range(1, last + 1)).ticks] == ticks


def test_a_figure_s_data_is_no_formula() -> None:
    marks = [Point(name="@SUM(A1)", x=1.0, y=-2.0)]
    panel = Panel('=cmd|"/C calc"', whole("x", [1]), axis("y", [-2.0]), marks)
    [_, row] = csv.reader(io.StringIO(Figure("f", "t", [panel]).csv()))
    assert row[:4] == ['\'=cmd|"/C calc"', "'@SUM(A1)", "1.0", "-2.0"]


def test_a_reference_knows_its_place() -> None:
    ref = Ref({"a/b": [{"x~y": 3}], "none": None})
    inner = ref["a/b"][0]["x~y"]
    assert (inner.value, inner.path) == (3, "/a~1b/0/x~0y")
    assert follow(ref.value, inner.path) == 3
    assert not ref["none"]["deeper"]
    assert not ref["missing"]
    assert [part.path for part in ref["a/b"]] == ["/a~1b/0"]


def test_static_words_of_the_page_hold_no_numbers_of_runs() -> None:
    """Leads are words: a number in them could not be traced."""
    for module in MODULES:
        assert not re.search(r"\d", module.LEAD), module
