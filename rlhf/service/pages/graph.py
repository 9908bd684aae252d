"""A run's nodes as a graph: a lane per round, in it a column per step of dependency.

Drawn on the server as SVG, whose nodes are links. State is said by a sign and a word, besides the
colour that the style sheet gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from markupsafe import Markup

from rlhf.progress import duration
from rlhf.service.facts import NodeRow

WIDTH, HEIGHT = 200, 46
ACROSS, DOWN = 34, 12
"""Gaps between columns, which edges cross, and between the nodes of a column."""
LEFT, LANE, LANE_GAP = 30, 24, 26
"""Room for edges between lanes; height of a lane's title; gap between lanes."""
LETTER = 6.2
"""Width of a letter, about."""
SIGNS = {
    "done": "\u2713",
    "running": "\u25b6",
    "stopped": "\u2016",
    "failed": "\u2715",
    "waiting": "\u25cb",
}
SHOWN_ROUNDS = 3
"""Newest rounds that are drawn unless all are asked for."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node lies, in pixels."""

    x: float
    y: float


def shown_state(node: NodeRow) -> str:
    """Return done, running, waiting, stopped, or failed: stopped for a reason to mend."""
    return "failed" if node.has_failed else node.state


def short_name(node: NodeRow) -> str:
    """Return a node's name without its round."""
    return node.name.rpartition("/")[2]


def newest_rounds(nodes: Sequence[NodeRow], *, every: bool) -> list[NodeRow]:
    """Return the nodes of the rounds to draw: all, or the newest that have begun and the next."""
    rounds = sorted({node.round for node in nodes})
    if every or len(rounds) <= SHOWN_ROUNDS:
        return list(nodes)
    begun = [node.round for node in nodes if node.state != "waiting"]
    last = min(max(begun, default=rounds[0]) + 1, rounds[-1])
    kept = [number for number in rounds if number <= last][-SHOWN_ROUNDS:]
    return [node for node in nodes if node.round in kept]


def graph(run: str, nodes: Sequence[NodeRow]) -> Markup:
    """Return the nodes as an SVG; edges to nodes that are not given are left out."""
    lanes: dict[int, list[NodeRow]] = {}
    for node in nodes:
        lanes.setdefault(node.round, []).append(node)
    edges = _needed_edges(nodes)
    places: dict[str, Place] = {}
    parts: list[Markup] = []
    top, width = 0.0, 0.0
    bottoms: dict[int, float] = {}
    frames: list[tuple[int, float, float]] = []
    for number in sorted(lanes):
        columns = _columns(lanes[number])
        tallest = max(len(column) for column in columns)
        for i, column in enumerate(columns):
            # Short columns stand in the middle of their lane.
            spare = (tallest - len(column)) * (HEIGHT + DOWN) / 2
            for j, node in enumerate(column):
                x = LEFT + i * (WIDTH + ACROSS)
                places[node.name] = Place(x, top + LANE + spare + j * (HEIGHT + DOWN))
        height = LANE + tallest * (HEIGHT + DOWN)
        frames.append((number, top, height))
        bottoms[number] = top + height
        top += height + LANE_GAP
        width = max(width, LEFT + len(columns) * (WIDTH + ACROSS))
    parts += [_lane(number, y, width, height) for number, y, height in frames]
    by_name = {node.name: node for node in nodes}
    for start, end in edges:
        first, second = by_name[start], by_name[end]
        if first.round == second.round:
            parts.append(_edge(places[start], places[end]))
        else:
            parts.append(_edge_between(places[start], places[end], bottoms[first.round]))
    parts += [_box(run, node, places[node.name]) for node in nodes]
    whole = max(top - LANE_GAP, 1.0)
    return Markup(
        '<svg class="dag" width="{0:.0f}" height="{1:.0f}" viewBox="0 0 {0:.0f} {1:.0f}"'
        ' role="group" aria-label="Nodes of run {2}">{3}</svg>'
    ).format(max(width, 1.0), whole, run, Markup("").join(parts))


def _needed_edges(nodes: Sequence[NodeRow]) -> list[tuple[str, str]]:
    """Return the edges that no longer way replaces; nodes come in an order of execution."""
    known = {node.name for node in nodes}
    above: dict[str, set[str]] = {}
    edges = []
    for node in nodes:
        parents = [name for name in node.after if name in known]
        further = {name for parent in parents for name in above.get(parent, ())}
        edges += [(parent, node.name) for parent in parents if parent not in further]
        above[node.name] = {*parents, *further}
    return edges


def _columns(nodes: Sequence[NodeRow]) -> list[list[NodeRow]]:
    """Return the nodes of a lane by the longest way to them inside it."""
    depth: dict[str, int] = {}
    columns: list[list[NodeRow]] = []
    for node in nodes:
        depth[node.name] = 1 + max(
            (depth[name] for name in node.after if name in depth), default=-1
        )
        while len(columns) <= depth[node.name]:
            columns.append([])
        columns[depth[node.name]].append(node)
    return columns


def _lane(number: int, y: float, width: float, height: float) -> Markup:
    title = f"round {number}" if number else "before the first round"
    return Markup(
        '<rect class="lane" x="{:.0f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="6"/>'
        '<text class="round" x="{:.0f}" y="{:.1f}">{}</text>'
    ).format(LEFT - 12, y, width - LEFT + 12, height, LEFT, y + 16, title)


def _edge(start: Place, end: Place) -> Markup:
    x, y = start.x + WIDTH, start.y + HEIGHT / 2
    to, at = end.x, end.y + HEIGHT / 2
    bend = min((to - x) / 2, ACROSS)
    return Markup(
        '<path class="edge" d="M{:.1f},{:.1f}C{:.1f},{:.1f} {:.1f},{:.1f} {:.1f},{:.1f}"/>'
    ).format(x, y, to - ACROSS + bend, y, to - bend, at, to, at)


def _edge_between(start: Place, end: Place, bottom: float) -> Markup:
    """Return an edge from one lane to a later one, through the gap and along the left side."""
    x, y = start.x + WIDTH / 2, start.y + HEIGHT
    turn, side, at = bottom + LANE_GAP / 2, LEFT / 4, end.y + HEIGHT / 2
    r = 7
    return Markup(
        '<path class="edge" d="M{x:.1f},{y:.1f}V{before:.1f}q0,{r} -{r},{r}H{left:.1f}'
        'q-{r},0 -{r},{r}V{above:.1f}q0,{r} {r},{r}H{to:.1f}"/>'
    ).format(x=x, y=y, before=turn - r, r=r, left=side + r, above=max(at - r, turn + r), to=end.x)


def _box(run: str, node: NodeRow, place: Place) -> Markup:
    state = shown_state(node)
    shown, said = _fitting(short_name(node)), describe(node)
    bar = Markup("")
    if state == "running" and node.total:
        share = min(1.0, node.step / node.total)
        bar = Markup('<rect class="bar" x="1" y="{}" width="{:.1f}" height="4"/>').format(
            HEIGHT - 5, share * (WIDTH - 2)
        )
    return Markup(
        '<a href="{}" aria-label="{}: {}" transform="translate({:.1f},{:.1f})" class="{}">'
        '<rect class="box" width="{}" height="{}" rx="5"/>{}'
        '<text class="sign" x="10" y="19" aria-hidden="true">{}</text>'
        '<text class="name" x="26" y="19">{}</text>'
        '<text class="what" x="26" y="35">{}</text><title>{}: {}</title></a>'
    ).format(
        node_address(run, node.name), node.name, said, place.x, place.y, state,
        WIDTH, HEIGHT, bar, SIGNS[state], shown, _fitting(said), node.name, said,
    )  # fmt: skip


def _fitting(text: str) -> str:
    """Return a text as long as a node's box has room for; its sign says that a node runs."""
    room = int((WIDTH - 30) / LETTER)
    kept = text if len(text) <= room else text.removeprefix("running ")
    return kept if len(kept) <= room else kept[: room - 1] + "\u2026"


def describe(node: NodeRow) -> str:
    """Return a node's state in a few words."""
    state = shown_state(node)
    if state == "done":
        return f"done in {duration(node.seconds)}"
    progress = f"{node.step}/{node.total}" if node.total else ""
    if state == "running":
        left = f"{duration(node.eta)} left" if node.eta is not None else ""
        return ", ".join(filter(None, (f"running {progress}".strip(), left)))
    if state == "failed":
        return f"failed: {node.failure.replace('_', ' ')}"
    if state == "stopped" and progress:
        return f"stopped at {progress}"
    return state


def node_address(run: str, name: str) -> str:
    """Return the address of a node's page."""
    return f"/runs/{quote(run)}/node?name={quote(name)}"


def counted(nodes: Sequence[NodeRow]) -> Mapping[str, int]:
    """Return how many nodes are in each state, states without any left out."""
    found = dict.fromkeys(SIGNS, 0)
    for node in nodes:
        found[shown_state(node)] += 1
    return {state: number for state, number in found.items() if number}
