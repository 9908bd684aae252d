"""A whole week in a browser: pairs, two annotators, a batch, a round, and its accuracy in front."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_run import ROOT, SETTINGS, rlhf

from rlhf.artifacts import read_json, write_jsonl
from rlhf.data.records import STRENGTHS
from rlhf.toy import World

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("fastapi")

pytestmark = pytest.mark.browser

RUN, STREAM = "weekly", "people"
TINY = (
    *SETTINGS,
    "toy.sft_rows=120",
    "collect.annotators=people",
    "collect.num_pairs=5",
    "rejection.temperatures=[]",
    "rounds.limit=null",
    "rounds.schedule=[rejection]",
    f"data.stream={STREAM}",
)
ROUND_SECONDS = 400
"""Longest wait for a round of nodes; it takes a minute on two idle cores."""


@dataclass
class Served:
    """A running service, tokens by name, and the folder that everything lies in."""

    root: Path
    url: str
    tokens: dict[str, str]

    def get(self, path: str) -> Any:
        """Return an answer of the API, as the operator sees it."""
        headers = {"Authorization": f"Bearer {self.tokens['olga']}"}
        request = urllib.request.Request(f"{self.url}/api/v1/{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def wait(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + ROUND_SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"{what} did not come: {self.log()}"
            time.sleep(0.5)

    def log(self) -> str:
        """Return the end of what the server and the run said."""
        files = (self.root / "server.txt", self.root / "runs" / RUN / "background.txt")
        return "\n".join(path.read_text()[-2000:] for path in files if path.exists())

    def is_done(self, node: str) -> bool:
        """Tell whether the API shows a node as done."""
        rows = self.get(f"runs/{RUN}/nodes?limit=200")["items"]
        return any(row["name"] == node and row["state"] == "done" for row in rows)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.store={tmp_path / 'store'}"]
    settings = [
        *paths,
        "service.tokens=true",
        "service.port=0",
        "service.autolaunch=true",
        "service.poll_seconds=0.3",
        "service.settle_seconds=0.2",
        "service.annotation.overlap_share=0.5",
        f"service.folder={tmp_path / 'service'}",
        f"ingest.stream={STREAM}",
    ]
    done = rlhf("run", "recipe=quickstart", f"run={RUN}", *paths, *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    tokens = {}
    for name, role in (("olga", "operator"), ("ann", "annotator"), ("ben", "annotator")):
        made = rlhf("token", name, f"role={role}", *settings, cwd=tmp_path)
        assert made.returncode == 0, made.stderr
        tokens[name] = made.stdout.strip()
    with (tmp_path / "server.txt").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "rlhf.cli", "serve", *settings],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    found = Served(tmp_path, "", tokens)
    try:
        found.wait(lambda: "http://" in found.log() or server.poll() is not None, "the address")
        match = re.search(r"http://[\d.]+:\d+", found.log())
        assert match is not None, found.log()
        found.url = match.group()
        yield found
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        rlhf("cancel", f"run={RUN}", *paths, cwd=tmp_path)


def sign_in(browser: playwright.Browser, served: Served, name: str, **options: Any) -> Any:
    page = browser.new_context(**options).new_page()
    page.goto(f"{served.url}/annotate" if name != "olga" else served.url)
    page.get_by_label("Token").fill(served.tokens[name])
    page.get_by_role("button", name="Sign in").click()
    return page


def judge(page: Any, choose: Callable[[int], str]) -> int:
    """Judge by keyboard until there is no pair left; returns how many there were."""
    number = 0
    while page.locator("#verdict").count():
        key = page.locator("#verdict").get_attribute("data-key")
        for pressed in (choose(number), "q", "o"):
            page.keyboard.press(pressed)
        page.keyboard.press("Control+Enter")
        page.wait_for_function(
            "key => document.querySelector('#verdict')?.dataset.key !== key", arg=key
        )
        page.wait_for_load_state()
        number += 1
    return number


def first_batch() -> list[dict[str, Any]]:
    """Return a vendor's batch of the toy world, graded."""
    rows = []
    for number, row in enumerate(World(0).open_set(80, 3)):
        found = row.to_json()
        for name in ("batch_id", "heldout", "repeat_prompt"):
            del found[name]
        rows.append({**found, "strength": STRENGTHS[number % 4]})
    return rows


def test_a_week_from_annotators_to_the_next_version(
    browser: playwright.Browser, served: Served, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "week-01.jsonl", first_batch())
    (tmp_path / "week-01.jsonl").rename(tmp_path / "service/inbox/week-01.jsonl")
    served.wait(lambda: served.is_done("round-01/collect"), "the first round")

    operator = sign_in(browser, served, "olga")
    operator.goto(f"{served.url}/weeks")
    operator.get_by_label("Name").fill("week-02")
    operator.get_by_role("button", name="Create").click()
    operator.wait_for_url("**/weeks/week-02")

    ann, ben = (sign_in(browser, served, name) for name in ("ann", "ben"))
    assert "promoted" not in ann.content()
    assert "temperature" not in ann.content()
    first = ann.locator("#verdict").get_attribute("data-key")
    ann.keyboard.press("2")
    ann.locator("#comment").fill("half a thought")
    ann.locator("#kept").get_by_text("Draft kept on the server").wait_for()
    ann.reload()
    assert ann.locator("#verdict").get_attribute("data-key") == first
    assert ann.locator("#comment").input_value() == "half a thought"

    judged = judge(ben, lambda number: "1378"[number % 4])
    judged += judge(ann, lambda number: "2468"[number % 4])
    pairs = [json.loads(line) for line in _lines(served, "round-01/collect/pairs.jsonl")]
    assert judged == len(pairs) + round(0.5 * len(pairs))

    operator.goto(f"{served.url}/weeks/week-02")
    assert f"{judged} of {judged} verdicts" in operator.content()
    operator.get_by_label("takes no more verdicts", exact=False).check()
    operator.get_by_role("button", name="Close the week").click()

    served.wait(
        lambda: any(b["id"] == "week-02" for b in served.get(f"streams/{STREAM}/batches")["items"]),
        "the batch",
    )
    operator.goto(f"{served.url}/batches?stream={STREAM}")
    assert operator.get_by_role("link", name="week-02").count() == 1
    batch = read_json(tmp_path / f"store/{STREAM}/batches/week-02/manifest.json")
    assert batch["counts"]["refused"] == 0
    assert batch["counts"]["read"] == len(pairs)

    served.wait(lambda: served.is_done("round-02/evaluate"), "the second round")
    versions = [row["name"] for row in served.get(f"runs/{RUN}/versions")["items"]]
    assert versions == ["v0", "v1", "v2"]
    operator.goto(f"{served.url}/runs/{RUN}")
    front = operator.locator("#accuracy-by-strength").text_content()
    assert "round 2" in front
    for strength in ("significantly", "negligibly"):
        assert strength in front


def _lines(served: Served, name: str) -> list[str]:
    return (served.root / "runs" / RUN / name).read_text(encoding="utf-8").splitlines()
