"""Section: where every result comes from, and what it cost beside what was estimated."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from rlhf.report.view.blocks import Block, Cell, Column, Figure, Note, Section, Table, cell
from rlhf.report.view.charts import Panel
from rlhf.report.view.marks import Mark, Point
from rlhf.report.view.refs import Ref, text
from rlhf.report.view.scales import axis, categories

LEAD = (
    "Where every number comes from, and what it took. Healthy: one commit and one environment for "
    "the whole run, every node exact, and an actual cost within a factor of two of the estimate."
)

MAX_BARS = 24
"""Most nodes in the figure; the slowest ones are drawn, the table holds all."""


def section(report: Ref) -> Section:
    """Return the section."""
    if not report["nodes"]:
        return Section("cost", "Provenance and cost", LEAD, [Note("No node is finished yet.")])
    blocks: list[Block] = [
        _times(report["nodes"]),
        *_totals(report["cost"]),
        _nodes(report["nodes"]),
        _inputs(report["nodes"]),
        _environments(report["environments"]),
    ]
    return Section("cost", "Provenance and cost", LEAD, blocks)


def _times(nodes: Ref) -> Figure:
    slowest = sorted(nodes, key=lambda node: -node.value["wall_seconds"])[:MAX_BARS]
    shown = [node for node in nodes if node.path in {other.path for other in slowest}]
    half = -(-len(shown) // 2)
    panels = []
    top = [node.value["wall_seconds"] for node in shown]
    for part in (shown[:half], shown[half:]):
        if not part:
            continue
        y = categories([node.value["node"].removeprefix("round-") for node in part])
        marks: list[Mark] = [
            Point(
                label=node.value["node"],
                colour="c1",
                x=node["wall_seconds"],
                y=place,
            )
            for (place, _), node in zip(y.ticks, part, strict=True)
        ]
        x = axis("wall seconds", top, include=(0.0,), form="f1")
        panels.append(Panel("wall time", x, y, marks, named_rows=True))
    return Figure("wall-time", "Where the time went", panels)


def _totals(cost: Ref) -> Iterator[Block]:
    actual, estimate = cost["actual"], cost["estimate"]
    names = {
        "wall_seconds": ("wall time, s", "f0"),
        "device_hours": ("device-hours", "g"),
        "kwh": ("energy at the device, kWh", "g"),
        "co2_kg": ("CO2, kg", "g"),
        "flops": ("FLOPs", "g"),
        "cost": ("money", "f2"),
    }
    columns = [Column("total", numeric=False), Column("actual"), Column("estimate")]
    rows = [
        [cell(title), cell(actual[name], form), cell(estimate["totals"][name], form)]
        for name, (title, form) in names.items()
    ]
    methods = " and ".join(actual.value["methods"]) or "not recorded"
    note = Markup("Energy is {}. A total is left out unless every finished node has it. {}").format(
        methods,
        "" if estimate else "No estimate was written when the run was prepared.",
    )
    yield Table("cost-totals", "Actual beside estimate", columns, rows, note)
    if estimate:
        yield _assumptions(estimate["assumptions"])


def _assumptions(assumptions: Ref) -> Table:
    rows = []
    for name in assumptions.fields():
        value = assumptions[name]
        if isinstance(value.value, list):
            shown = Cell(Markup(", ").join(text(part) for part in value), None)
        else:
            shown = cell(value, "g" if isinstance(value.value, int | float) else "")
        rows.append([cell(name.replace("_", " ")), shown])
    columns = [Column("assumption", numeric=False), Column("value")]
    return Table("assumptions", "What the estimate assumes", columns, rows, open=False)


def _nodes(nodes: Ref) -> Table:
    has_gpus = any(node["peak_gpu_memory_mb"].value is not None for node in nodes)
    columns = [
        Column("node", numeric=False),
        Column("stage", numeric=False, filter=True),
        Column("wall, s"),
        Column("device-hours"),
        Column("estimated"),
        Column("kWh"),
        Column("estimated"),
        Column("energy is", numeric=False),
        Column("CO2, kg"),
        Column("peak MB"),
        *([Column("GPU MB")] if has_gpus else []),
        Column("processes"),
        Column("exact", numeric=False),
        Column("seed"),
        Column("commit", numeric=False),
    ]
    rows = [
        [
            cell(node["node"]),
            cell(node["stage"]),
            cell(node["wall_seconds"], "f1"),
            cell(node["used"]["device_hours"], "g"),
            cell(node["estimate"]["device_hours"], "g"),
            cell(node["used"]["kwh"], "g"),
            cell(node["estimate"]["kwh"], "g"),
            cell(node["energy"]["method"]),
            cell(node["used"]["co2_kg"], "g"),
            cell(node["peak_memory_mb"], "f0"),
            *([cell(node["peak_gpu_memory_mb"], "f0")] if has_gpus else []),
            cell(node["num_processes"], "d"),
            cell("yes" if node.value["exact"] else "no"),
            cell(node["seeds"]["node"], "i"),
            _short(node["git_commit"]),
        ]
        for node in nodes
    ]
    return Table("nodes", "Every finished node", columns, rows)


def _short(digest: Ref) -> Cell:
    if not digest:
        return cell(Ref(None), "g")
    shown = Markup('<span class="digest" data-path="{}" title="{}">{}</span>').format(
        digest.path, digest.value, digest.value[:8]
    )
    return Cell(shown, digest.value)


def _inputs(nodes: Ref) -> Table:
    columns = [
        Column("node", numeric=False, filter=True),
        Column("reads as", numeric=False),
        Column("what", numeric=False),
        Column("digest", numeric=False),
    ]
    rows = [
        [cell(node["node"]), cell(words_of(read)), cell(read["name"]), _short(read["digest"])]
        for node in nodes
        for read in node["reads"]
    ]
    return Table("inputs", "What every node read", columns, rows, open=False)


def words_of(read: Ref) -> str:
    """Return the role of an input as words."""
    return str(read.value["role"]).replace("_", " ")


def _environments(environments: Ref) -> Table:
    columns = [
        Column("processor", numeric=False),
        Column("device", numeric=False),
        Column("packages", numeric=False),
        Column("nodes", numeric=False),
    ]
    rows = []
    for part in environments:
        packages = part["versions"]
        shown = Markup(", ").join(
            Markup("{} {}").format(name, text(packages[name]))
            for name in packages.fields()
            if packages[name].value
        )
        rows.append(
            [
                cell(part["cpu_model"]),
                cell(part["device"]),
                Cell(shown, None),
                cell(", ".join(part.value["nodes"])),
            ]
        )
    return Table("environments", "Environments", columns, rows, open=False)
