"""Tracking: what reaches wandb, and that its failures reach nobody."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.artifacts import NodeDir, read_jsonl
from rlhf.config import Config, Tracking, TrackingMode
from rlhf.errors import STOPPED_EXIT, StageError, Stopped
from rlhf.tracking import Tracker, preload, tracking_id

NODE = "round-01/ppo"


class FakeRun:
    """Stands for a wandb run; raises in the call that `broken` names."""

    def __init__(self, broken: str) -> None:
        self.broken = broken
        self.rows: list[dict[str, Any]] = []
        self.defined: list[tuple[Any, ...]] = []
        self.exit_codes: list[int] = []

    def _fail(self, call: str) -> None:
        if self.broken == call:
            raise RuntimeError(f"{call} is broken")

    def define_metric(self, name: str, **options: Any) -> None:
        self.defined.append((name, options))

    def log(self, row: dict[str, Any]) -> None:
        self._fail("log")
        self.rows.append(row)

    def finish(self, exit_code: int | None = None) -> None:
        self._fail("finish")
        self.exit_codes.append(exit_code or 0)


class FakeWandb(SimpleNamespace):
    def __init__(self, broken: str = "") -> None:
        super().__init__(Settings=lambda **options: SimpleNamespace(**options))
        self.broken = broken
        self.inits: list[dict[str, Any]] = []
        self.run = FakeRun(broken)

    def init(self, **options: Any) -> FakeRun:
        if self.broken == "init":
            raise OSError(28, "No space left on device")
        self.inits.append(options)
        return self.run


def use(monkeypatch: pytest.MonkeyPatch, broken: str = "") -> FakeWandb:
    fake = FakeWandb(broken)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return fake


def make_config(mode: TrackingMode = TrackingMode.offline) -> Config:
    return Config(recipe="test", run="my-run", tracking=Tracking(mode=mode, project="p"))


def train(config: Config, folder: Path) -> list[dict[str, Any]]:
    directory = NodeDir(folder)
    with Tracker(config, NODE, folder) as tracker:
        directory.metrics.mirror = tracker.log
        for step in range(4):
            directory.metrics.append({"step": step, "train/loss": 1.0 / (step + 1)})
    return read_jsonl(directory.metrics.path)


def fail(folder: Path, error: Exception) -> None:
    with Tracker(make_config(), NODE, folder) as tracker:
        tracker.log({"step": 1})
        raise error


def test_rows_arrive_with_our_names_and_steps(monkeypatch, tmp_path) -> None:
    fake = use(monkeypatch)
    rows = train(make_config(), tmp_path)
    assert fake.run.rows == rows
    assert fake.run.exit_codes == [0]
    [options] = fake.inits
    assert (options["group"], options["name"], options["project"]) == ("my-run", NODE, "p")
    assert (options["mode"], options["resume"]) == ("offline", "allow")
    assert options["dir"] == str(tmp_path)
    assert ("*", {"step_metric": "step"}) in fake.run.defined
    assert "config" not in options


def test_the_id_is_stable_per_run_and_node(monkeypatch, tmp_path) -> None:
    first, second = use(monkeypatch), None
    train(make_config(), tmp_path / "1")
    second = use(monkeypatch)
    train(make_config(), tmp_path / "2")
    assert first.inits[0]["id"] == second.inits[0]["id"] == tracking_id("my-run", NODE)
    # The id must not change between processes or releases: a resumed node would start anew.
    assert tracking_id("my-run", NODE) == "6a4a94f2760b8084"
    assert len({tracking_id(*names) for names in (("a", "b"), ("a", "c"), ("b", "b"))}) == 3


def test_none_never_imports_wandb(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert preload(make_config(TrackingMode.none)) == []
    assert len(train(make_config(TrackingMode.none), tmp_path)) == 4
    assert not (tmp_path / "wandb").exists()


def test_a_node_without_metrics_opens_nothing(monkeypatch, tmp_path) -> None:
    fake = use(monkeypatch)
    Tracker(make_config(), NODE, tmp_path).finish()
    assert fake.inits == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StageError("the loss became NaN"), 1),
        (KeyError("a bug"), 1),
        (Stopped("state is saved"), STOPPED_EXIT),
    ],
)
def test_a_node_that_ends_by_an_error_is_tracked_as_failed(
    monkeypatch, tmp_path, error, code
) -> None:
    fake = use(monkeypatch)
    with pytest.raises(type(error)):
        fail(tmp_path, error)
    assert fake.run.exit_codes == [code]


def test_a_broken_wandb_does_not_hide_the_error(monkeypatch, tmp_path) -> None:
    use(monkeypatch, "finish")
    with pytest.raises(StageError, match="the loss"):
        fail(tmp_path, StageError("the loss became NaN"))


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_broken_wandb_warns_once_and_stops_nothing(monkeypatch, tmp_path, caplog, broken) -> None:
    use(monkeypatch, broken)
    caplog.set_level(logging.WARNING)
    assert len(train(make_config(), tmp_path)) == 4
    assert len(caplog.records) == 1
    assert "metrics.jsonl is complete" in caplog.text


def test_an_absent_wandb_warns_once_and_stops_nothing(monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    caplog.set_level(logging.WARNING)
    assert len(train(make_config(), tmp_path)) == 4
    assert len(caplog.records) == 1


def test_the_real_wandb_writes_offline_and_resumes(tmp_path) -> None:
    pytest.importorskip("wandb")
    for start in (0, 2):  # The second time as a resumed node that repeats step 2.
        tracker = Tracker(make_config(), NODE, tmp_path)
        for step in range(start, start + 3):
            tracker.log({"step": step, "train/loss": 1.0})
        tracker.finish()
        assert tracker._active
    runs = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    assert all(name.endswith(tracking_id("my-run", NODE)) for name in runs)
    # What the server of nodes imports ahead is what an opened run needs, under its present name.
    assert set(preload(make_config())) <= set(sys.modules)
