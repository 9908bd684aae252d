"""The dashboard in a real browser: whole at two widths, live, by keyboard, and without script."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from report_run import make_run

from rlhf.artifacts import read_json, write_json, write_jsonl
from rlhf.config import Config, Paths, Service
from rlhf.lease import Lease
from rlhf.service.state import open_state

playwright = pytest.importorskip("playwright.sync_api")
uvicorn = pytest.importorskip("uvicorn")
pytestmark = pytest.mark.browser

expect = playwright.expect
RUN, NODE = "made-up", "round-03/evaluate"
PATIENCE = 20_000
"""Milliseconds that a page may take on a busy machine."""
MINUTE = 61_000
"""Milliseconds within which every page asks again, and then some."""
PAGES = {
    "runs": "/",
    "run": f"/runs/{RUN}",
    "node": f"/runs/{RUN}/node?name=round-02/ppo",
    "texts": f"/runs/{RUN}/node?name=round-02/evaluate",
    "report": f"/runs/{RUN}/report",
    "versions": f"/runs/{RUN}/versions",
    "batches": "/batches",
    "batch": "/batches/weekly/week-3",
    "audit": "/audit",
    "login": "/login",
}
TOO_WIDE = """() => {
  const inside = (element) => {
    for (let up = element; up; up = up.parentElement) {
      const style = getComputedStyle(up);
      if (style.overflowX === "auto" || style.overflow === "hidden") return true;
    }
    return false;
  };
  return Array.from(document.body.querySelectorAll("*"))
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 && !inside(e))
    .map((e) => e.tagName + " " + e.textContent.slice(0, 40));
}"""
NAMELESS = """() => Array.from(document.querySelectorAll("a, button, input, select, textarea"))
  .filter((e) => e.type !== "hidden" && e.offsetParent !== null)
  .filter((e) => !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-label")))
  .map((e) => e.outerHTML.slice(0, 90))"""
COLOURS = """() => {
  const found = new Set();
  const selector = "p, td, th, a, h1, h2, h3, dt, dd, span, label, button, summary, text, pre";
  for (const e of document.querySelectorAll(selector)) {
    if (!e.textContent.trim() || e.closest(".plotly, .unseen, .skip")) continue;
    const backOf = (element) => getComputedStyle(element).backgroundColor;
    let up = e;
    while (up && backOf(up) === "rgba(0, 0, 0, 0)") up = up.parentElement;
    const box = e.parentElement.querySelector(":scope > rect.box");
    const back = box ? getComputedStyle(box).fill : up ? backOf(up) : "rgb(255, 255, 255)";
    const style = getComputedStyle(e);
    found.add([e.tagName === "text" ? style.fill : style.color, back].join("|"));
  }
  return Array.from(found);
}"""


@dataclass
class Site:
    """A served folder of runs; nodes may be changed while pages look at them."""

    url: str
    folder: Path
    root: Path


@dataclass
class Opened:
    """A page, what it said, and what it asked for."""

    page: Any
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    from rlhf.service.app import create_app

    root = tmp_path_factory.mktemp("dashboard")
    folder = make_run(root, RUN, rounds=3)
    lines = [f"2026-11-22 20:00:{i:02} line {i} " + 30 * "word " for i in range(50)]
    (folder / "round-02" / "ppo" / "log.txt").write_text("\n".join(lines), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = Paths(runs=str(root / "runs"), store=str(root / "store"))
    service = Service(folder=str(root / "service"), port=port)
    state = open_state(Config(recipe="none", paths=paths, service=service))
    settings = uvicorn.Config(create_app(state), port=port, log_level="warning")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + PATIENCE / 1000
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield Site(f"http://127.0.0.1:{port}", folder, root)
    server.should_exit = True
    thread.join()
    state.engine.dispose()


@pytest.fixture
def visit(browser: Any, site: Site) -> Iterator[Callable[..., Opened]]:
    """Return a function that opens a page; complaints and requests to elsewhere are errors."""
    contexts, found = [], []

    def open_page(path: str, *, clock: bool = False, **options: Any) -> Opened:
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        result = Opened(context.new_page())
        found.append(result)
        result.page.on("console", lambda message: result.messages.append(message.text))
        result.page.on("pageerror", lambda error: result.messages.append(str(error)))
        result.page.on("request", lambda request: result.requests.append(request.url))
        if clock:
            # Timers go off when a test says so.
            result.page.clock.install()
        result.page.goto(site.url + path)
        return result

    yield open_page
    for result in found:
        assert result.messages == []
        elsewhere = [u for u in result.requests if not u.startswith((site.url, "data:", "blob:"))]
        assert elsewhere == []
    for context in contexts:
        context.close()


Visit = Callable[..., Opened]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_and_can_be_read(width: int, scheme: str, visit: Visit, site: Site) -> None:
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    page = visit("/", **options).page
    for name, path in PAGES.items():
        page.goto(site.url + path)
        if name == "node":
            page.locator(".chart .main-svg").first.wait_for()
        for fold in page.locator("details.fold").all():
            fold.evaluate("fold => { fold.open = true; }")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate(TOO_WIDE) == [], name
        assert page.evaluate(NAMELESS) == [], name
        weak = {
            pair: round(ratio, 1)
            for pair in page.evaluate(COLOURS)
            if (ratio := contrast(*pair.split("|"))) < 4.5
        }
        assert weak == {}, name


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours by WCAG 2."""
    lights = sorted(map(luminance, (first, second)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour: str) -> float:
    parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_keyboard_reaches_everything(visit: Visit) -> None:
    page = visit(f"/runs/{RUN}").page
    page.keyboard.press("Tab")
    skip = page.locator(":focus")
    assert skip.inner_text() == "Skip to the content"
    assert skip.bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    seen = []
    while len(seen) < 80 and NODE not in " ".join(seen):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.getAttribute('aria-label') ?? ''"))
    box = page.locator(":focus rect.box")
    assert float(box.evaluate("e => parseFloat(getComputedStyle(e).strokeWidth)")) > 2
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/node.name="))
    assert page.locator("h1").inner_text() == NODE


def test_a_run_that_works_is_followed(visit: Visit, site: Site) -> None:
    folder = site.folder / NODE
    manifest = read_json(folder / "manifest.json")
    progress = {"step": 2, "total": 8, "seconds": 4.0, "eta": 12.0}
    lease = Lease(folder)
    try:
        (folder / "manifest.json").unlink()
        lease.take()
        write_json(folder / "progress.json", progress)
        page = visit(f"/runs/{RUN}", clock=True).page
        node = page.locator(f"a[aria-label^='{NODE}']")
        expect(node).to_have_attribute("class", "running")
        assert "running 2/8, 12.0s left" in node.get_attribute("aria-label")
        page.locator("#node-table summary").click()
        node.focus()
        write_json(folder / "progress.json", {**progress, "step": 5})
        page.clock.run_for(MINUTE)
        expect(node).to_have_attribute("aria-label", re.compile("5/8"), timeout=PATIENCE)
        assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(NODE)
        assert page.locator("#node-table").evaluate("e => e.open")
        other = visit(f"/runs/{RUN}/node?name={NODE}", clock=True).page
        (folder / "log.txt").write_text("a word from the node\n", encoding="utf-8")
        row = {"step": 1, "eval/win_rate": 0.5}
        write_jsonl(folder / "metrics.jsonl", [row, {**row, "step": 2}])
        other.clock.run_for(MINUTE)
        expect(other.locator("pre.log")).to_contain_text("a word from", timeout=PATIENCE)
        chart = other.locator(".chart", has_text="eval/win_rate")
        expect(chart.locator(".points path")).to_have_count(2, timeout=PATIENCE)
        write_jsonl(folder / "metrics.jsonl", [{**row, "step": step} for step in (1, 2, 3)])
    finally:
        lease.release()
        write_json(folder / "manifest.json", manifest)
    page.clock.run_for(MINUTE)
    expect(node).to_have_attribute("class", "done", timeout=PATIENCE)
    # Its last rows are fetched once the node is known to be done.
    other.clock.run_for(MINUTE)
    expect(other.locator("[data-state=done]")).to_have_count(1, timeout=PATIENCE)
    other.clock.run_for(MINUTE)
    expect(chart.locator(".points path")).to_have_count(3, timeout=PATIENCE)


def test_a_service_that_is_away_is_said_and_forgotten(visit: Visit) -> None:
    opened = visit("/", clock=True)
    page = opened.page
    trouble = page.locator("#trouble")
    for answer, said in (
        (lambda route: route.abort(), "does not answer"),
        (lambda route: route.fulfill(status=503, body="no"), "cannot say how things stand"),
        (None, ""),
        (lambda route: route.fulfill(status=404, body="no"), "is gone"),
    ):
        if answer is not None:
            page.route("**/live", answer)
        page.clock.run_for(MINUTE)
        expect(trouble).to_contain_text(said)
        expect(trouble).to_be_visible(visible=said != "")
        page.unroute("**/live")
    refused = [text for text in opened.messages if re.search("ERR_FAILED|503|404", text)]
    assert refused == opened.messages
    opened.messages.clear()


def test_what_somebody_reads_or_marks_stays_when_it_is_renewed(visit: Visit, site: Site) -> None:
    page = visit(f"/runs/{RUN}", clock=True).page
    old = page.locator("[data-live] [data-old]")
    summary = page.locator("#node-table summary")

    def renew() -> None:
        with page.expect_response(re.compile("/live$")):
            page.clock.run_for(MINUTE)
        page.wait_for_timeout(200)

    page.evaluate("document.querySelector('[data-live]').firstElementChild.dataset.old = 'yes'")
    renew()
    assert old.count() == 1
    summary.click()
    manifest = site.folder / NODE / "manifest.json"
    kept = manifest.read_bytes()
    manifest.unlink()
    try:
        page.locator("#node-table table").evaluate("e => getSelection().selectAllChildren(e)")
        renew()
        assert old.count() == 1
        page.evaluate("getSelection().removeAllRanges()")
        summary.focus()
        renew()
        expect(old).to_have_count(0)
        expect(summary).to_be_focused()
        expect(page.locator("p.message.stop")).to_contain_text(f"{NODE}: killed")
        # The message above leads to the same page as the table's link.
        link = page.locator("#node-table tbody a", has_text=NODE)
        link.focus()
        write_json(manifest.with_name("progress.json"), {"step": 7, "total": 99})
        renew()
        expect(page.locator("#node-table")).to_contain_text("7/99")
        expect(link).to_be_focused()
    finally:
        manifest.write_bytes(kept)


def test_metrics_are_charts_in_the_readers_colours(visit: Visit) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page = visit(PAGES["node"], color_scheme=scheme).page
        chart = page.locator(".chart", has_text="rollout/kl_to_start")
        chart.locator(".scatterlayer path.js-line").wait_for()
        colours.append(chart.locator("path.js-line").evaluate("e => getComputedStyle(e).stroke"))
        assert page.locator(".chart").count() > 10
        log = page.locator("pre.log")
        assert log.evaluate("e => e.scrollTop + e.clientHeight >= e.scrollHeight - 4")
    assert colours[0] != colours[1]


def comparisons(number: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"up-{number}-{i}",
            "prompt": [{"role": "user", "content": f"upload {number} question {i} about owls"}],
            "chosen": f"an answer of {number} words, number {i}",
            "rejected": f"nothing of {number} worth reading, number {i}",
            "strength": "better",
            "axis": "helpfulness",
            "source": "vendor-a",
        }
        for i in range(12)
    ]


def upload(page: Any, path: Path) -> Any:
    page.locator("#upload-file").set_input_files(path)
    page.get_by_role("combobox", name="Stream").fill("uploads")
    page.get_by_role("button", name="Upload").click()
    return page.locator("#upload-result")


def test_files_are_uploaded_and_refused_with_reasons(
    visit: Visit, site: Site, tmp_path: Path
) -> None:
    opened = visit("/batches")
    page = opened.page
    page.get_by_role("button", name="Upload").click()
    result = page.locator("#upload-result")
    expect(result).to_contain_text("Choose a file first")
    good, bad = tmp_path / "week-90.jsonl", tmp_path / "week-91.jsonl"
    write_jsonl(good, comparisons(90))
    text = upload(page, good)
    expect(text).to_contain_text("added batch week-90 to stream uploads", timeout=PATIENCE)
    manifest = read_json(site.root / "store" / "uploads" / "batches" / "week-90" / "manifest.json")
    assert manifest["counts"]["accepted"] == 12
    expect(upload(page, good)).to_contain_text("already", timeout=PATIENCE)
    rows = [json.dumps(row) for row in comparisons(91)]
    bad.write_text("\n".join([*rows, '{"id": "x"}', "{"]) + "\n", encoding="utf-8")
    expect(upload(page, bad)).to_contain_text("2 of 14 rows are bad", timeout=PATIENCE)
    assert not (site.root / "store" / "uploads" / "batches" / "week-91").exists()
    assert [text for text in opened.messages if "422" not in text] == []
    opened.messages.clear()
    page.get_by_label("If rows are bad").select_option("quarantine")
    expect(upload(page, bad)).to_contain_text("12 of 14 rows", timeout=PATIENCE)
    result.get_by_role("link", name="Its page").click()
    page.wait_for_url("**/batches/uploads/week-91*")
    assert page.locator("h2", has_text="Refused rows").count() == 1


def test_signing_in_by_name_and_out(visit: Visit) -> None:
    page = visit("/batches").page
    page.get_by_role("link", name="Sign in by name").click()
    page.get_by_label("Your name").fill("Olga")
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/batches")
    assert page.locator(".who b").inner_text() == "Olga"
    page.goto(page.url.replace("/batches", f"/runs/{RUN}/versions"))
    page.locator("#promote summary").click()
    page.get_by_label("Version that shall count").select_option("v1")
    page.get_by_role("textbox", name="Reason").fill("reads better")
    page.get_by_role("button", name="Promote", exact=True).dblclick()
    expect(page.locator("main > .message")).to_contain_text("v1 counts as promoted after round 3")
    page.get_by_role("link", name="Audit").click()
    rows = page.locator("tbody tr", has_text="promote")
    assert rows.count() == 1
    assert "Olga" in rows.inner_text()
    assert "reads better" in rows.inner_text()
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/login")


def test_times_are_shown_in_the_readers_zone(visit: Visit) -> None:
    shown = [
        visit("/batches", timezone_id=zone).page.locator("time").first.inner_text()
        for zone in ("Europe/Vienna", "Pacific/Auckland")
    ]
    assert shown[0] != shown[1]


def test_pages_say_everything_without_script(visit: Visit, site: Site) -> None:
    page = visit("/", java_script_enabled=False).page
    for path in PAGES.values():
        page.goto(site.url + path)
        assert page.locator("h1").is_visible()
    page.goto(site.url + PAGES["run"])
    assert page.locator("svg.panel:visible").count() >= 6
    assert page.locator("svg.dag a").count() > 15
    page.locator("#node-table summary").click()
    assert page.locator("#node-table tbody tr:visible").count() > 15
    page.goto(site.url + PAGES["node"])
    page.get_by_text("Newest values").click()
    assert page.get_by_role("rowheader", name="rollout/kl_to_start").is_visible()
    page.goto(site.url + "/batches")
    assert page.get_by_role("button", name="Upload").count() == 0
    assert page.get_by_text("rlhf ingest FILE").is_visible()
    page.goto(site.url + PAGES["versions"])
    assert page.locator("article.example:visible").count() > 10
