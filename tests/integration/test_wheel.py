"""The wheel alone, in an empty folder outside the checkout, with nothing else on the path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT, SETTINGS

pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and install it without dependencies into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    call([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], ROOT)
    [wheel] = folder.glob("*.whl")
    target = folder / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    call([*pip, "--target", str(target), str(wheel)], folder)
    return target


def call(
    command: list[str], cwd: Path, *, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command, with only `path` to import from; it must succeed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path or ""), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def rlhf(installed: Path, cwd: Path, *arguments: str) -> str:
    script = installed / "bin" / "rlhf"
    return call([sys.executable, str(script), *arguments], cwd, path=installed).stdout


def shipped(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_ships_the_package_configurations_and_jobs_and_no_tests(installed: Path) -> None:
    package = installed / "rlhf"
    assert shipped(package / "_conf") == shipped(ROOT / "conf")
    assert shipped(package / "_jobs") == shipped(ROOT / "jobs")
    sources = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert sources == {str(path.relative_to(ROOT / "rlhf")) for path in ROOT.glob("rlhf/**/*.py")}
    files = ("templates/page.html", "templates/page.css", "templates/page.js", "report.schema.json")
    for name in files:
        assert (package / "report" / name).read_bytes() == (
            ROOT / "rlhf" / "report" / name
        ).read_bytes()
    tops = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert tops == {"rlhf", "bin"}
    [licence] = installed.glob("rlhf-*.dist-info/licenses/LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_installed_command_plans_the_quickstart(installed: Path, tmp_path: Path) -> None:
    assert "rlhf run recipe=quickstart" in rlhf(installed, tmp_path, "--help")
    where = "import rlhf.compose as c; print(c.__file__, c.conf_dir())"
    found = call([sys.executable, "-c", where], tmp_path, path=installed).stdout.split()
    assert all(Path(path).is_relative_to(installed) for path in found)
    planned = rlhf(installed, tmp_path, "plan", "recipe=quickstart")
    assert "round 1: rejection, batches round-01" in planned
    assert "round-02/evaluate" in planned
    assert "recipe: llama2_70b" in rlhf(installed, tmp_path, "run", "--help")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_installed_command_runs_the_whole_recipe(installed: Path, tmp_path: Path) -> None:
    output = rlhf(installed, tmp_path, "run", "recipe=quickstart", *SETTINGS)
    assert "15 of 15 nodes are done" in output
    assert (tmp_path / "runs/quickstart/report.json").exists()
    assert str(ROOT) not in (tmp_path / "runs/quickstart/server.log").read_text(encoding="utf-8")
