"""report.json: every number of it stands in, or follows from, the files that it names."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from report_run import make_run
from report_tracing import RECOMPUTE, Files, numbers, untraced

from rlhf.report.gather import gather
from rlhf.report.gather.scores import round_edges
from rlhf.report.gather.summary import follow
from rlhf.report.schema import SCHEMA, derivations, schema_table

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return gather(run)


def test_every_number_is_what_the_files_say(run: Path, report: dict[str, Any]) -> None:
    assert untraced(report, Files(run)) == []
    assert len(list(numbers(report))) > 10_000


def test_a_number_that_differs_from_its_file_is_found(run: Path, report: dict[str, Any]) -> None:
    """Every kind of source and every derivation is really checked."""
    files = Files(run)
    seen: set[str] = set()
    for place, _, record, _ in numbers(report):
        kind = "none" if record is None else record.get("how", "verbatim")
        if kind in seen or place == "/schema_version":
            continue
        # Thresholds and edges are parameters: what follows from them is checked.
        if place.endswith(("/threshold", "/edges/0")):
            continue
        seen.add(kind)
        changed = copy.deepcopy(report)
        parent, _, key = place.rpartition("/")
        holder = follow(changed, parent)
        key = key.replace("~1", "/")
        holder[int(key) if isinstance(holder, list) else key] += 1
        assert [line.partition(":")[0] for line in untraced(changed, files)][:1] == [place], kind
    assert seen == {*RECOMPUTE, "verbatim"}


def test_the_report_follows_the_shipped_schema(report: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(report, SCHEMA)
    assert set(SCHEMA["properties"]) == set(report) == set(SCHEMA["required"])


def test_the_schema_refuses_an_undocumented_field(report: dict[str, Any]) -> None:
    for change in ({"more": 1}, {"versions": [{"name": 3}]}, {"schema_version": 99}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**report, **change}, SCHEMA)


def test_the_documentation_is_the_schema(report: dict[str, Any]) -> None:
    documented = DOCS.read_text(encoding="utf-8")
    assert schema_table() in documented
    used = {r["how"] for _, _, r, _ in numbers(report) if r and "how" in r}
    assert used <= set(derivations())
    for name, text in derivations().items():
        assert f"| `{name}` | {text} |" in documented


def test_a_partial_run_gives_a_shorter_report(run: Path, tmp_path: Path) -> None:
    """Whatever node or file is missing, the report is made, valid, and traced."""
    copied = tmp_path / "partial"
    shutil.copytree(run, copied)
    for name in ("round-05/evaluate", "round-04/ppo", "round-03/sweep", "round-02/reward-safety"):
        (copied / name / "manifest.json").unlink()
    for name in ("estimate.json", "versions.json"):
        (copied / name).unlink()
    partial = gather(copied)
    jsonschema.validate(partial, SCHEMA)
    assert untraced(partial, Files(copied)) == []
    assert len(partial["evaluations"]) == 4


def test_nothing_but_a_plan_is_a_report(tmp_path: Path) -> None:
    plan = {"run": "r", "recipe": "q", "rounds": [], "nodes": []}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    jsonschema.validate(gather(tmp_path), SCHEMA)


def test_findings_point_to_numbers_of_the_report(report: dict[str, Any]) -> None:
    findings = report["summary"]["findings"]
    levels = [finding["level"] for finding in findings]
    assert levels == sorted(levels, key=["stop", "look"].index)
    for finding in findings:
        assert isinstance(follow(report, finding["about"])["round"], int)
        for value in finding["values"]:
            assert isinstance(follow(report, value["at"]), int | float)
    texts = " ".join(finding["text"] for finding in findings)
    assert "v5 was refused: it broke min win rate" in texts
    assert "over-optimising since iteration" in texts
    assert "drifted in source" in texts
    assert "PPO raised an alarm: length" in texts


@pytest.mark.parametrize(
    ("values", "smallest", "expected"),
    [
        # 12 bins at least: 10 / 12 = 0.83, so steps of 1; the value 10 needs a bin of its own.
        ([0.0, 10.0], 4, [*range(12)]),
        # 2.5 * sqrt(36) = 15 bins: 0.97 / 15 = 0.065, so steps of 0.1.
        ([0.0, 0.97], 36, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ([-3.0, -3.0], 1, [-3.0, -2.999]),
    ],
)
def test_edges_are_round_and_hold_every_value(
    values: list[float], smallest: int, expected: list[float]
) -> None:
    edges = round_edges(values, smallest=smallest)
    assert edges == pytest.approx(expected)
    assert edges[0] <= min(values)
    assert max(values) < edges[-1]


def test_no_torch_is_needed() -> None:
    code = "import sys, rlhf.report.write; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0
