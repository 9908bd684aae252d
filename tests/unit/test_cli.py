"""The command line: exit codes, messages, Hydra's flags, and nothing left behind."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf import cli, commands
from rlhf.config import Config
from rlhf.errors import ConfigError, StageError

Overrides = Callable[..., list[str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_lists_every_command_without_heavy_imports() -> None:
    code = (
        "import sys; from rlhf.cli import main; code = main(['--help']); "
        "sys.exit(code or any(m in sys.modules for m in ('hydra', 'torch', 'omegaconf')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for name in cli.COMMANDS:
        assert f"\n  {name}" in done.stdout
    assert set(cli.COMMANDS) == set(commands.HANDLERS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("stage round-01/ppo run=a", (("round-01/ppo",), {}, ("run=a",))),
        (
            "ingest a.jsonl b.jsonl ingest.kind=open",
            (("a.jsonl", "b.jsonl"), {}, ("ingest.kind=open",)),
        ),
        ("promote v1 reason=because run=a", (("v1",), {"reason": "because"}, ("run=a",))),
        ("promote run=a v1 reason=a=b", (("v1",), {"reason": "a=b"}, ("run=a",))),
        ("status verify=true", ((), {"verify": "true"}, ())),
        ("run --cfg job recipe=x", ((), {}, ("--cfg", "job", "recipe=x"))),
        ("run +a=1 ~b", ((), {}, ("+a=1", "~b"))),
        ("ingest week/a=b.jsonl", (("week/a=b.jsonl",), {}, ())),
        ("ingest ingest.retract=a.txt", ((), {}, ("ingest.retract=a.txt",))),
    ],
)
def test_positionals_and_own_keys_are_taken_off_first(
    line: str, expected: tuple[object, ...]
) -> None:
    call = cli.parse(line.split())
    assert (call.positionals, call.extra, call.overrides) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fly", "unknown command fly: choose one of run, launch"),
        ("stage", "NODE is missing: write rlhf stage NODE"),
        ("run quickstart", "quickstart is not key=value"),
        ("ingest", "FILE is missing"),
        ("export v1", "DIR is missing"),
    ],
)
def test_wrong_command_lines_are_explained(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cli.parse(line.split())


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("run recipe=quickstart ppo.kl_coef=abc", ["ppo.kl_coef=abc", "Float"]),
        ("run recipe=quickstart ppo.kl_coeff=1", ["did you mean ppo.kl_coef?"]),
        ("run recipe=quickstart ppo.batch_size=7", ["ppo.batch_size=7", "multiple"]),
        ("run recipe=smollm2 model.path=nowhere", ["model.path=nowhere", "Hugging Face"]),
        ("run recipe=smollm2 model=toy", ["no sft set", "rlhf ingest"]),
        ("status run=none", ["run=none does not exist"]),
        ("stage sft recipe=quickstart", ["has not started"]),
        ("ingest missing.jsonl", ["missing.jsonl"]),
        ("ingest x ingest.kind=week", ["ingest.kind=week", "batch"]),
        ("run recipe=quickstart --multirun ppo.kl_coef=abc,0.1", ["ppo.kl_coef=abc"]),
        ("run --cfg job recipe=quickstart ppo.kl_coeff=1", ["did you mean ppo.kl_coef?"]),
    ],
)
def test_bad_input_exits_2_with_one_line_and_nothing_left_behind(
    line: str, parts: list[str], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line.split()) == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert len(err.strip().splitlines()) == 1, err
    for part in parts:
        assert part in err
    assert [
        path for path in here.rglob("*") if path.name != "multirun.yaml" and path.is_file()
    ] == []


def test_a_flag_that_hydra_does_not_know_exits_2(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "recipe=quickstart", "--bad-flag"]) == 2
    assert "--bad-flag" in capfd.readouterr().err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("a"), 2), (StageError("a"), 1), (RuntimeError("a"), 1)]
)
def test_exit_codes_follow_the_error(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: Config) -> int:
        raise error

    monkeypatch.setitem(commands.HANDLERS, "clean", fail)  # type: ignore[arg-type]
    assert cli.main(["clean", "recipe=quickstart"]) == code
    assert ("Traceback" in capsys.readouterr().err) is (type(error) is RuntimeError)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), ValueError("No space left on device (28)")],
)
def test_a_full_disk_is_one_line_and_no_bug(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: Config) -> int:
        try:
            raise error
        except type(error) as cause:
            raise RuntimeError("cannot write") from cause

    monkeypatch.setitem(commands.HANDLERS, "clean", fail)  # type: ignore[arg-type]
    assert cli.main(["clean", "recipe=quickstart"]) == 1
    said = capsys.readouterr().err
    assert "the disk is full: free some space" in said
    assert len(said.strip().splitlines()) == 1


def test_cfg_prints_the_composed_configuration(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--cfg", "job", "recipe=quickstart", "rounds.limit=7"]) == 0
    out = capfd.readouterr().out
    assert "limit: 7" in out
    assert "stream: sim-${run}" in out
    assert list(here.iterdir()) == []


def test_command_help_lists_settings_and_groups(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["stage", "--help"]) == 0
    out = capfd.readouterr().out
    assert "recipe: llama2_70b, llama2_7b, quickstart, smollm2" in out
    assert "kl_coef: 0.01" in out
    assert list(here.iterdir()) == []


def test_a_sweep_names_its_runs_apart(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = "plan --multirun recipe=quickstart seed=1,2 rounds.limit=1"
    assert cli.main(line.split()) == 0
    out = capfd.readouterr().out
    assert "plan of run quickstart-rounds.limit-1-seed-1" in out
    assert "plan of run quickstart-rounds.limit-1-seed-2" in out


def test_a_sweep_over_run_keeps_its_names(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "-m", "recipe=quickstart", "run=a,b", "rounds.limit=1"]) == 0
    out = capfd.readouterr().out
    assert "plan of run a\n" in out.replace(" \n", "\n").replace("  ", "")
    assert "plan of run b\n" in out.replace(" \n", "\n").replace("  ", "")


def test_planning_writes_nothing(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "recipe=quickstart"]) == 0
    assert "round 2: ppo, batches round-02" in capfd.readouterr().out
    assert list(here.rglob("*")) == []
