"""The annotation page in a real browser, with a server that can be killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from annotation_run import HOSTILE, RUN, make_collect_run, make_user
from sqlalchemy import select

from rlhf.config import Config, Paths, Service
from rlhf.service.access import COOKIE, open_session
from rlhf.service.annotation.weeks import create_from_run
from rlhf.service.database.models import Annotation, Assignment, User
from rlhf.service.state import State, open_state

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
pytestmark = pytest.mark.browser

SERVER = Path(__file__).with_name("annotation_server.py")
NODE = "round-01/collect"
PATIENCE = 20.0
"""Seconds that a server or a page may take on a busy machine."""
WIDTHS = (1280, 390)
EXPECTED = (
    *("ERR_CONNECTION_REFUSED", "409 (Conflict)", "422 (Unprocessable Entity)"),
    *("500 (Internal Server Error)", "507 (Insufficient Storage)"),
)
"""What the browser itself reports of a server that is away, and of refusals that pages show."""
UNLABELLED = """() => Array.from(document.querySelectorAll("input, textarea, select, button"))
  .filter((e) => e.type !== "hidden" && !e.labels?.length && !e.textContent.trim())
  .map((e) => e.outerHTML.slice(0, 90))"""
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@dataclass
class Server:
    """A server's process and address; `state` is the tests' own way into its database."""

    state: State
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        config = self.state.config
        given = {
            "folder": config.service.folder,
            "runs": config.paths.runs,
            "store": config.paths.store,
            "port": self.port,
        }
        self.process = subprocess.Popen([sys.executable, str(SERVER), json.dumps(given)])
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/healthz", timeout=PATIENCE):
                    return
            except OSError:
                assert self.process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.05)

    def kill(self) -> None:
        if self.process is not None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = Service(folder=str(tmp_path / "service"), port=port)
    service.annotation = replace(service.annotation, overlap_share=0.5)
    paths = Paths(str(tmp_path / "runs"), str(tmp_path / "store"))
    state = open_state(Config(recipe="none", paths=paths, service=service))
    make_collect_run(state.runs, state.store, pairs=6)
    found = Server(state, port)
    found.start()
    yield found
    found.kill()
    state.engine.dispose()


@dataclass
class Person:
    """Somebody in a browser of their own."""

    server: Server
    context: Any
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def tab(self, path: str = "/annotate") -> Any:
        page = self.context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(f"{self.server.url}{path}")
        return page


Enter = Callable[..., Person]


@pytest.fixture
def enter(browser: Any, server: Server) -> Iterator[Enter]:
    """Return a function that signs somebody in; whatever goes wrong on their pages is an error."""
    people: list[Person] = []

    def entered(name: str, **options: Any) -> Person:
        user = make_user(server.state, name)
        with server.state.transaction() as session:
            secret, _ = open_session(session, user, hours=1)
        context = browser.new_context(**options)
        context.add_cookies([{"name": COOKIE, "value": secret, "url": server.url}])
        people.append(Person(server, context))
        return people[-1]

    yield entered
    for person in people:
        person.context.close()
        assert [m for m in person.messages if not any(text in m for text in EXPECTED)] == []
        assert all(url.startswith((server.url, "data:")) for url in person.requests)


def open_week(server: Server) -> str:
    return create_from_run(server.state, run=RUN, node=NODE, name=None).name


def annotations(server: Server) -> list[tuple[str, str, str, str]]:
    """Return who said what: name, preferred, strength, comment."""
    with server.state.reading() as session:
        rows = session.execute(
            select(User.name, Annotation.preferred, Annotation.strength, Annotation.comment)
            .join(User, User.id == Annotation.user_id)
            .order_by(Annotation.id)
        )
        return [tuple(row) for row in rows]


def drafts(server: Server) -> list[dict[str, Any] | None]:
    with server.state.reading() as session:
        return list(session.scalars(select(Assignment.draft).order_by(Assignment.id)))


def key_of(page: Any) -> str:
    return page.locator("#verdict").get_attribute("data-key")


@contextmanager
def another_pair(page: Any) -> Iterator[None]:
    """Wait until the page shows another pair, or that there is none."""
    before = key_of(page)
    yield
    page.wait_for_function(
        "key => document.readyState === 'complete'"
        " && document.getElementById('verdict')?.dataset.key !== key",
        arg=before,
    )


def shoot(page: Any, name: str) -> None:
    """Keep a picture of a page where somebody wants to look at it."""
    folder = os.environ.get("RLHF_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def test_two_people_judge_a_week_with_the_keyboard(server: Server, enter: Enter) -> None:
    week = open_week(server)
    pages = {name: enter(name).tab() for name in ("ann", "bob")}
    texts: dict[str, set[str]] = {name: set() for name in pages}
    for name, page in pages.items():
        while page.locator("#verdict").count():
            texts[name].add(page.locator(".conversation").inner_text())
            assert "checkpoint" not in page.content()
            with another_pair(page):
                page.keyboard.press("2" if name == "ann" else "7")
                page.keyboard.press("q")
                page.keyboard.press("p")
                page.keyboard.press("c")
                page.keyboard.type(f"said by {name}, with 1 and q")
                page.keyboard.press("Control+Enter")
        expect(page.locator("main")).to_contain_text("No pair of week")
    assert (len(texts["ann"]), len(texts["bob"])) == (6, 3)
    assert texts["bob"] < texts["ann"]
    found = annotations(server)
    assert {(name, strength, comment) for name, _, strength, comment in found} == {
        (name, "better", f"said by {name}, with 1 and q") for name in pages
    }
    assert len(found) == 9
    operator = enter("ops").tab(f"/weeks/{week}")
    expect(operator.locator("[role=progressbar]")).to_have_attribute("aria-valuenow", "9")
    expect(operator.get_by_role("region", name="Table of annotators")).to_contain_text("ann")
    expect(operator.get_by_role("region", name="Table of agreement")).to_contain_text("AC2")
    shoot(operator, "week-judged")
    operator.get_by_label("The week takes no more verdicts").check()
    operator.get_by_role("button", name="Close the week").click()
    expect(operator.get_by_role("status").first).to_contain_text("6 rows is in the inbox")
    shoot(operator, "week-closed")
    assert (Path(server.state.inbox) / "weekly" / f"{week}.jsonl").exists()
    with operator.expect_download() as download:
        operator.get_by_role("link", name="Download").click()
    assert len(Path(download.value.path()).read_text().splitlines()) == 6


def test_an_operator_creates_a_week(server: Server, enter: Enter) -> None:
    page = enter("ops").tab("/weeks")
    page.get_by_label("Name").fill("first-week")
    page.get_by_role("button", name="Create").click()
    expect(page).to_have_url(f"{server.url}/weeks/first-week")
    expect(page.get_by_role("heading", name="first-week")).to_be_visible()
    page.goto(f"{server.url}/weeks")
    expect(page.locator("main")).to_contain_text("No finished collect node")
    page.get_by_role("link", name="first-week").click()
    expect(page.locator("#people ~ *").first).to_contain_text("Nobody has begun")


def type_everything(page: Any) -> None:
    page.get_by_label("B is slightly better").check()
    page.get_by_role("group", name="Response A is").get_by_label("unsafe").check()
    page.get_by_label("Comment").fill("typed with care \U0001f989 \u2014 <b>")


def check_everything(page: Any) -> None:
    expect(page.get_by_label("B is slightly better")).to_be_checked()
    expect(page.get_by_role("group", name="Response A is").get_by_label("unsafe")).to_be_checked()
    expect(page.get_by_label("Comment")).to_have_value("typed with care \U0001f989 \u2014 <b>")


def test_nothing_typed_is_lost_on_reload(server: Server, enter: Enter) -> None:
    open_week(server)
    ann = enter("ann")
    page = ann.tab()
    key = key_of(page)
    type_everything(page)
    page.reload()
    assert key_of(page) == key
    check_everything(page)
    expect(page.locator("#kept")).to_have_text("Draft kept on the server.")
    # Another browser of the same person has what the server keeps.
    other = enter("ann").tab()
    assert key_of(other) == key
    check_everything(other)
    # What one of the two types then is not replaced unseen.
    with page.expect_response("**/draft"):
        page.get_by_label("Comment").fill("typed in the first")
    comment, alert = other.get_by_label("Comment"), other.get_by_role("alert")
    comment.fill("typed in the second")
    expect(alert).to_contain_text("Another browser of yours")
    assert [draft["comment"] for draft in drafts(server)] == ["typed in the first"]
    other.get_by_role("button", name="Take what it kept").click()
    expect(comment).to_have_value("typed in the first")
    with other.expect_response("**/draft"):
        comment.fill("typed on in the second")
    assert [draft["comment"] for draft in drafts(server)] == ["typed on in the second"]


def test_a_double_click_is_one_annotation(server: Server, enter: Enter) -> None:
    open_week(server)
    page = enter("ann").tab()
    page.get_by_label("A is significantly better").check()
    page.locator("input[name=safe_left][value=true]").check()
    page.locator("input[name=safe_right][value=true]").check()
    with another_pair(page):
        page.get_by_role("button", name="Submit").dblclick()
    assert len(annotations(server)) == 1
    expect(page.get_by_label("A is significantly better")).not_to_be_checked()


def test_two_tabs_hold_one_pair(server: Server, enter: Enter) -> None:
    open_week(server)
    ann = enter("ann")
    first, second = ann.tab(), ann.tab()
    key = key_of(first)
    assert key_of(second) == key
    type_everything(first)
    check_everything(second)
    second.get_by_label("Comment").fill("typed in the second tab")
    expect(first.get_by_label("Comment")).to_have_value("typed in the second tab")
    first.get_by_role("group", name="Response B is").get_by_label("unsafe").check()
    with another_pair(second), another_pair(first):
        first.get_by_role("button", name="Submit").click()
    assert [row[3] for row in annotations(server)] == ["typed in the second tab"]
    assert key_of(first) == key_of(second) != key
    expect(second.get_by_label("Comment")).to_have_value("")


def test_a_pair_that_another_browser_submitted_says_so(server: Server, enter: Enter) -> None:
    open_week(server)
    one, other = enter("ann").tab(), enter("ann").tab()
    key = key_of(one)
    for page, number in ((one, "1"), (other, "8")):
        for pressed in (number, "q", "o"):
            page.keyboard.press(pressed)
    with another_pair(one):
        one.keyboard.press("Control+Enter")
    other.keyboard.press("Control+Enter")
    expect(other.get_by_role("alert")).to_contain_text("with another verdict")
    shoot(other, "annotate-conflict")
    other.get_by_role("link", name="Next pair").click()
    assert key_of(other) == key_of(one) != key
    assert len(annotations(server)) == 1


def test_a_server_that_is_killed_loses_and_doubles_nothing(server: Server, enter: Enter) -> None:
    open_week(server)
    ann = enter("ann")
    page = ann.tab()
    type_everything(page)
    page.get_by_role("group", name="Response B is").get_by_label("unsafe").check()
    expect(page.locator("#kept")).to_have_text("Draft kept on the server.")
    server.kill()
    page.get_by_label("Comment").fill("typed while it was away")
    expect(page.locator("#kept")).to_contain_text("kept in this browser")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#kept")).to_contain_text("sent again")
    # What is being sent stays what it was.
    expect(page.get_by_label("Comment")).not_to_be_editable()
    page.keyboard.press("1")
    expect(page.get_by_label("B is slightly better")).to_be_checked()
    assert annotations(server) == []
    with another_pair(page):
        server.start()
    assert [row[3] for row in annotations(server)] == ["typed while it was away"]
    server.kill()
    server.start()
    page.reload()
    expect(page.locator("#verdict")).to_be_visible()
    assert len(annotations(server)) == 1


def test_shortcuts_can_be_switched_off(server: Server, enter: Enter) -> None:
    open_week(server)
    page = enter("ann").tab()
    page.keyboard.press("3")
    expect(page.get_by_label("A is slightly better")).to_be_checked()
    expect(page.locator("#announcer")).to_contain_text("A is slightly better")
    page.get_by_text("Keyboard", exact=True).click()
    page.get_by_label("Single keys work").uncheck()
    page.get_by_label("Single keys work").blur()
    page.keyboard.press("4")
    expect(page.get_by_label("A is slightly better")).to_be_checked()
    page.reload()
    page.keyboard.press("4")
    expect(page.get_by_label("A is slightly better")).to_be_checked()


def test_a_folded_guideline_stays_folded(server: Server, enter: Enter) -> None:
    open_week(server)
    page = enter("ann").tab()
    text = page.locator("#guideline .text")
    expect(text).to_be_visible()
    page.locator("#guideline summary").click()
    expect(text).not_to_be_visible()
    page.reload()
    expect(text).not_to_be_visible()


def test_skipping_asks_why(server: Server, enter: Enter) -> None:
    open_week(server)
    page = enter("ann").tab()
    page.keyboard.press("s")
    expect(page.get_by_label("Why?")).to_be_focused()
    page.get_by_role("button", name="Skip", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("needs a reason")
    page.get_by_label("Why?").fill("garbled")
    # The Enter that ends a word of an input method is none.
    page.locator("#reason").dispatch_event(
        "keydown", {"key": "Enter", "bubbles": True, "isComposing": True}
    )
    assert not page.evaluate("document.getElementById('reason').readOnly")
    with another_pair(page):
        page.keyboard.press("Enter")
    with server.state.reading() as session:
        states = session.scalars(select(Assignment.state).order_by(Assignment.id)).all()
    assert states == ["skipped", "open"]
    assert annotations(server) == []


def test_an_incomplete_verdict_is_not_sent_and_one_that_is_not_taken_says_why(
    server: Server, enter: Enter
) -> None:
    open_week(server)
    ann = enter("ann")
    page = ann.tab()
    page.get_by_role("button", name="Submit").click()
    invalid = page.locator("input[name=choice]:invalid").count()
    assert invalid == 8
    assert not any(url.endswith("/submit") for url in ann.requests)
    type_everything(page)
    page.get_by_role("group", name="Response B is").get_by_label("unsafe").check()
    answers = iter([(507, "the service's disk is full"), *3 * [(500, "this is a bug in rlhf")]])

    def refuse(route: Any) -> None:
        status, detail = next(answers)
        body = json.dumps({"detail": detail, "status": status})
        route.fulfill(status=status, content_type="application/problem+json", body=body)

    page.route("**/submit", refuse)
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#kept")).to_contain_text("disk is full. What you did is kept")
    expect(page.get_by_role("alert")).to_contain_text("this is a bug in rlhf")
    expect(page.get_by_label("Comment")).to_be_editable()
    page.unroute("**/submit")
    with another_pair(page):
        page.get_by_role("button", name="Submit").click()
    assert len(annotations(server)) == 1


def test_it_works_without_script(server: Server, enter: Enter) -> None:
    open_week(server)
    page = enter("ann", java_script_enabled=False).tab()
    key = key_of(page)
    page.get_by_label("Comment").fill("no script\nat all")
    page.locator("form#verdict details summary").click()
    page.get_by_role("button", name="Skip", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("needs a reason")
    expect(page.get_by_label("Comment")).to_have_value("no script\nat all")
    type_everything(page)
    page.get_by_role("group", name="Response B is").get_by_label("unsafe").check()
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("status").first).to_contain_text("Submitted")
    assert key_of(page) != key
    assert [row[2] for row in annotations(server)] == ["slightly_better"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_has_names(server: Server, enter: Enter, width: int, scheme: str) -> None:
    week = open_week(server)
    person = enter("ops", viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = person.tab()
    paths = ("/annotate", "/weeks", f"/weeks/{week}")
    for path in paths:
        page.goto(f"{server.url}{path}")
        assert page.evaluate(TOO_WIDE) <= 0, path
        assert page.evaluate(UNLABELLED) == [], path
        assert page.evaluate("window.hacked === undefined")
        names = page.locator("h1").all_inner_texts()
        assert len(names) == 1
        shoot(page, f"{path.strip('/').replace('/', '-')}-{width}-{scheme}")
    page.goto(f"{server.url}/annotate")
    choices = page.locator("input[name=choice]")
    seen = choices.evaluate_all("all => all.map((e) => e.getBoundingClientRect().top)")
    assert seen == sorted(seen), "the tab key goes another way than the eye"
    while HOSTILE not in page.locator(".conversation").inner_text():
        for pressed in ("1", "q", "o"):
            page.keyboard.press(pressed)
        with another_pair(page):
            page.keyboard.press("Control+Enter")
    assert page.evaluate("window.hacked === undefined")
    page.keyboard.press("3")
    page.keyboard.press("s")
    shoot(page, f"annotate-turns-{width}-{scheme}")


def test_everything_is_reached_with_the_tab_key(server: Server, enter: Enter) -> None:
    open_week(server)
    page = enter("ann").tab()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "(() => { const e = document.activeElement;"
            " return e.id || e.name || e.textContent.trim().slice(0, 20); })()"
        )
        reached.add(name)
    assert {"choice", "safe_left", "safe_right", "comment", "action"} <= reached
