"""A headless Chromium without any network, and the pages that it opens."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from report_run import make_run

from rlhf.report.write import PAGE, write_comparison, write_report

playwright = pytest.importorskip("playwright.sync_api")

PROGRAM = "chromium"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def install() -> str:
    """Install Debian's Chromium where it is missing; returns why that is impossible, or ""."""
    if shutil.which(PROGRAM):
        return ""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "chromium is not installed, and this is not root on a Debian machine"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", PROGRAM]):
        done = subprocess.run(
            ["apt-get", "--quiet", *command], env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            return f"Debian's chromium cannot be installed: {done.stderr.strip()[-200:]}"
    return ""


@pytest.fixture(scope="session")
def browser() -> Iterator[playwright.Browser]:
    reason = install()
    if reason:
        pytest.skip(reason)
    with playwright.sync_playwright() as started:
        program = shutil.which(PROGRAM)
        opened = started.chromium.launch(executable_path=program, args=list(FLAGS))
        yield opened
        opened.close()


@dataclass(frozen=True)
class Pages:
    """The files of a run's page and of one that compares it with another."""

    report: Path
    comparison: Path


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    run = make_run(tmp_path_factory.mktemp("a"))
    other = make_run(tmp_path_factory.mktemp("b"), "other", seed=3, rounds=2)
    write_report(run)
    write_comparison([run, other])
    return Pages(run / PAGE, run.parent / "compare-made-up-other.html")


@dataclass
class Opened:
    """A page with what it said and what it asked for."""

    page: playwright.Page
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def opened(browser: playwright.Browser) -> Iterator[Callable[..., Opened]]:
    """Return a function that opens a file, offline; whatever goes wrong there is an error."""
    contexts, found = [], []

    def open_file(path: Path, **options: object) -> Opened:
        context = browser.new_context(offline=True, accept_downloads=True, **options)
        contexts.append(context)
        result = Opened(context.new_page())
        found.append(result)
        result.page.on("console", lambda message: result.messages.append(message.text))
        result.page.on("pageerror", lambda error: result.messages.append(str(error)))
        result.page.on("request", lambda request: result.requests.append(request.url))
        result.page.goto(path.as_uri())
        return result

    yield open_file
    for result in found:
        assert result.messages == []
        schemes = [url.partition(":")[0] for url in result.requests]
        assert set(schemes) <= {"file", "data", "blob"}
        assert schemes.count("file") == 1
    for context in contexts:
        context.close()
