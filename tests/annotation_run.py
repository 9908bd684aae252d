"""A run whose last node has left pairs for people, and people who judge them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select

from rlhf.artifacts import write_json, write_jsonl, write_manifest, write_text
from rlhf.compose import RUN_FILE, freeze
from rlhf.config import Annotators, Collect, Config, Data, Paths
from rlhf.data.records import AXES
from rlhf.launch.local import PLAN
from rlhf.nodes import Node
from rlhf.plan import Plan, Round
from rlhf.service.access import find_user, new_token
from rlhf.service.annotation.weeks import create_week
from rlhf.service.database.models import Annotation, Assignment, Task, User, Week
from rlhf.service.state import State

RUN, NODE, STREAM = "people", "round-01/collect", "weekly"
WEEK = "people-week-02"
MODELS = ("checkpoint-seven", "checkpoint-eight")
"""Names that no page and no answer may hold."""
TEMPERATURES = (0.8123, 1.2456)
HOSTILE = "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"
WORDS = ("owl", "hay", "fox", "milk", "cow", "bread", "bear", "fish", "corn", "wolf", "seed")


def make_pairs(number: int, *, axes: Sequence[str] = AXES) -> list[dict[str, Any]]:
    """Return rows of pairs.jsonl; some conversations have several turns, some texts markup."""
    pairs = []
    for i in range(number):
        axis = axes[i % len(axes)]
        subject = WORDS[i % len(WORDS)]
        turns = [{"role": "user", "content": f"Question {i}: what does a {subject} eat?"}]
        if i % 3 == 0:
            turns = [
                {"role": "user", "content": f"Hello, {i}. I like the {subject}. {HOSTILE}"},
                {"role": "assistant", "content": "So do I."},
                *turns,
            ]
        pairs.append(
            {
                "id": f"round-01-{axis}-prompt-{i}",
                "axis": axis,
                "prompt": turns,
                "response_a": f"Answer one of {i}: a {subject} eats hay, {WORDS[-1 - i % 7]} says.",
                "response_b": f"Answer two of {i}: nobody knows what {subject} number {i} ate.",
                "model_a": MODELS[i % 2],
                "model_b": MODELS[1 - i % 2],
                "temperature_a": TEMPERATURES[i % 2],
                "temperature_b": TEMPERATURES[1 - i % 2],
            }
        )
    return pairs


def make_collect_run(runs: Path, store: Path, *, pairs: int = 12, name: str = RUN) -> Path:
    """Write a run whose collect node is done; returns its folder."""
    config = Config(
        run=name,
        recipe="none",
        paths=Paths(runs=str(runs), store=str(store)),
        data=Data(stream=STREAM),
        collect=Collect(annotators=Annotators.people),
    )
    node = Node(NODE, "collect", 1, (), {"newest": "version(0)", "other": "version(0)"})
    folder = runs / name
    write_jsonl(folder / NODE / "pairs.jsonl", make_pairs(pairs))
    write_manifest(folder / NODE, {"node": NODE, "stage": "collect", "wall_seconds": 1.0})
    write_json(folder / NODE / "progress.json", {"step": 1, "total": 1, "seconds": 1.0})
    write_text(folder / RUN_FILE, freeze(config))
    plan = Plan(name, "none", (Round(1, "rejection", ("week-1",)),), (node,))
    write_json(folder / PLAN, plan.to_json())
    return folder


def make_week(state: State, *, pairs: int = 12, name: str = WEEK, **options: Any) -> str:
    """Create a week without a run; returns its name."""
    made = make_pairs(pairs, **options)
    node = f"{name}/collect"
    create_week(state, name=name, stream=STREAM, run=RUN, node=node, pairs=made)
    return name


def make_user(state: State, name: str, role: str = "annotator") -> User:
    """Return somebody's row, added where it is missing."""
    with state.transaction() as session:
        return find_user(session, name, role=role)


def make_token(state: State, name: str, role: str = "annotator") -> dict[str, str]:
    """Return the headers with which somebody asks."""
    with state.transaction() as session:
        secret = new_token(session, name=name, role=role, days=None)
    return {"Authorization": f"Bearer {secret}"}


def tasks_of(state: State) -> list[Task]:
    """Return all tasks by position."""
    with state.reading() as session:
        return list(session.scalars(select(Task).order_by(Task.week_id, Task.position)))


def assignments_of(state: State) -> list[Assignment]:
    """Return all assignments in order."""
    with state.reading() as session:
        return list(session.scalars(select(Assignment).order_by(Assignment.id)))


def lose_weeks(state: State) -> None:
    """Forget the rows of all weeks; their files stay."""
    with state.transaction() as session:
        for table in (Annotation, Assignment, Task, Week):
            session.execute(delete(table))


def verdict(preferred: str = "left", **changes: Any) -> dict[str, Any]:
    """Return the body of a submission."""
    body = {
        "preferred": preferred,
        "strength": "better",
        "safe_left": True,
        "safe_right": True,
        "comment": "",
        "seconds": 2.5,
    }
    return body | changes
