"""Every file in jobs/: its own parser reads it, and each rlhf command in it composes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from configparser import ConfigParser
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from cronsim import CronSim

from rlhf.cli import COMMANDS, parse
from rlhf.compose import load
from rlhf.config import Config
from rlhf.inference.vllm_server import parse as parse_server

JOBS = Path(__file__).parents[2] / "jobs"
WEEKLY = JOBS / "weekly.sh"
VLLM_SERVER = JOBS / "vllm-server.sbatch"
SHELL = sorted(path for path in JOBS.iterdir() if path.suffix in (".sh", ".sbatch"))
UNITS = sorted(path for path in JOBS.iterdir() if path.suffix in (".service", ".timer"))
CRONTABS = sorted(JOBS.glob("*.cron"))
MANIFESTS = sorted(path for path in JOBS.iterdir() if path.suffix in (".yaml", ".yml"))
MARKS = {"@options@": "#SBATCH --job-name=a", "@setup@": ":", "@command@": "rlhf stage sft run=a"}
"""What `rlhf launch` fills into a template, as far as a parser cares."""

STUB = """#!{python}
import json, os, sys, time
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if os.environ.get("SLOW_COMMAND") == sys.argv[1]:
    time.sleep(60)
sys.exit(2 if os.environ.get("FAILING_COMMAND") == sys.argv[1] else 0)
"""


def filled(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    for mark, value in MARKS.items():
        text = text.replace(mark, value)
    return text


def tool(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, input=text, capture_output=True, text=True, check=False)


# Parsers


def test_every_file_has_a_parser() -> None:
    files = {path for path in JOBS.iterdir() if path.is_file()}
    assert files == {*SHELL, *UNITS, *CRONTABS, *MANIFESTS}
    assert {path.name for path in files} >= {
        *("quickstart.sh", "weekly.sh", "weekly.cron"),
        *("rlhf-weekly.service", "rlhf-weekly.timer"),
    }


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_files_are_strict_and_clean(path: Path) -> None:
    text = filled(path)
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert path.suffix != ".sh" or os.access(path, os.X_OK)
    done = tool("bash", "-n", text=text)
    assert done.returncode == 0, done.stderr
    shellcheck = str(Path(sys.executable).parent / "shellcheck")
    done = tool(shellcheck, "--shell=bash", "--enable=check-unassigned-uppercase", "-", text=text)
    assert done.returncode == 0, done.stdout + done.stderr


def test_manifests_are_yaml() -> None:
    for path in MANIFESTS:
        assert all(isinstance(item, dict) for item in yaml.safe_load_all(filled(path))), path


def crontab(path: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return a crontab's variables, and schedule and command of each entry."""
    variables, entries = {}, []
    for line in path.read_text(encoding="utf-8").splitlines():
        setting = re.fullmatch(r"(\w+)=(.*)", line)
        if setting:
            variables[setting.group(1)] = setting.group(2)
        elif line and not line.startswith("#"):
            *schedule, command = line.split(maxsplit=5)
            entries.append((" ".join(schedule), command))
    return variables, entries


def test_cron_starts_the_weekly_job_on_mondays() -> None:
    [path] = CRONTABS
    variables, [(schedule, command)] = crontab(path)
    assert variables["SHELL"] == "/bin/bash"
    times = CronSim(schedule, datetime(2026, 1, 1, tzinfo=UTC))
    firsts = [next(times) for _ in range(4)]
    assert [(when.weekday(), when.hour, when.minute) for when in firsts] == [(0, 6, 30)] * 4
    assert {(b - a).days for a, b in pairwise(firsts)} == {7}
    assert "%" not in command
    assert Path(shlex.split(command)[0]).name == WEEKLY.name


class Unit(ConfigParser):
    """A systemd unit: keys keep their case, and a key given again adds to the first."""

    def __init__(self, path: Path) -> None:
        super().__init__(interpolation=None, strict=False, comment_prefixes=("#", ";"))
        self.optionxform = str
        self.repeated = [
            line.partition("=")[2]
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.startswith("Environment=")
        ]
        self.read_string(path.read_text(encoding="utf-8"))


def test_timer_catches_up_on_a_missed_monday() -> None:
    timer = Unit(JOBS / "rlhf-weekly.timer")
    assert timer["Timer"]["OnCalendar"] == "Mon *-*-* 06:30:00"
    assert timer["Timer"]["Persistent"] == "true"
    assert timer["Install"]["WantedBy"] == "timers.target"


def test_service_can_write_its_data_and_nothing_else() -> None:
    service = Unit(JOBS / "rlhf-weekly.service")["Service"]
    assert service["Type"] == "oneshot"
    assert service["User"] not in ("", "root")
    assert service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""
    variables = service_variables()
    for name in ("RUNS", "STORE", "INBOX"):
        assert Path(variables[name]).is_relative_to(service["ReadWritePaths"])
    assert service["ReadOnlyPaths"] == variables["INBOX"]


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """The program must exist for systemd, so the copy that is verified names this checkout's."""
    if shutil.which("systemd-analyze") is None:
        assert UNITS  # The parser above is what is left on a machine without systemd.
        return
    for path in UNITS:
        text = path.read_text(encoding="utf-8")
        (tmp_path / path.name).write_text(text.replace("/opt/rlhf/jobs", str(JOBS)))
    timer, service = tmp_path / "rlhf-weekly.timer", tmp_path / "rlhf-weekly.service"
    done = tool("systemd-analyze", "verify", "--man=no", str(timer), str(service))
    assert (done.returncode, done.stderr) == (0, "")
    words = ("security", "--offline=yes", "--threshold=20", "--no-pager")
    done = tool("systemd-analyze", *words, str(service))
    assert done.returncode == 0, done.stdout
    done = tool("systemd-analyze", "calendar", Unit(timer)["Timer"]["OnCalendar"])
    assert done.returncode == 0, done.stderr


def service_variables() -> dict[str, str]:
    unit = Unit(JOBS / "rlhf-weekly.service")
    return dict(text.split("=", 1) for text in unit.repeated)


# Commands


@dataclass
class Site:
    """An inbox, a store, and an `rlhf` that only records its arguments."""

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir()
        (self.folder / "inbox").mkdir()
        stub = self.folder / "bin" / "rlhf"
        stub.write_text(STUB.format(python=sys.executable), encoding="utf-8")
        stub.chmod(0o755)

    @property
    def inbox(self) -> Path:
        return self.folder / "inbox"

    def env(self, **more: str) -> dict[str, str]:
        return {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "RECORD": str(self.folder / "record"),
            "INBOX": str(self.inbox),
            "RUN": "weekly",
            "RUNS": str(self.folder / "runs"),
            "STORE": str(self.folder / "store"),
            **more,
        }

    def call(self, script: Path, *overrides: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(script), *overrides],
            cwd=self.folder,
            env=self.env(**more),
            capture_output=True,
            text=True,
            check=False,
        )

    def recorded(self) -> list[list[str]]:
        path = self.folder / "record"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def compose(command: Sequence[str]) -> Config:
    call = parse(command)
    return load(call.overrides, needs_run=COMMANDS[call.name].needs_run)


def scheduled() -> list[tuple[dict[str, str], list[str]]]:
    """Return variables and words of what cron and systemd start."""
    [(variables, [(_, command)])] = [crontab(path) for path in CRONTABS]
    unit = Unit(JOBS / "rlhf-weekly.service")["Service"]["ExecStart"]
    return [(variables, shlex.split(command)), (service_variables(), shlex.split(unit))]


def test_cron_and_systemd_start_the_same() -> None:
    (cron, one), (service, other) = scheduled()
    cron.pop("SHELL")
    assert (cron, one) == (service, other)


@pytest.mark.parametrize("number", [0, 1], ids=["cron", "systemd"])
def test_scheduled_commands_compose(number: int, site: Site) -> None:
    variables, [program, *overrides] = scheduled()[number]
    assert (JOBS / Path(program).name).is_file()
    (site.inbox / "week-01.jsonl").touch()
    done = site.call(JOBS / Path(program).name, *overrides, RUN=variables["RUN"])
    assert done.returncode == 0, done.stderr
    commands = site.recorded()
    assert [command[0] for command in commands] == ["ingest", "launch"]
    for command in commands:
        # The subcommand `launch` comes with the launchers.
        if command[0] == "launch" and "launch" not in COMMANDS:
            continue
        config = compose(command)
        assert config.run == variables["RUN"]
        assert config.recipe == "llama2_7b"
        assert config.launcher.kind.name == "slurm"
        assert config.paths.store == str(site.folder / "store")


def test_quickstart_composes(site: Site) -> None:
    done = site.call(JOBS / "quickstart.sh", "rounds.limit=3")
    assert done.returncode == 0, done.stderr
    [command] = site.recorded()
    assert command[0] == "run"
    config = compose(command)
    assert (config.recipe, config.rounds.limit) == ("quickstart", 3)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_plain_rlhf_lines_compose(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines without shell variables are read as they stand; the others were run above."""
    lines = re.findall(r"^(?:exec )?rlhf (.*)$", filled(path), flags=re.MULTILINE)
    assert lines or path in (WEEKLY, VLLM_SERVER)
    for words in (shlex.split(line) for line in lines if '"$' not in line):
        assert parse(words).name in COMMANDS


def test_the_vllm_server_gets_options_that_it_knows(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > recorded\n')
    stub.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(VLLM_SERVER), "the model", "runs", "--max-length", "512"]
    refused = subprocess.run(command, env=path, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "set a secret" in refused.stderr
    assert not (tmp_path / "recorded").exists()

    secret = {**path, "RLHF_GENERATOR_TOKEN": "secret"}
    done = subprocess.run(command, env=secret, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generator.url=http://" in done.stdout
    words = (tmp_path / "recorded").read_text().splitlines()
    assert words[:2] == ["-m", "rlhf.inference.vllm_server"]
    options = parse_server(words[2:])
    assert (options.model, options.folder, options.max_length) == ("the model", "runs", 512)


def test_weekly_job_ingests_in_name_order_then_launches(site: Site) -> None:
    for name in ("week-10.jsonl", "week-02.jsonl", "b=c.jsonl", "notes.txt"):
        (site.inbox / name).touch()
    done = site.call(WEEKLY, "recipe=smollm2")
    assert (done.returncode, done.stderr) == (0, "")
    paths = [f"paths.runs={site.folder / 'runs'}", f"paths.store={site.folder / 'store'}"]
    overrides = ["run=weekly", *paths, "recipe=smollm2"]
    files = [str(site.inbox / name) for name in ("b=c.jsonl", "week-02.jsonl", "week-10.jsonl")]
    ingest, launch = site.recorded()
    assert ingest == ["ingest", *files, *overrides]
    assert launch == ["launch", *overrides]
    assert list(parse(ingest).positionals) == files
    # The recipe's share holds for what is ingested, so the run does not refuse the store later.
    assert compose(ingest).data.heldout_share == 0.25


def test_weekly_job_reads_a_relative_inbox_as_files(site: Site) -> None:
    (site.inbox / "a=b.jsonl").touch()
    assert site.call(WEEKLY, INBOX="inbox").returncode == 0
    assert parse(site.recorded()[0]).positionals == ("./inbox/a=b.jsonl",)


def test_weekly_job_stops_before_the_launch_when_a_file_is_refused(site: Site) -> None:
    (site.inbox / "week-01.jsonl").touch()
    done = site.call(WEEKLY, FAILING_COMMAND="ingest")
    assert done.returncode == 2
    assert [command[0] for command in site.recorded()] == ["ingest"]


def test_weekly_job_hands_on_the_exit_code_of_the_launch(site: Site) -> None:
    assert site.call(WEEKLY, FAILING_COMMAND="launch").returncode == 2


def test_weekly_job_launches_what_is_left_when_nothing_was_delivered(site: Site) -> None:
    done = site.call(WEEKLY)
    assert done.returncode == 0
    assert "no .jsonl file in INBOX=" in done.stderr
    assert [command[0] for command in site.recorded()] == ["launch"]


@pytest.mark.parametrize("name", ["INBOX", "RUN"])
def test_weekly_job_names_what_is_missing(name: str, site: Site) -> None:
    env = site.env()
    del env[name]
    done = subprocess.run([str(WEEKLY)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"set {name} to" in done.stderr
    assert site.call(WEEKLY, INBOX=str(site.folder / "none")).returncode == 2
    assert site.recorded() == []


@pytest.mark.parametrize("slow", ["ingest", "launch"])
def test_two_weekly_jobs_do_not_overlap(slow: str, site: Site) -> None:
    """The lock holds during the ingest and, across exec, during the launch."""
    (site.inbox / "week-01.jsonl").touch()
    env = site.env(SLOW_COMMAND=slow)
    first = subprocess.Popen([str(WEEKLY)], env=env, cwd=site.folder, start_new_session=True)
    try:
        wanted = 1 if slow == "ingest" else 2
        deadline = time.monotonic() + 30
        while len(site.recorded()) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(site.recorded()) == wanted
        second = site.call(WEEKLY)
        assert second.returncode == 1
        assert "another weekly job holds" in second.stderr
        assert len(site.recorded()) == wanted
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
