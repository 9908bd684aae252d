"""The pages: what they show is the files', forms do what they say, nobody is left stranded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from report_html import Node, read_page, wrong_marks, wrong_numbers
from report_run import HOSTILE, make_run
from sqlalchemy import select

from rlhf.artifacts import read_json, write_json
from rlhf.config import Config, Paths, Service
from rlhf.errors import ConfigError, LauncherError
from rlhf.report.view.marks import Point
from rlhf.report.view.refs import Ref
from rlhf.service import facts, launching
from rlhf.service.access import new_token
from rlhf.service.app import create_app
from rlhf.service.database.models import Audit, Launch
from rlhf.service.pages import assets
from rlhf.service.pages.front import front
from rlhf.service.pages.graph import counted, describe, graph, newest_rounds, shown_state
from rlhf.service.pages.nodes import sample
from rlhf.service.pages.render import MESSAGE, MESSAGE_BYTES
from rlhf.service.pages.runs import read_settings
from rlhf.service.state import State, open_state

testclient = pytest.importorskip("fastapi.testclient")

BASE = "http://127.0.0.1:8400"
BROWSER = {"Accept": "text/html,application/xhtml+xml"}
RUN = "made-up"
NODES = ("sft", "round-01/reward-helpfulness", "round-02/ppo", "round-03/evaluate")
PAGES = (
    "/",
    f"/runs/{RUN}",
    f"/runs/{RUN}?rounds=all",
    *(f"/runs/{RUN}/node?name={name}" for name in NODES),
    f"/runs/{RUN}/report",
    f"/runs/{RUN}/versions",
    f"/runs/{RUN}/versions?a=v0&b=v3",
    "/batches",
    "/batches?stream=weekly",
    "/batches/weekly/week-2",
    "/audit",
)
FRAGMENTS = ("/live", f"/runs/{RUN}/live", f"/runs/{RUN}/node/live?name=sft")


@dataclass(frozen=True)
class Site:
    """A service over a made-up run that these tests only read."""

    client: Any
    state: State
    folder: Path
    followed: set[str] = field(default_factory=set)
    """Links that have been found to lead somewhere."""

    def page(self, path: str) -> Node:
        answer = self.client.get(path, headers=BROWSER)
        assert answer.status_code == 200, answer.text[:500]
        return read_page(answer.text)

    def report(self) -> dict[str, Any]:
        return facts.run_report(self.state, facts.open_run(self.state, RUN))


def serving(root: Path, **service: Any) -> Config:
    return Config(
        recipe="none",
        paths=Paths(runs=str(root / "runs"), store=str(root / "store")),
        service=Service(folder=str(root / "service"), **service),
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    folder = make_run(root, RUN, rounds=4)
    (folder / "sft" / "log.txt").write_text(f"first line\nlast line {HOSTILE}\n", encoding="utf-8")
    state = open_state(serving(root))
    with testclient.TestClient(create_app(state), base_url=BASE) as client:
        yield Site(client, state, folder)
    state.engine.dispose()


def as_user(state: State, role: str) -> Any:
    """Return a client with the token of somebody with a role, for a service that asks for one."""
    with state.transaction() as session:
        token = new_token(session, name=f"a-{role}", role=role, days=None)
    needs = replace(state.config, service=replace(state.config.service, tokens=True))
    app = create_app(replace(state, config=needs))
    headers = {**BROWSER, "Authorization": f"Bearer {token}"}
    return testclient.TestClient(app, base_url=BASE, headers=headers)


def links(root: Node) -> set[str]:
    return {a.attrs["href"] for a in root.all("a") if a.attrs.get("href", "").startswith("/")}


@pytest.mark.parametrize("path", PAGES)
def test_pages_are_whole_and_can_be_read_aloud(site: Site, path: str) -> None:
    root = site.page(path)
    [html] = root.all("html")
    assert html.attrs["lang"] == "en"
    assert len(root.all("h1")) == 1
    assert len(root.all("main")) == 1
    [title] = root.all("title")[:1]
    assert title.text.strip().endswith("rlhf")
    ids = [node.attrs["id"] for node in root.walk() if "id" in node.attrs]
    assert sorted(ids) == sorted(set(ids))
    labelled = {label.attrs.get("for") for label in root.all("label")}
    for control in (*root.all("input"), *root.all("select"), *root.all("textarea")):
        is_named = (
            control.attrs.get("type") == "hidden"
            or control.attrs.get("id", "?") in labelled
            or "aria-label" in control.attrs
            or any(up.tag == "label" for up in control.up())
        )
        assert is_named, control.attrs
    for node in root.walk():
        names = ("aria-labelledby", "aria-describedby")
        for target in (node.attrs[name] for name in names if name in node.attrs):
            assert target in ids
        if node.attrs.get("tabindex") == "0":
            assert node.attrs.get("aria-label"), node.attrs
        for name in ("src", "href", "action"):
            assert "://" not in node.attrs.get(name, ""), node.attrs
    levels = [int(n.tag[1]) for n in root.walk() if re.fullmatch(r"h[1-6]", n.tag)]
    assert all(b - a <= 1 for a, b in pairwise(levels)), levels


@pytest.mark.parametrize("path", PAGES)
def test_every_link_leads_somewhere(site: Site, path: str) -> None:
    root = site.page(path)
    found = links(root)
    assert len(found) > 3
    for target in sorted({target.partition("#")[0] for target in found} - site.followed):
        answer = site.client.get(target, headers=BROWSER)
        assert answer.status_code == 200, f"{target}: {answer.text[:300]}"
        site.followed.add(target)
    ids = {node.attrs["id"] for node in root.walk() if "id" in node.attrs}
    inner = {a.attrs["href"][1:] for a in root.all("a") if a.attrs["href"].startswith("#")}
    assert inner <= ids


@pytest.mark.parametrize("path", [*PAGES, *FRAGMENTS])
def test_texts_from_outside_stay_texts(site: Site, path: str) -> None:
    answer = site.client.get(path, headers=BROWSER)
    assert answer.status_code == 200
    assert "<script>window" not in answer.text
    assert "<img" not in answer.text
    inline = re.findall(r"<script(?![^>]*\bsrc=)|\son\w+=[\"']", answer.text)
    assert inline == []


def test_hostile_texts_are_shown_where_they_belong(site: Site) -> None:
    for path in (f"/runs/{RUN}/node?name=sft", f"/runs/{RUN}/versions"):
        assert HOSTILE in site.page(path).text


@pytest.mark.parametrize("path", FRAGMENTS)
def test_live_parts_are_parts(site: Site, path: str) -> None:
    text = site.client.get(path, headers=BROWSER).text
    assert "<html" not in text
    assert "<form" not in text
    whole = path.replace("/node/live", "/node").replace("/live", "") or "/"
    assert f'data-live="{path}"' in site.client.get(whole, headers=BROWSER).text


def test_the_front_page_shows_the_newest_accuracy_of_every_strength(site: Site) -> None:
    root, report = site.page(f"/runs/{RUN}"), site.report()
    checked, wrong = wrong_numbers(root, report)
    assert wrong == []
    marks, wrong_places = wrong_marks(root, report)
    assert wrong_places == []
    newest = [row for row in report["reward_accuracy"] if row["round"] == 4]
    assert len(newest) == 10
    assert checked >= 5 * len(newest)
    assert marks > 100
    places = {node.attrs.get("data-path") for node in root.walk()}
    for position, row in enumerate(report["reward_accuracy"]):
        shown = f"/reward_accuracy/{position}/accuracy" in places
        assert shown, row
    arrived = {node.attrs.get("data-y") for node in root.all(cls="point")}
    for position, row in enumerate(report["reward_accuracy_before"]):
        assert f"/reward_accuracy_before/{position}/accuracy" in arrived, row
    figures = [figure.attrs["id"] for figure in root.all("figure")]
    assert figures == [
        "accuracy-by-strength",
        "front-trend",
        "on-arrival",
        "front-arrival",
        "front-batches",
    ]
    titles = root.text
    for name in ("significantly", "slightly", "negligibly", "longer wins", "swapped"):
        assert name in titles


def accuracy_of(axis: str, strength: str | None, round_: int, *, few: bool = False) -> Any:
    found = {"axis": axis, "strength": strength, "round": round_, "few": few, "accuracy": 0.7}
    found |= {"low": 0.6, "high": 0.8, "n": 40, "prompts": 20 if few else 40}
    return {**found, "control_longer": 0.5, "control_swapped": 0.3}


def test_a_strength_looks_the_same_wherever_it_first_appears() -> None:
    rows = [
        accuracy_of("helpfulness", "slightly_better", 1),
        accuracy_of("helpfulness", "significantly_better", 2),
        accuracy_of("helpfulness", "slightly_better", 2, few=True),
        accuracy_of("safety", "better", 1),
        accuracy_of("safety", "slightly_better", 1),
        accuracy_of("safety", None, 1),
    ]
    report = {"reward_accuracy": rows, "reward_accuracy_before": rows[1:3]}
    blocks = front(Ref({**report, "reward_by_batch": [], "batches": []}))
    figures = {block.id: block for block in blocks if block.kind == "figure"}
    points = [
        mark
        for panel in figures["front-trend"].panels
        for mark in panel.marks
        if isinstance(mark, Point)
    ]
    assert len(points) == len(rows)
    looks = {
        point.name: {(p.colour, p.shape, p.shift) for p in points if p.name == point.name}
        for point in points
    }
    assert {name: len(found) for name, found in looks.items()} == dict.fromkeys(looks, 1)
    assert len({look[:2] for found in looks.values() for look in found}) == len(looks) == 4
    strongest = sorted(looks, key=lambda name: min(shift for _, _, shift in looks[name]))
    assert strongest == ["significantly", "better", "slightly", "all"]
    assert {look[0] for look in looks["significantly"]} == {"r5"}
    [hollow] = [point for point in points if point.hollow]
    assert hollow.y.path == "/reward_accuracy/2/accuracy"
    svg = figures["front-trend"].panels[0].svg()
    assert "slightly (few);" in svg
    # slightly has two rounds, significantly one.
    assert svg.count('class="thread ') == 1
    assert [panel.title for panel in figures["front-arrival"].panels] == ["helpfulness"]
    [table] = [block for block in blocks if block.kind == "table" and block.id == "front-table"]
    cells = {(row[0].key, row[1].key): row for row in table.rows}
    assert 'class="few"' in cells["helpfulness", "slightly"][2].shown
    assert "few" in cells["helpfulness", "slightly"][7].shown


def test_words_and_signs_stand_out_from_their_background() -> None:
    light, dark = read_colours((REPORT_CSS).read_text(encoding="utf-8"))
    for colours in (light, {**light, **dark}):
        backs = [colours["back"], colours["tint"]]
        for name in ("ink", "soft", "faint", "link", "ok", "look", "stop"):
            for back in backs:
                assert contrast(colours[name], back) >= 4.5, (name, back)
        for name in (f"{kind}{number}" for kind in "cr" for number in range(6)):
            assert contrast(colours[name], colours["panel"]) >= 3, name
        ramp = [contrast(colours[f"r{number}"], colours["panel"]) for number in range(6)]
        assert all(b > a * 1.1 for a, b in pairwise(ramp)), ramp


REPORT_CSS = Path(assets.__file__).parents[2] / "report" / "templates" / "page.css"


def read_colours(css: str) -> list[dict[str, str]]:
    """Return the colours of a style sheet, the light ones and those that replace them."""
    parts = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in parts]


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours by WCAG 2."""
    lights = []
    for colour in (first, second):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_the_front_page_of_a_run_without_a_reward_model_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path, RUN, rounds=1, rows=40, prompts=12)
    plan = read_json(folder / "plan.json")
    for node in plan["nodes"]:
        (folder / node["name"] / "manifest.json").unlink()
    (folder / "versions.json").unlink()
    state = open_state(serving(tmp_path))
    with testclient.TestClient(create_app(state), base_url=BASE) as client:
        for path in ("", "/report", "/versions"):
            answer = client.get(f"/runs/{RUN}{path}", headers=BROWSER)
            assert answer.status_code == 200, answer.text[:300]
        assert "No reward model is finished yet" in client.get(f"/runs/{RUN}").text
    state.engine.dispose()


def test_an_empty_service_says_how_to_begin(client: Any) -> None:
    assert "No run has started yet" in client.get("/", headers=BROWSER).text
    assert "holds no stream yet" in client.get("/batches", headers=BROWSER).text
    assert client.get("/audit", headers=BROWSER).status_code == 200


def test_the_report_page_has_the_reports_sections(site: Site) -> None:
    root, report = site.page(f"/runs/{RUN}/report"), site.report()
    checked, wrong = wrong_numbers(root, report)
    assert wrong == []
    assert checked > 2000
    sections = [section.attrs["id"] for section in root.all("section")]
    assert sections[:3] == ["summary", "reward", "scores"]
    assert len(sections) == 9


def test_versions_are_compared_with_their_answers(site: Site) -> None:
    root = site.page(f"/runs/{RUN}/versions?a=v2&b=v4")
    assert len(root.all("article", "example")) > 20
    assert {h.text for h in root.all("h4")} == {"v2", "v4"}
    turned = site.page(f"/runs/{RUN}/versions?a=v4&b=v2")
    assert len(turned.all("article", "example")) == len(root.all("article", "example"))
    never = site.page(f"/runs/{RUN}/versions?a=v0&b=v3")
    assert never.all("article", "example") == []
    assert "No evaluation put these two side by side" in never.text


def test_a_node_shows_state_log_values_and_texts(site: Site) -> None:
    root = site.page(f"/runs/{RUN}/node?name=sft")
    assert "last line" in root.all("pre", "log")[0].text
    ppo = site.page(f"/runs/{RUN}/node?name=round-02/ppo")
    assert "rollout/kl" in ppo.text
    [charts] = [node for node in ppo.walk() if "data-charts" in node.attrs]
    metrics = site.client.get(charts.attrs["data-charts"]).json()
    assert "rollout/kl" in metrics["available"]
    texts = site.page(f"/runs/{RUN}/node?name=round-03/evaluate")
    assert "rows 1 to 10 of 60" in texts.text
    later = site.page(f"/runs/{RUN}/node?name=round-03/evaluate&offset=50")
    assert "rows 51 to 60 of 60" in later.text
    assert "later rows" not in later.text


def test_rows_of_texts_are_shown_whatever_they_hold() -> None:
    shown = sample({"prompt": [{"role": "user", "content": "q"}], "response": "r", "score": 0.5})
    assert shown["texts"] == [("response", "r")]
    assert shown["facts"] == [("score", "0.5")]
    several = sample({"prompt": "q", "responses": [{"text": "a"}, "b"], "done": True, "x": None})
    assert several["texts"] == [("responses 1", "a"), ("responses 2", "b")]
    assert several["prompt"] == "q"
    assert several["facts"] == [("done", "True")]
    scored = sample({"scores": {"judge": {"old": 1, "new": None}}, "refused": {"old": False}})
    assert scored["facts"] == [("scores judge old", "1"), ("refused old", "False")]
    assert sample({}) == {"turns": [], "prompt": "", "texts": [], "facts": []}


def test_batches_show_counts_drift_and_who_judged(site: Site) -> None:
    listed = site.page("/batches")
    rows = [row.text for row in listed.all("tr")]
    assert sum("week-" in row for row in rows) == 4
    assert all(f"{RUN} round" in re.sub(r"\s+", " ", row) for row in rows if "week-" in row)
    root = site.page("/batches/weekly/week-3")
    report = facts.batch_report(site.state, "weekly", "week-3")
    drift = next(n for n in root.walk() if n.attrs.get("aria-label") == "Drift")
    verdicts = [badge.text for badge in drift.all("span", "badge")]
    assert sorted(verdicts) == sorted(line["verdict"] for line in report["drift"]["lines"])
    assert verdicts[0] == "stop"
    assert verdicts[-1] == "as expected"
    assert "ann-1" in root.text
    counts = {dt.text: dd.text for dt, dd in zip(root.all("dt"), root.all("dd"), strict=True)}
    assert counts["read"] == "120"
    assert f"/runs/{RUN}/report#data" in links(root)
    first = site.page("/batches/weekly/week-1")
    assert "Nothing to compare" in first.text
    one = site.page("/batches?stream=weekly")
    assert "/login?next=/batches%3Fstream%3Dweekly" in links(one)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/runs/no-such", RUN),
        (f"/runs/{RUN}/node?name=no-such", "round-01/reward-safety"),
        (f"/runs/{RUN}/versions?a=v77", "v4"),
        ("/batches?stream=no-such", "weekly"),
        ("/batches/weekly/no-such", "week-1"),
        ("/batches/no-such/week-1", "weekly"),
        (f"/runs/..%2f{RUN}", ""),
        ("/nowhere", ""),
    ],
)
def test_what_does_not_exist_is_a_page_that_names_what_does(
    site: Site, path: str, named: str
) -> None:
    answer = site.client.get(path, headers=BROWSER)
    assert answer.status_code == 404
    root = read_page(answer.text)
    assert named in root.text
    assert root.all("h1")[0].text == "Not Found"
    plain = site.client.get(path, headers={"Accept": "application/json"})
    assert plain.headers["Content-Type"].startswith("application/problem+json")


def test_whoever_has_to_sign_in_is_led_there_and_back(state: State) -> None:
    client = as_user(state, "viewer")
    client.headers.pop("Authorization")
    answer = client.get("/runs/x?rounds=all", follow_redirects=False)
    assert answer.status_code == 303
    target, _, back = answer.headers["Location"].partition("?next=")
    assert target == "/login"
    assert unquote(back) == "/runs/x?rounds=all"
    assert client.get("/live", headers={"X-Live": "1"}).status_code == 401
    assert client.post("/runs", data={"run": "x"}).status_code == 401
    assert client.get("/", headers={"Accept": "application/json"}).status_code == 401
    for name in ("style.css", "report.css", "app.js"):
        assert client.get(f"/static/{name}").status_code == 200


def test_forms_are_the_operators(state: State, run: Path) -> None:
    posts = ("/runs", f"/runs/{run.name}/launch", f"/runs/{run.name}/cancel")
    for role in ("viewer", "annotator"):
        client = as_user(state, role)
        for path in ("/", f"/runs/{run.name}", f"/runs/{run.name}/versions", "/batches"):
            root = read_page(client.get(path).text)
            assert all(form.attrs.get("method") != "post" for form in root.all("form"))
            assert "upload-form" not in [form.attrs.get("id") for form in root.all("form")]
            assert "/audit" not in links(root)
        for path in (*posts, f"/runs/{run.name}/promote"):
            assert client.post(path, data={}).status_code == 403
        assert client.get("/audit").status_code == 403
    assert not (run / "overrules.json").exists()
    root = read_page(as_user(state, "operator").get(f"/runs/{run.name}").text)
    assert {form.attrs.get("action") for form in root.all("form")} == set(posts[1:])


def test_an_operator_overrules_with_a_reason(client: Any, state: State, run: Path) -> None:
    address = f"/runs/{run.name}/promote"
    refused = client.post(address, data={"version": "v1", "reason": "  "}, headers=BROWSER)
    assert refused.status_code == 422
    assert "needs a reason" in refused.text
    assert not (run / "overrules.json").exists()
    unknown = client.post(address, data={"version": "v9", "reason": "mine <b>"}, headers=BROWSER)
    root = read_page(unknown.text)
    assert root.all("textarea")[0].text == "mine <b>"
    sent = client.post(
        address, data={"version": "v1", "reason": "v2 swears <b>"}, follow_redirects=False
    )
    assert sent.status_code == 303
    assert sent.headers["Location"] == f"/runs/{run.name}/versions"
    assert read_json(run / "overrules.json")["3"]["version"] == "v1"
    shown = read_page(client.get(sent.headers["Location"], headers=BROWSER).text)
    assert shown.all("p", "message")[0].text == "v1 counts as promoted after round 3: v2 swears <b>"
    again = read_page(client.get(sent.headers["Location"], headers=BROWSER).text)
    assert again.all("p", "message") == [again.all("p", "message")[-1]]
    with state.reading() as session:
        rows = session.scalars(select(Audit).order_by(Audit.id)).all()
    assert [row.status for row in rows] == [422, 422, 303]
    assert rows[-1].detail["reason"] == "v2 swears <b>"
    log = read_page(client.get("/audit", headers=BROWSER).text)
    assert "v2 swears <b>" in log.text
    assert len(log.all("tr")) == 4
    assert len(read_page(client.get("/audit?user=nobody", headers=BROWSER).text).all("tr")) == 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the pages ask the launcher for; it says that all is well."""
    asked: list[dict[str, Any]] = []

    def launch(state: State, run: str, **given: Any) -> Launch:
        asked.append({"run": run, **given})
        return Launch(run=run, user=given["user"], state="launched", output="process 7 runs it")

    def cancel(state: State, run: str, **given: Any) -> str:
        asked.append({"run": run, **given})
        return "process 7 saves its state and stops"

    monkeypatch.setattr(launching, "launch", launch)
    monkeypatch.setattr(launching, "cancel", cancel)
    return asked


def test_operators_launch_go_on_and_cancel(
    client: Any, run: Path, launches: list[dict[str, Any]]
) -> None:
    form = {"run": "fresh", "recipe": "quickstart", "settings": "rounds.limit=2\n\n seed = 7 "}
    answer = client.post("/runs", data=form, follow_redirects=False)
    assert answer.headers["Location"] == "/runs/fresh"
    assert launches[0]["recipe"] == "quickstart"
    assert launches[0]["settings"] == {"rounds.limit": "2", "seed": "7"}
    client.post(f"/runs/{run.name}/launch", data={"settings": ""})
    assert launches[1] == {"run": run.name, "user": "local", "recipe": None, "settings": {}}
    answer = client.post(f"/runs/{run.name}/cancel", data={"node": "sft"}, headers=BROWSER)
    assert launches[2] == {"run": run.name, "user": "local", "node": "sft"}
    assert "saves its state and stops" in answer.text
    assert client.post(f"/runs/{run.name}/cancel", data={"node": "../x"}).status_code == 404
    assert client.post("/runs/no-such/launch", data={}).status_code == 404
    assert len(launches) == 3


def test_a_run_tells_its_last_launch_and_those_that_wait(
    client: Any, state: State, run: Path
) -> None:
    shown = {"wanted": "starts as soon as", "failed": "no sbatch here", "launched": "by ops"}
    for status in ("wanted", "failed", "launched"):
        with state.transaction() as session:
            said = "no sbatch here" if status == "failed" else ""
            row = Launch(run=RUN, user="ops", state=status, launcher="local", output=said)
            session.add(row)
        for path in (f"/runs/{RUN}", f"/runs/{RUN}/live"):
            found = client.get(path, headers=BROWSER)
            assert found.status_code == 200
            assert shown[status] in found.text
            assert "starts as soon as" in found.text
            assert ("no sbatch here" in found.text) is (status == "failed")


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("seed=x is no number: give one"), 422), (LauncherError("no sbatch"), 502)],
)
def test_a_launch_that_is_refused_keeps_what_was_typed(
    client: Any, run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def refuse(*_: Any, **__: Any) -> Launch:
        raise error

    monkeypatch.setattr(launching, "launch", refuse)
    monkeypatch.setattr(launching, "cancel", refuse)
    form = {"run": "fresh", "recipe": "quickstart", "settings": "seed=x"}
    for path, data in (("/runs", form), (f"/runs/{run.name}/launch", {"settings": "seed=x"})):
        answer = client.post(path, data=data, headers=BROWSER)
        assert answer.status_code == status
        root = read_page(answer.text)
        assert root.all("p", "stop")[0].text == str(error)
        assert root.all("textarea")[0].text == "seed=x"
    assert 'value="fresh"' in client.post("/runs", data=form, headers=BROWSER).text
    for name in ("launch", "cancel"):
        root = read_page(client.post(f"/runs/{run.name}/{name}", data={}, headers=BROWSER).text)
        folds = {fold.attrs["id"]: fold for fold in root.all("details", "fold")}
        shown = {key for key, fold in folds.items() if "open" in fold.attrs}
        assert shown == {name}


def test_a_run_that_exists_is_not_started_again(
    client: Any, run: Path, launches: list[dict[str, Any]]
) -> None:
    answer = client.post("/runs", data={"run": run.name, "recipe": "quickstart"}, headers=BROWSER)
    assert answer.status_code == 422
    assert f"run {run.name} exists" in answer.text
    assert launches == []


def test_settings_are_read_line_by_line() -> None:
    assert read_settings("a.b=1\r\n\r\n c = x=y ") == {"a.b": "1", "c": "x=y"}
    assert read_settings(" \n") == {}
    for wrong in ("nonsense", "=1"):
        with pytest.raises(ConfigError, match="one key=value per line"):
            read_settings(wrong)


def test_a_message_is_cut_to_what_a_cookie_holds_and_rubbish_is_nothing(
    client: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(*_: Any, **__: Any) -> str:
        return "\u20ac" * MESSAGE_BYTES

    monkeypatch.setattr(launching, "cancel", say)
    sent = client.post(f"/runs/{run.name}/cancel", data={}, follow_redirects=False)
    assert len(sent.headers["Set-Cookie"]) < 4096
    shown = read_page(client.get("/", headers=BROWSER).text)
    assert shown.all("p", "ok")[0].text == "\u20ac" * (MESSAGE_BYTES // 3)
    for rubbish in ("x", "e30=", "W10=", "gICA"):
        client.cookies.set(MESSAGE, rubbish)
        assert client.get("/", headers=BROWSER).status_code == 200


def test_a_damaged_run_does_not_hide_the_others(client: Any, run: Path) -> None:
    broken = run.parent / "broken"
    broken.mkdir()
    (broken / "run.yaml").write_text("seed: [", encoding="utf-8")
    (broken / "plan.json").write_text("{", encoding="utf-8")
    root = read_page(client.get("/", headers=BROWSER).text)
    assert {h.text for h in root.all("h2")} == {"broken", run.name}
    answer = client.get("/runs/broken", headers=BROWSER)
    assert 400 <= answer.status_code < 500


def test_a_failed_node_and_its_remedy_come_first(client: Any, run: Path) -> None:
    folder = run / "round-03" / "evaluate"
    (folder / "manifest.json").unlink()
    entry = {"job": "5", "attempt": 1, "code": 137, "failure": "out_of_memory", "time": 1.0}
    (folder / "exits.jsonl").write_text(json.dumps(entry) + "\n", encoding="utf-8")
    versions = read_json(run / "versions.json")
    write_json(run / "versions.json", [*versions[:-1], {**versions[-1], "state": "pending"}])
    root = read_page(client.get(f"/runs/{run.name}", headers=BROWSER).text)
    [said] = [p.text for p in root.all("p", "stop")]
    assert "round-03/evaluate: out of memory; it was killed" in said
    node = next(a for a in root.all("a") if a.attrs.get("aria-label", "").startswith("round-03/ev"))
    assert node.classes == ["failed"]
    assert "failed: out of memory" in node.text
    page = read_page(client.get(node.attrs["href"], headers=BROWSER).text)
    assert "most likely for want of memory" in page.text
    assert "needs you: round-03/evaluate" in client.get("/", headers=BROWSER).text


def test_assets_are_packed_and_kept_by_their_content(site: Site) -> None:
    pages = site.client.get(f"/runs/{RUN}/node?name=round-02/ppo", headers=BROWSER).text
    found = re.findall(r'(?:src|href)="(/static/[^"]+)"', pages)
    names = ("report.css", "style.css", "app.js", "plotly.js", "charts.js")
    assert {name.partition("?")[0] for name in found} == {f"/static/{name}" for name in names}
    for address in found:
        answer = site.client.get(address)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["Cache-Control"]
        assert answer.headers["Content-Encoding"] == "gzip"
        plain = site.client.get(address, headers={"Accept-Encoding": "identity"})
        assert "Content-Encoding" not in plain.headers
        assert plain.content == answer.content
        old = site.client.get(f"{address[:-1]}_")
        assert old.headers["Cache-Control"] == "no-cache"
    import plotly

    own = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    [plotly_address] = [address for address in found if "plotly" in address]
    assert site.client.get(plotly_address).content == own.read_bytes()
    for wrong in ("nothing.js", "..%2fassets.py", "render.py", "%00"):
        assert site.client.get(f"/static/{wrong}").status_code == 404


# The graph


def row(name: str, *after: str, state: str = "waiting", round_: int = 1, **more: Any) -> Any:
    given = {"step": 0, "total": 0, "seconds": 0.0, "eta": None, "silent": None}
    given |= {"peak_memory_mb": None, "job": None, "failure": "", "remedy": "", **more}
    return facts.NodeRow(
        name=name, stage="x", round=round_, after=tuple(after), state=state, **given
    )


def places(nodes: list[Any]) -> dict[str, tuple[float, float]]:
    root = read_page(str(graph("r", nodes)))
    found = {}
    for node in root.all("a"):
        x, y = re.findall(r"[\d.]+", node.attrs["transform"])
        found[node.attrs["aria-label"].partition(":")[0]] = (float(x), float(y))
    return found


def test_nodes_stand_right_of_what_they_wait_for() -> None:
    nodes = [
        row("a"),
        row("b", "a"),
        row("c", "a"),
        row("d", "a", "b"),
        row("e", "d", "c", round_=2),
        row("f", "e", "a", round_=2),
    ]
    at = places(nodes)
    for node in nodes:
        for name in node.after:
            other = next(item for item in nodes if item.name == name)
            if other.round == node.round:
                assert at[name][0] < at[node.name][0]
            else:
                assert at[name][1] < at[node.name][1]
    assert len(set(at.values())) == len(nodes)
    edges = read_page(str(graph("r", nodes))).all("path", "edge")
    # a-d and a-f are said by longer ways.
    assert len(edges) == 6
    assert read_page(str(graph("r", []))).all("a") == []


def test_every_state_has_a_word_and_a_sign() -> None:
    nodes = [
        row("done", state="done", seconds=61.0),
        row("running", state="running", step=3, total=12, eta=125.0),
        row("stopped", state="stopped", step=2, total=9, failure="stopped"),
        row("failed", state="stopped", failure="out_of_memory"),
        row("waiting"),
    ]
    assert [shown_state(node) for node in nodes] == [node.name for node in nodes]
    assert [describe(node) for node in nodes] == [
        "done in 1m01s",
        "running 3/12, 2m05s left",
        "stopped at 2/9",
        "failed: out of memory",
        "waiting",
    ]
    root = read_page(str(graph("r", nodes)))
    signs = [node.text for node in root.all("text", "sign")]
    assert len(set(signs)) == 5
    assert counted(nodes) == dict.fromkeys(("done", "running", "stopped", "failed", "waiting"), 1)
    assert counted([]) == {}


def test_texts_stay_inside_their_boxes() -> None:
    long = row("x" * 60, state="running", step=123456, total=654321, eta=90000.0)
    short = row("ppo", state="running", step=34, total=120, eta=154.0)
    root = read_page(str(graph("r", [long, short])))
    names, told = ([n.text for n in root.all("text", name)] for name in ("name", "what"))
    assert names == ["x" * 26 + "\u2026", "ppo"]
    assert told == ["123456/654321, 25h00m left", "running 34/120, 2m34s left"]
    assert [title.text.partition(":")[0] for title in root.all("title")] == ["x" * 60, "ppo"]


def test_long_runs_are_drawn_from_their_newest_rounds() -> None:
    nodes = [
        row(f"round-{k:02}/x", round_=k, state="done" if k < 5 else "waiting") for k in range(9)
    ]
    drawn = [node.round for node in newest_rounds(nodes, every=False)]
    assert drawn == [3, 4, 5]
    assert len(newest_rounds(nodes, every=True)) == 9
    fresh = [replace(node, state="waiting") for node in nodes]
    assert [node.round for node in newest_rounds(fresh, every=False)] == [0, 1]
