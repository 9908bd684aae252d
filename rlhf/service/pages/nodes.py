"""The page of a node: its state, log, metrics and texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import HTMLResponse

from rlhf.report.view.refs import written
from rlhf.service import facts
from rlhf.service.access import StateOf, Viewer
from rlhf.service.pages.render import fragment, render
from rlhf.service.pages.runs import node_view
from rlhf.service.state import State

router = APIRouter(include_in_schema=False)

LOG_LINES = 80
SAMPLES = 10
"""Texts on one page."""
TEXTS = ("response", "text", "chosen", "rejected", "responses")
"""Fields of a row of texts that hold what a model wrote."""
Name = Annotated[str, Query(max_length=200)]
Row = dict[str, Any]


@router.get("/runs/{run}/node")
def one_node(
    request: Request,
    state: StateOf,
    caller: Viewer,
    run: str,
    name: Name,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
) -> HTMLResponse:
    """Show a node."""
    opened = facts.open_run(state, run)
    node = facts.find_node(opened, name)
    metrics = facts.read_metrics(opened, node, points=1)
    texts = facts.read_samples(opened, node, offset=offset, limit=SAMPLES)
    live = _live(state, opened, name)
    return render(
        request,
        "node.html",
        has_charts=bool(metrics["rows"]) or live["node"]["state"] == "running",
        metrics=[(name, written(value, "g")) for name, value in metrics["latest"].items()],
        texts=[sample(row) for row in texts["items"]],
        texts_file=texts["file"],
        texts_total=texts["total"],
        offset=offset,
        page=SAMPLES,
        after=node.after,
        before=[item.name for item in opened.plan.nodes if name in item.after],
        reads=dict(node.inputs),
        **live,
    )


@router.get("/runs/{run}/node/live")
def one_node_live(state: StateOf, caller: Viewer, run: str, name: Name) -> HTMLResponse:
    """Return the part of a node's page that changes."""
    return fragment("_node.html", **_live(state, facts.open_run(state, run), name))


def _live(state: State, run: facts.Run, name: str) -> dict[str, Any]:
    node = facts.find_node(run, name)
    row = facts.node_row(run, node)
    log = facts.read_log(run, node, lines=LOG_LINES)
    return {"run": run.name, "node": node_view(run.name, row), "log": log}


def sample(row: Row) -> Row:
    """Return what the page shows of a row of texts: the prompt, the texts, the other fields."""
    prompt = row.get("prompt")
    turns = prompt if isinstance(prompt, list) else []
    texts: list[tuple[str, str]] = []
    for name in TEXTS:
        value = row.get(name)
        if isinstance(value, str):
            texts.append((name, value))
        elif isinstance(value, dict):
            texts += [(key, item) for key, item in value.items() if isinstance(item, str)]
        elif isinstance(value, list):
            texts += [(f"{name} {i}", _text(item)) for i, item in enumerate(value, 1)]
    others = [
        fact
        for name, value in row.items()
        if name not in (*TEXTS, "prompt")
        for fact in _facts(name, value)
    ]
    return {
        "turns": [turn for turn in turns if isinstance(turn, dict)],
        "prompt": prompt if isinstance(prompt, str) else "",
        "texts": texts,
        "facts": others,
    }


def _facts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield a field as name and value, an object's fields each on its own."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _facts(f"{name} {key}", item)
    elif isinstance(value, str | int | float):
        yield name.replace("_", " "), _value(value)


def _text(item: Any) -> str:
    return str(item.get("text", item)) if isinstance(item, dict) else str(item)


def _value(value: str | float) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return written(float(value), "g") if is_number else str(value)
