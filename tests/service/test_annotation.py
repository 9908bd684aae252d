"""Who gets which pair, what they see, and what becomes of what they say."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from annotation_run import (
    MODELS,
    NODE,
    RUN,
    TEMPERATURES,
    WEEK,
    assignments_of,
    lose_weeks,
    make_collect_run,
    make_pairs,
    make_token,
    make_user,
    make_week,
    tasks_of,
    verdict,
)
from sqlalchemy import select, update

from rlhf.config import Annotation as Settings
from rlhf.config import Config
from rlhf.errors import ConfigError, DataError
from rlhf.service.annotation import assigning, journal_file, judging
from rlhf.service.annotation.journal import restore
from rlhf.service.annotation.qualification import Standing
from rlhf.service.annotation.schemas import Skip, Verdict
from rlhf.service.annotation.weeks import create_week
from rlhf.service.database.models import Annotation, Assignment, Audit, Week, now
from rlhf.service.state import State

testclient = pytest.importorskip("fastapi.testclient")
Client = testclient.TestClient


@pytest.fixture
def config(config: Config) -> Config:
    """Tokens are needed, so that several people can ask."""
    annotation = replace(config.service.annotation, overlap_share=0.25)
    return replace(config, service=replace(config.service, tokens=True, annotation=annotation))


@pytest.fixture
def people(state: State) -> dict[str, dict[str, str]]:
    found = {name: make_token(state, name) for name in ("ann", "bob", "cem")}
    found["ops"] = make_token(state, "ops", "operator")
    found["eve"] = make_token(state, "eve", "viewer")
    return found


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(client: Client, people: dict[str, dict[str, str]]) -> Ask:
    """Return a function that asks as somebody and returns the answer, whose status it checks."""

    def asked(who: str, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        answer = client.request(method, f"/api/v1{path}", json=body, headers=people[who])
        assert answer.status_code == status, answer.text
        return answer.json()

    return asked


def next_of(ask: Ask, who: str) -> dict[str, Any] | None:
    return ask(who, "POST", "/tasks/next")["task"]


def submit(ask: Ask, who: str, key: str, *, status: int = 200, **changes: Any) -> dict[str, Any]:
    body = verdict(**changes)
    return ask(who, "POST", f"/assignments/{key}/submit", body, status=status)


def judge_all(ask: Ask, who: str) -> list[dict[str, Any]]:
    """Judge until nothing is left; returns the tasks."""
    found = []
    while (task := next_of(ask, who)) is not None:
        found.append(task)
        submit(ask, who, task["key"])
    return found


def annotations_of(state: State) -> list[Annotation]:
    with state.reading() as session:
        return list(session.scalars(select(Annotation).order_by(Annotation.id)))


# Weeks


def test_a_week_comes_from_a_collect_node(state: State, ask: Ask) -> None:
    make_collect_run(state.runs, state.store)
    made = ask("ops", "POST", "/weeks", {"run": RUN, "node": NODE}, status=201)
    assert (made["name"], made["stream"], made["state"]) == (WEEK, "weekly", "open")
    assert made["counts"]["pairs"] == 12
    assert made["counts"]["needed"] == 12 + 3
    folder = state.weeks / WEEK
    assert json.loads((folder / "week.json").read_bytes())["run"] == RUN
    assert len((folder / "tasks.jsonl").read_text().splitlines()) == 12
    listed = ask("eve", "GET", "/weeks")
    assert [(row["name"], row["pairs"], row["needed"]) for row in listed["items"]] == [
        (WEEK, 12, 15)
    ]
    with state.reading() as session:
        rows = session.scalars(select(Audit).where(Audit.status == 201)).all()
    assert [row.detail["week"] for row in rows] == [WEEK]


def test_the_same_pairs_are_no_second_week(state: State, ask: Ask) -> None:
    make_collect_run(state.runs, state.store)
    ask("ops", "POST", "/weeks", {"run": RUN, "node": NODE}, status=201)
    again = ask("ops", "POST", "/weeks", {"run": RUN, "node": NODE}, status=409)
    assert "already" in again["detail"]
    other = ask("ops", "POST", "/weeks", {"run": RUN, "node": NODE, "name": "x"}, status=409)
    assert WEEK in other["detail"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"run": "nobody", "node": NODE}, 404, "people"),
        ({"run": RUN, "node": "round-09/collect"}, 404, NODE),
        ({"run": RUN, "node": NODE, "name": "../x"}, 422, "letters"),
        ({"run": "../people", "node": NODE}, 404, "people"),
        ({"run": RUN, "node": NODE, "nmae": "x"}, 422, "nmae"),
    ],
)
def test_weeks_that_cannot_be(
    state: State, ask: Ask, body: dict[str, str], status: int, said: str
) -> None:
    make_collect_run(state.runs, state.store)
    assert said in ask("ops", "POST", "/weeks", body, status=status)["detail"]
    assert not state.weeks.exists() or not [p for p in state.weeks.iterdir() if p.is_dir()]


def test_an_unfinished_collect_node_is_no_week(state: State, ask: Ask) -> None:
    folder = make_collect_run(state.runs, state.store)
    (folder / NODE / "manifest.json").unlink()
    said = ask("ops", "POST", "/weeks", {"run": RUN, "node": NODE}, status=409)
    assert "not finished" in said["detail"]


def test_a_pair_that_comes_twice_makes_no_week(state: State) -> None:
    pairs = make_pairs(2)
    with pytest.raises(DataError, match=r"pairs\.jsonl line 3 has id .* once more"):
        create_week(state, name=WEEK, stream="weekly", run=RUN, node=NODE, pairs=[*pairs, pairs[0]])


@pytest.mark.parametrize("name", ["overlap_share", "qualification_share"])
@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_shares_are_from_0_to_1(name: str, share: float) -> None:
    with pytest.raises(ConfigError, match=f"annotation.{name}={share}.* between 0 and 1"):
        Settings(**{name: share})


def test_a_week_that_nobody_judged_is_discarded_and_made_again(
    qualified: State, client: Client, ask: Ask, people: dict[str, dict[str, str]]
) -> None:
    state = qualified
    make_collect_run(state.runs, state.store)
    for _ in range(2):
        ask("ops", "POST", "/weeks", {"run": RUN, "node": NODE}, status=201)
        answer_items(ask, "ann", wrong=5)
        assert next_of(ask, "bob") is not None
        ask("ann", "POST", f"/weeks/{WEEK}/discard", status=403)
        gone = ask("ops", "POST", f"/weeks/{WEEK}/discard")
        assert gone == {"week": WEEK, "run": RUN, "node": NODE}
        assert (tasks_of(state), assignments_of(state), annotations_of(state)) == ([], [], [])
        assert restore(state).weeks == 0
    assert len(list((state.weeks / ".discarded").iterdir())) == 2
    ask("ops", "POST", f"/weeks/{WEEK}/discard", status=404)
    with state.reading() as session:
        rows = session.scalars(select(Audit).where(Audit.action.endswith("/discard"))).all()
    assert [row.detail.get("node") for row in rows if row.status == 200] == [NODE, NODE]

    # The same on the page, whose live part leaves the message to the page.
    make_week(state, pairs=1)
    page = f"/weeks/{WEEK}"
    headers = people["ops"] | {"Accept": "text/html"}
    assert "Discard the week" in client.get(page, headers=headers).text
    client.post(f"{page}/discard", headers=headers, follow_redirects=False)
    assert "set-cookie" not in client.get(f"{page}/live", headers=headers).headers
    assert "tick the box" in client.get(page, headers=headers).text
    answer_items(ask, "bob", wrong=0)
    judge_all(ask, "bob")
    assert "Discard the week" not in client.get(page, headers=headers).text
    said = ask("ops", "POST", f"{page}/discard", status=409)
    assert "have been judged" in said["detail"]
    assert client.post(f"{page}/discard", data={"sure": "yes"}, headers=headers).status_code == 409


def test_weeks_are_paged(state: State, ask: Ask) -> None:
    for i in range(5):
        make_week(state, pairs=1, name=f"w{i}")
    first = ask("eve", "GET", "/weeks?limit=2")
    assert [row["name"] for row in first["items"]] == ["w4", "w3"]
    second = ask("eve", "GET", f"/weeks?limit=2&cursor={first['next_cursor']}")
    third = ask("eve", "GET", f"/weeks?limit=2&cursor={second['next_cursor']}")
    assert [row["name"] for row in second["items"] + third["items"]] == ["w2", "w1", "w0"]
    assert third["next_cursor"] is None


# Pairs


def test_annotators_see_no_origin(
    state: State, client: Client, ask: Ask, people: dict[str, dict[str, str]]
) -> None:
    make_week(state, pairs=4)
    secrets = [*MODELS, *map(str, TEMPERATURES), "round-01", "response_a", "model"]
    while (offered := ask("ann", "POST", "/tasks/next"))["task"] is not None:
        key = offered["task"]["key"]
        page = client.get("/annotate", headers=people["ann"]).text
        shown = ask("ann", "GET", f"/assignments/{key}")
        assert key in page
        for text in (json.dumps(offered), page, json.dumps(shown)):
            assert [word for word in secrets if word in text] == []
        submit(ask, "ann", key)


def test_the_order_is_each_annotators_own_and_lasts(state: State) -> None:
    make_week(state, pairs=40)
    with state.transaction() as session:
        session.execute(update(assigning.Task).values(needed=2))
    lefts: dict[int, dict[str, str]] = {}
    for who in ("ann", "bob"):
        user = make_user(state, who)
        while (given := assigning.next_assignment(state, user).assignment) is not None:
            shown = judging.show(state, user, given.key)
            assert judging.show(state, user, given.key) == shown
            lefts.setdefault(given.task_id, {})[who] = shown.left
            judging.submit(state, user, given.key, Verdict(**verdict()))
    assert len(lefts) == 40
    differing = sum(found["ann"] != found["bob"] for found in lefts.values())
    assert 8 < differing < 32
    swapped = Counter(row.swapped for row in assignments_of(state))
    assert min(swapped.values()) > 20


def test_what_was_shown_left_is_stored_as_the_pairs_response(state: State) -> None:
    make_week(state, pairs=20)
    user = make_user(state, "ann")
    wanted = []
    while (offer := assigning.next_assignment(state, user)).assignment is not None:
        shown = judging.show(state, user, offer.assignment.key)
        one_is_left, prefers_one = shown.left.startswith("Answer one"), len(wanted) % 3 == 0
        body = verdict(
            "left" if one_is_left == prefers_one else "right",
            safe_left=one_is_left,
            safe_right=not one_is_left,
        )
        answer = judging.submit(state, user, shown.key, Verdict(**body))
        assert judging.submit(state, user, shown.key, Verdict(**body)) == answer
        assert answer.verdict == Verdict(**body)
        wanted.append(("a" if prefers_one else "b", True, False))
    assert [(row.preferred, row.safe_a, row.safe_b) for row in annotations_of(state)] == wanted
    assert {row.swapped for row in assignments_of(state)} == {True, False}


def test_nobody_gets_a_pair_twice_and_several_get_the_chosen_ones(state: State, ask: Ask) -> None:
    make_week(state, pairs=12)
    assert Counter(task.needed for task in tasks_of(state)) == {1: 9, 2: 3}
    for who in ("ann", "bob", "cem"):
        judge_all(ask, who)
    given = Counter((row.task_id, row.user_id) for row in assignments_of(state))
    assert set(given.values()) == {1}
    per_task = Counter(row.task_id for row in annotations_of(state))
    assert {task.id: task.needed for task in tasks_of(state)} == dict(per_task)
    # ann took all 12, bob the three chosen ones again, cem came too late.
    assert Counter(row.user_id for row in annotations_of(state)).most_common() == [(1, 12), (2, 3)]
    offered = ask("cem", "POST", "/tasks/next")
    assert (offered["status"], offered["task"]) == ("none", None)
    assert "left for you" in offered["message"]


def test_asking_again_gives_the_same_pair(state: State, ask: Ask) -> None:
    make_week(state)
    first = next_of(ask, "ann")
    assert next_of(ask, "ann") == first
    assert len(assignments_of(state)) == 1


def test_both_axes_come_in_blocks_with_their_guideline(state: State, ask: Ask) -> None:
    make_week(state, pairs=120)
    axes = [task.axis for task in tasks_of(state)]
    assert axes[:25] == ["helpfulness"] * 25
    assert axes[25:50] == ["safety"] * 25
    task = next_of(ask, "ann")
    assert task is not None
    assert "helps this person" in task["guideline"]


def test_concurrent_annotators_never_exceed_what_is_needed(state: State) -> None:
    make_week(state, pairs=30)
    users = [make_user(state, f"person-{i}") for i in range(10)]
    start = threading.Barrier(len(users))
    failures: list[BaseException] = []

    def work(user: Any) -> None:
        try:
            start.wait()
            while True:
                offer = assigning.next_assignment(state, user)
                if offer.assignment is None:
                    return
                judging.submit(state, user, offer.assignment.key, Verdict(**verdict()))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = Counter(row.task_id for row in annotations_of(state))
    assert {task.id: task.needed for task in tasks_of(state)} == dict(found)
    assert all(task.taken == task.needed for task in tasks_of(state))
    lines = (state.weeks / WEEK / "journal.jsonl").read_bytes().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == found.total()


def test_two_tabs_that_ask_at_once_get_one_pair(state: State) -> None:
    make_week(state, pairs=30)
    user = make_user(state, "ann")
    start = threading.Barrier(8)
    keys: list[str] = []

    def work() -> None:
        start.wait()
        offer = assigning.next_assignment(state, user)
        assert offer.assignment is not None
        keys.append(offer.assignment.key)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1


def test_a_tab_that_asks_leaves_a_submission_of_another_as_it_is(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_week(state, pairs=1)
    user = make_user(state, "ann")
    given = assigning.next_assignment(state, user).assignment
    assert given is not None
    with state.transaction() as session:
        session.execute(update(Assignment).values(state="expired"))
        session.execute(update(assigning.Task).values(needed=2, taken=0))
    is_inside, may_go = threading.Event(), threading.Event()
    append = journal_file.append

    def slow(folder: Path, entry: dict[str, Any]) -> None:
        is_inside.set()
        assert may_go.wait(60)
        append(folder, entry)

    monkeypatch.setattr(journal_file, "append", slow)
    submitting = threading.Thread(
        target=judging.submit, args=(state, user, given.key, Verdict(**verdict()))
    )
    asking = threading.Thread(target=assigning.next_assignment, args=(state, user))
    submitting.start()
    assert is_inside.wait(60)
    asking.start()
    # Long enough to take it back, if it did not wait.
    asking.join(0.5)
    may_go.set()
    submitting.join()
    asking.join()
    assert [row.state for row in assignments_of(state)] == ["done"]
    assert [task.taken for task in tasks_of(state)] == [1]


# Pairs that are left alone, or skipped


def leave_alone(state: State, key: str, *, minutes: float = 61) -> None:
    with state.transaction() as session:
        session.execute(
            update(Assignment)
            .where(Assignment.key == key)
            .values(touched=now() - timedelta(minutes=minutes))
        )


def test_a_pair_left_alone_goes_to_somebody_else(state: State, ask: Ask) -> None:
    make_week(state, pairs=1)
    task = next_of(ask, "ann")
    assert task is not None
    assert next_of(ask, "bob") is None
    leave_alone(state, task["key"], minutes=59)
    assert next_of(ask, "bob") is None
    leave_alone(state, task["key"])
    other = next_of(ask, "bob")
    assert other is not None
    assert other["prompt"] == task["prompt"]
    draft = ask("ann", "PUT", f"/assignments/{task['key']}/draft", {"comment": "late"})
    assert (draft["state"], draft["draft"]["comment"]) == ("expired", "late")
    late = submit(ask, "ann", task["key"], status=409)
    assert "somebody else" in late["detail"]
    assert next_of(ask, "ann") is None
    submit(ask, "bob", other["key"])
    assert [task.taken for task in tasks_of(state)] == [1]
    assert len(annotations_of(state)) == 1


def test_a_pair_left_alone_comes_back_with_what_was_typed(state: State, ask: Ask) -> None:
    make_week(state, pairs=1)
    task = next_of(ask, "ann")
    assert task is not None
    path = f"/assignments/{task['key']}/draft"
    ask("ann", "PUT", path, {"comment": "half a thought", "saved": 5})
    leave_alone(state, task["key"])
    other = next_of(ask, "bob")
    assert other is not None
    ask("bob", "POST", f"/assignments/{other['key']}/skip", {"reason": "no time"})
    again = next_of(ask, "ann")
    assert again is not None
    assert (again["key"], again["draft"]["comment"]) == (task["key"], "half a thought")
    submit(ask, "ann", task["key"])
    assert [task.taken for task in tasks_of(state)] == [1]


def test_a_draft_keeps_a_pair(state: State, ask: Ask) -> None:
    make_week(state, pairs=1)
    task = next_of(ask, "ann")
    assert task is not None
    leave_alone(state, task["key"])
    ask("ann", "PUT", f"/assignments/{task['key']}/draft", {"comment": "I am here", "saved": 1})
    assert next_of(ask, "bob") is None


def test_looking_again_keeps_a_pair(state: State, ask: Ask) -> None:
    make_week(state, pairs=1)
    task = next_of(ask, "ann")
    assert task is not None
    leave_alone(state, task["key"])
    assert next_of(ask, "ann") is not None
    assert next_of(ask, "bob") is None


def test_a_skipped_pair_goes_to_others_for_a_while(state: State, ask: Ask) -> None:
    make_week(state, pairs=1)
    for who in ("ann", "bob", "cem"):
        task = next_of(ask, who)
        assert task is not None
        path = f"/assignments/{task['key']}/skip"
        assert "reason" in ask(who, "POST", path, {"reason": ""}, status=422)["detail"]
        done = ask(who, "POST", path, {"reason": "garbled"})
        assert done == ask(who, "POST", path, {"reason": "garbled"})
        assert done["state"] == "skipped"
        assert ask(who, "POST", path, {"reason": "other"}, status=409)
        assert next_of(ask, who) is None
        submit(ask, who, task["key"], status=409)
    assert next_of(ask, "ops") is None
    lose_weeks(state)
    restore(state)
    assert next_of(ask, "ops") is None
    counts = ask("ops", "GET", f"/weeks/{WEEK}")["counts"]
    assert (counts["skips"], counts["skipped_only"], counts["judged"]) == (3, 1, 0)


# Verdicts


def test_submitting_again_changes_nothing(state: State, ask: Ask) -> None:
    make_week(state)
    task = next_of(ask, "ann")
    assert task is not None
    first = submit(ask, "ann", task["key"], comment="clear")
    assert first["verdict"]["comment"] == "clear"
    assert submit(ask, "ann", task["key"], comment="clear", seconds=99) == first
    for change in ({"preferred": "right"}, {"strength": "slightly_better"}, {"comment": "x"}):
        said = submit(ask, "ann", task["key"], status=409, **{"comment": "clear", **change})
        assert said["verdict"] == first["verdict"]
    ask("ann", "PUT", f"/assignments/{task['key']}/draft", {}, status=409)
    assert len(annotations_of(state)) == 1
    assert len((state.weeks / WEEK / "journal.jsonl").read_text().splitlines()) == 1


def test_a_double_click_is_one_annotation(state: State) -> None:
    make_week(state)
    user = make_user(state, "ann")
    offer = assigning.next_assignment(state, user)
    assert offer.assignment is not None
    key = offer.assignment.key
    start = threading.Barrier(6)
    answers: list[Any] = []

    def click() -> None:
        start.wait()
        answers.append(judging.submit(state, user, key, Verdict(**verdict())))

    threads = [threading.Thread(target=click) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [answers[0]] * 6
    assert len(annotations_of(state)) == 1
    assert len((state.weeks / WEEK / "journal.jsonl").read_text().splitlines()) == 1


def test_an_older_draft_replaces_no_newer_one(ask: Ask, state: State) -> None:
    make_week(state)
    task = next_of(ask, "ann")
    assert task is not None
    path = f"/assignments/{task['key']}/draft"
    newer = {"preferred": "left", "strength": "better", "comment": "new", "saved": 20}
    ask("ann", "PUT", path, newer)
    kept = ask("ann", "PUT", path, {"comment": "old", "saved": 10})["draft"]
    assert (kept["comment"], kept["saved"]) == ("new", 20)
    again = next_of(ask, "ann")
    assert again is not None
    assert again["draft"] == kept
    with state.reading() as session:
        assert session.scalars(select(Audit)).all() == []


def test_a_draft_replaces_none_that_its_page_does_not_know(ask: Ask, state: State) -> None:
    make_week(state)
    task = next_of(ask, "ann")
    assert task is not None
    path = f"/assignments/{task['key']}/draft"

    def keep(comment: str, saved: int, based_on: int | None) -> tuple[str, int]:
        body = {"comment": comment, "saved": saved, "based_on": based_on}
        kept = ask("ann", "PUT", path, body)["draft"]
        assert "based_on" not in kept
        return kept["comment"], kept["saved"]

    assert keep("one", 10, 0) == ("one", 10)
    assert keep("of another browser", 20, 10) == ("of another browser", 20)
    assert keep("two", 30, 10) == ("of another browser", 20)
    assert keep("two", 30, 20) == ("two", 30)
    # Its answer was lost, and it comes again.
    assert keep("two", 30, 20) == ("two", 30)
    assert keep("by no page", 40, None) == ("by no page", 40)


def test_labels_are_needed_where_safety_is_judged(state: State, ask: Ask) -> None:
    make_week(state, pairs=2)
    for _ in range(2):
        task = next_of(ask, "ann")
        assert task is not None
        if task["axis"] == "safety":
            said = submit(ask, "ann", task["key"], safe_right=None, status=422)
            assert "label" in said["detail"]
            submit(ask, "ann", task["key"])
        else:
            submit(ask, "ann", task["key"], safe_left=None, safe_right=None)
    assert {row.safe_a for row in annotations_of(state)} == {None, True}


@pytest.mark.parametrize(
    "change",
    [
        {"comment": "null \x00 character"},
        {"comment": "x" * 10_001},
        {"preferred": "a"},
        {"strength": "much_better"},
        {"seconds": -1},
        {"seconds": 1e9},
        {"model": "v1"},
        {"safe_left": "maybe"},
    ],
)
def test_verdicts_that_do_not_fit(state: State, ask: Ask, change: dict[str, Any]) -> None:
    make_week(state)
    task = next_of(ask, "ann")
    assert task is not None
    submit(ask, "ann", task["key"], status=422, **change)
    assert annotations_of(state) == []


def test_half_a_character_is_refused(
    state: State, ask: Ask, client: Client, people: dict[str, dict[str, str]]
) -> None:
    make_week(state)
    task = next_of(ask, "ann")
    assert task is not None
    answer = client.post(
        f"/api/v1/assignments/{task['key']}/submit",
        content=json.dumps(verdict(comment="\ud800")),
        headers=people["ann"] | {"Content-Type": "application/json"},
    )
    assert answer.status_code == 422
    assert answer.json()["status"] == 422


def test_somebody_elses_assignment_is_not_found(state: State, ask: Ask) -> None:
    make_week(state)
    task = next_of(ask, "ann")
    assert task is not None
    for key in (task["key"], "nonsense", "%00", "%F0%9F%A6%89", "a" * 900):
        path = f"/assignments/{key}"
        assert "bob" in ask("bob", "GET", path, status=404)["detail"]
        ask("bob", "PUT", f"{path}/draft", {}, status=404)
        ask("bob", "POST", f"{path}/submit", verdict(), status=404)
        ask("bob", "POST", f"{path}/skip", {"reason": "x"}, status=404)


def test_a_closing_week_takes_nothing(state: State, ask: Ask) -> None:
    make_week(state)
    task = next_of(ask, "ann")
    assert task is not None
    with state.transaction() as session:
        session.execute(update(Week).values(state="closing"))
    assert "closed" in submit(ask, "ann", task["key"], status=409)["detail"]
    offered = ask("ann", "POST", "/tasks/next")
    assert (offered["status"], offered["task"]) == ("none", None)
    assert "closed" in ask("ann", "POST", f"/tasks/next?week={WEEK}")["message"]
    assert annotations_of(state) == []


def test_roles(state: State, client: Client, ask: Ask, people: dict[str, dict[str, str]]) -> None:
    make_week(state)
    assert 'href="/weeks"' in client.get("/", headers=people["eve"]).text
    ask("eve", "GET", f"/weeks/{WEEK}")
    ask("eve", "POST", "/tasks/next", status=403)
    for who in ("eve", "ann"):
        ask(who, "POST", "/weeks", {"run": RUN, "node": NODE}, status=403)
        ask(who, "POST", f"/weeks/{WEEK}/close", status=403)
        ask(who, "GET", f"/weeks/{WEEK}/annotators", status=403)
        ask(who, "GET", f"/weeks/{WEEK}/export", status=403)
    ask("eve", "GET", "/weeks/..%2Fx", status=404)
    assert WEEK in ask("eve", "GET", "/weeks/nothing", status=404)["detail"]


# Qualification


@pytest.fixture
def items(tmp_path: Path) -> Path:
    """Five items; the better response of each says so."""
    path = tmp_path / "qualification.jsonl"
    rows = [
        {
            "id": f"item-{i}",
            "prompt": f"Item {i}?",
            "chosen": f"the GOOD answer {i}",
            "rejected": f"the bad answer {i}",
            "axis": "helpfulness" if i else "safety",
            "chosen_safe": True,
            "rejected_safe": False if i == 0 else None,
        }
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def qualified(state: State, items: Path) -> Iterator[State]:
    """The state with qualification items."""
    annotation = replace(state.config.service.annotation, qualification=str(items))
    service = replace(state.config.service, annotation=annotation)
    object.__setattr__(state, "config", replace(state.config, service=service))
    return state


def answer_items(ask: Ask, who: str, *, wrong: int) -> list[str]:
    """Answer the five items, the first ones wrongly; returns their states of progress."""
    seen = []
    for i in range(5):
        offered = ask(who, "POST", "/tasks/next")
        task = offered["task"]
        assert task["is_qualification"]
        seen.append(offered["progress"]["qualification_answered"])
        good = "left" if "GOOD" in task["left"] else "right"
        bad = {"left": "right", "right": "left"}[good]
        labels = {f"safe_{good}": True, f"safe_{bad}": False}
        submit(ask, who, task["key"], preferred=bad if i < wrong else good, **labels)
    return seen


def test_annotators_begin_with_the_items(qualified: State, ask: Ask) -> None:
    make_week(qualified, pairs=2)
    assert answer_items(ask, "ann", wrong=1) == [0, 1, 2, 3, 4]
    task = next_of(ask, "ann")
    assert task is not None
    assert not task["is_qualification"]
    # The same items are everybody's first.
    answer_items(ask, "bob", wrong=0)
    assert next_of(ask, "bob") is not None
    week = ask("ops", "GET", f"/weeks/{WEEK}")
    assert (week["counts"]["pairs"], week["counts"]["verdicts"]) == (2, 0)


def test_too_many_wrong_items_end_it(qualified: State, ask: Ask) -> None:
    make_week(qualified, pairs=2)
    answer_items(ask, "ann", wrong=2)
    offered = ask("ann", "POST", "/tasks/next")
    assert (offered["status"], offered["task"]) == ("not_qualified", None)
    assert "3 of 5" in offered["message"]
    assert "80%" in offered["message"]
    rows = ask("ops", "GET", f"/weeks/{WEEK}/annotators")["items"]
    assert [(row["annotator"], row["qualification_right"], row["qualified"]) for row in rows] == [
        ("ann", 3, False)
    ]


def test_a_wrong_label_is_a_wrong_answer(qualified: State, ask: Ask) -> None:
    make_week(qualified, pairs=1)
    for _ in range(5):
        task = next_of(ask, "ann")
        assert task is not None
        good = "left" if "GOOD" in task["left"] else "right"
        submit(ask, "ann", task["key"], preferred=good)
    rows = ask("ops", "GET", f"/weeks/{WEEK}/annotators")["items"]
    assert [row["qualification_right"] for row in rows] == [4]


def test_skipped_items_are_not_right(qualified: State, ask: Ask) -> None:
    make_week(qualified, pairs=1)
    for _ in range(5):
        task = next_of(ask, "ann")
        assert task is not None
        assert task["is_qualification"]
        ask("ann", "POST", f"/assignments/{task['key']}/skip", {"reason": "no"})
    assert ask("ann", "POST", "/tasks/next")["status"] == "not_qualified"


def test_items_count_in_later_weeks_and_without_the_database(qualified: State, ask: Ask) -> None:
    make_week(qualified, pairs=1, name="w1")
    answer_items(ask, "ann", wrong=0)
    judge_all(ask, "ann")
    lose_weeks(qualified)
    restore(qualified)
    make_week(qualified, pairs=1, name="w2")
    task = next_of(ask, "ann")
    assert task is not None
    assert (task["week"], task["is_qualification"]) == ("w2", False)


def test_a_corrected_item_is_another_one(qualified: State, items: Path, ask: Ask) -> None:
    make_week(qualified, pairs=1, name="w1")
    answer_items(ask, "ann", wrong=0)
    judge_all(ask, "ann")
    rows = [json.loads(line) for line in items.read_text().splitlines()]
    rows[2] |= {"chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_week(qualified, pairs=1, name="w2")
    task = next_of(ask, "ann")
    assert task is not None
    assert task["prompt"][0]["content"] == "Item 2?"
    submit(ask, "ann", task["key"], preferred="right" if "GOOD" in task["left"] else "left")
    [row] = ask("ops", "GET", "/weeks/w2/annotators")["items"]
    assert row["qualification_right"] == row["qualification_answered"] == 5


def test_the_first_answer_to_an_item_counts(qualified: State, ask: Ask) -> None:
    """Two weeks may ask it at the same time."""
    for name in ("w1", "w2"):
        make_week(qualified, pairs=1, name=name)
    tasks = [ask("ann", "POST", f"/tasks/next?week={name}")["task"] for name in ("w2", "w1")]
    for task, is_wanted in zip(tasks, (True, False), strict=True):
        side = "left" if ("GOOD" in task["left"]) == is_wanted else "right"
        other = {"left": "right", "right": "left"}[side]
        labels = {f"safe_{side}": is_wanted, f"safe_{other}": not is_wanted}
        submit(ask, "ann", task["key"], preferred=side, **labels)
    for name in ("w1", "w2"):
        [row] = ask("ops", "GET", f"/weeks/{name}/annotators")["items"]
        assert row["qualification_right"] == 1


def test_a_share_is_met_as_it_is_written() -> None:
    assert Standing(total=25, right=14, open=(), share=0.56).is_passed
    assert not Standing(total=25, right=13, open=(), share=0.56).is_passed


TIE = {"id": "x", "prompt": "p", "chosen": "a", "rejected": "b", "axis": "safety", "tie": True}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(TIE), "line 1: tie=true has no right answer"),
        ('{"id": "x", "prompt": "p"}\n', "line 1: chosen is missing"),
        ("no json\n", "line 1"),
        (None, "cannot be read"),
    ],
)
def test_bad_items_are_refused(qualified: State, items: Path, text: str | None, said: str) -> None:
    if text is None:
        items.unlink()
    else:
        items.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"service\.annotation\.qualification") as caught:
        make_week(qualified)
    assert said in str(caught.value)
    assert tasks_of(qualified) == []


# Agreement


def test_agreement_is_reported_as_it_stands(state: State, ask: Ask) -> None:
    make_week(state, pairs=12)
    before = ask("eve", "GET", f"/weeks/{WEEK}")["agreement"]
    assert before["pairs"] == 0
    assert before["ac2"] == {"quadratic": None, "linear": None}
    strengths = ["significantly_better", "better", "negligibly_better"]
    for who in ("ann", "bob"):
        number = 0
        while (task := next_of(ask, who)) is not None:
            side = "left" if task["left"].startswith("Answer one") else "right"
            submit(ask, who, task["key"], preferred=side, strength=strengths[number % 3])
            number += 1
    after = ask("eve", "GET", f"/weeks/{WEEK}")["agreement"]
    assert (after["pairs"], after["annotators"], after["same_preference"]) == (3, 2, 1.0)
    assert 0.5 < after["ac2"]["quadratic"] <= 1
    assert after["safety_ac1"] == 1
    rows = ask("ops", "GET", f"/weeks/{WEEK}/annotators?limit=1")
    assert [row["annotator"] for row in rows["items"]] == ["ann"]
    later = ask("ops", "GET", f"/weeks/{WEEK}/annotators?cursor={rows['next_cursor']}")
    assert [row["annotator"] for row in later["items"]] == ["bob"]
    assert rows["items"][0]["median_seconds"] == 2.5


def test_a_skip_is_answered_once_more_after_a_restart(state: State) -> None:
    make_week(state)
    user = make_user(state, "ann")
    offer = assigning.next_assignment(state, user)
    assert offer.assignment is not None
    body = Skip(reason="garbled")
    first = judging.skip(state, user, offer.assignment.key, body)
    state.engine.dispose()
    assert judging.skip(state, user, offer.assignment.key, body) == first
