"""Section: the batches: what ingest counted, what drifted, and who annotated."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from rlhf.data.records import STRENGTHS
from rlhf.report.view.blocks import Block, Cell, Column, Figure, Note, Section, Table, cell
from rlhf.report.view.charts import Panel
from rlhf.report.view.common import AXIS_COLOURS, SERIES, badge, strength_name, words
from rlhf.report.view.marks import Mark, Point, value_of
from rlhf.report.view.refs import Ref, interval, text
from rlhf.report.view.scales import axis, batches_axis

LEAD = (
    "What went in. Healthy: batches resemble each other except where you changed the task on "
    "purpose, ingest refuses next to nothing, and no annotator or vendor stands out in agreement, "
    "in the strengths they use, or in a taste for long answers."
)

COUNTS = (
    "read",
    "accepted",
    "refused",
    "excluded",
    "heldout",
    "repeat_prompt",
    "ties",
    "ungraded",
)


def section(report: Ref) -> Section:
    """Return the section."""
    batches = [batch for batch in report["batches"] if batch["counts"]]
    if not report["batches"]:
        blocks: list[Block] = [Note("The plan holds no batch yet: `rlhf ingest` adds them.")]
    elif not batches:
        blocks = [
            Note("The store is not there: give the folder of the run's batches as paths.store=...")
        ]
    else:
        blocks = [
            _mix(batches),
            _counts(batches),
            *_corrections(report["corrections"]),
            *_drift(report["batches"]),
        ]
    return Section(
        "data", "Data", LEAD, [*blocks, *_quality(report["quality"]), *_mixtures(report)]
    )


def _mix(batches: list[Ref]) -> Figure:
    """Comparisons per batch, by strength and by axis."""
    ids = [batch.value["id"] for batch in batches]
    panels = []
    groups = {
        "strength": [(name, SERIES[i]) for i, name in enumerate(STRENGTHS)],
        "axis": list(AXIS_COLOURS.items()),
    }
    for group, names in groups.items():
        marks: list[Mark] = []
        for name, colour in names:
            marks += [
                Point(
                    name=strength_name(name) if group == "strength" else name,
                    label=batch.value["id"],
                    colour=colour,
                    x=float(i),
                    y=batch["accepted_by"][group][name],
                )
                for i, batch in enumerate(batches)
                if batch["accepted_by"][group][name].value is not None
            ]
        values = [value_of(mark.y) for mark in marks if isinstance(mark, Point)]
        y = axis("comparisons", values, include=(0.0,), form="d")
        panels.append(Panel(f"accepted by {group}", batches_axis(ids), y, marks))
    return Figure("batch-mix", "What each batch holds", panels)


def _counts(batches: list[Ref]) -> Table:
    present = [name for name in COUNTS if any(name in batch.value["counts"] for batch in batches)]
    others = sorted(
        {
            name
            for batch in batches
            for name in batch["counts"].fields()
            if name not in COUNTS and batch.value["counts"][name]
        }
    )
    names = [*present, *others]
    columns = [Column("batch", numeric=False), Column("round"), *(Column(words(n)) for n in names)]
    rows = [
        [
            cell(batch["id"]),
            cell(batch["round"], "d"),
            *(cell(batch["counts"][name], "d") for name in names),
        ]
        for batch in batches
    ]
    note = "Kinds of refusal and exclusion are listed where a batch has any."
    return Table("ingest", "What ingest counted", columns, rows, note)


def _corrections(rows: Ref) -> Iterator[Block]:
    if not rows:
        yield Note("Nothing of this stream was withdrawn or corrected.", "quiet")
        return
    columns = [
        Column("what", numeric=False),
        Column("rows"),
        Column("of", numeric=False),
        Column("by", numeric=False),
        Column("reason", numeric=False),
        Column("when", numeric=False),
    ]
    table = [
        [
            cell(row["what"]),
            cell(row["num_rows"], "d"),
            cell(row["of"]),
            cell(row["by"]),
            cell(row["reason"]),
            cell(row["time"]),
        ]
        for row in rows
    ]
    note = "Nodes that were done before keep them; later rounds leave them out."
    yield Table("corrections", "Withdrawals and corrections", columns, table, note)


def _drift(batches: Ref) -> Iterator[Block]:
    found = [batch for batch in batches if batch["drift"]]
    if not found:
        yield Note(
            "Drift: nothing to compare. It needs two batches with a profile, which ingest writes; "
            "batches of an older release have none."
        )
        return
    columns = [
        Column("batch", numeric=False, filter=True),
        Column("measure", numeric=False, filter=True),
        Column("verdict", numeric=False, filter=True),
        Column("now"),
        Column("before"),
        Column("effect"),
        Column("p"),
        Column("in words", numeric=False),
    ]
    rows = [
        [
            cell(batch["id"]),
            cell(words(line.value["measure"])),
            Cell(badge(line.value["verdict"]), line.value["verdict"]),
            _value(line["value"]),
            _value(line["before"]),
            cell(line["effect"], "g"),
            cell(line["p_value"], "g"),
            cell(line["text"]),
        ]
        for batch in reversed(found)
        for line in batch["drift"]["lines"]
    ]
    note = (
        "Every batch against all earlier ones. The verdict weighs the size of the effect, not only "
        "its significance: of many rows everything is significant."
    )
    yield Table("drift", "Drift", columns, rows, note)


def _value(ref: Ref) -> Cell:
    """Return a measured value: a number, a mix as its largest parts, or words."""
    if isinstance(ref.value, list):
        return Cell(Markup(", ").join(text(part) for part in ref), None)
    if isinstance(ref.value, dict):
        parts = sorted(ref.fields(), key=lambda name: -(ref.value[name] or 0))[:4]
        shown = Markup(", ").join(
            Markup("{} {}").format(words(name), cell(ref[name], "p0").shown) for name in parts
        )
        return Cell(shown, None)
    if isinstance(ref.value, str):
        return Cell(text(ref), ref.value)
    return cell(ref, "g")


def _quality(tables: Ref) -> Iterator[Block]:
    found = [table for table in tables if table["rows"]]
    if not found:
        yield Note(
            "Annotators and vendors: nothing yet. A finished reward model's scored comparisons are "
            "grouped by `annotator`, or by `source` where no annotator is named."
        )
        return
    columns = [
        Column("axis", numeric=False, filter=True),
        Column(found[0].value["by"], numeric=False),
        Column("n"),
        Column("agreement"),
        Column("longer preferred"),
        *(Column(strength_name(name)) for name in STRENGTHS),
        Column("flags", numeric=False, filter=True),
    ]
    rows = [
        [
            cell(table["axis"]),
            cell(row["name"]),
            cell(row["n"], "d"),
            Cell(interval(row["agreement"]), row["agreement"]["mean"].value),
            Cell(interval(row["longer_preferred"]), row["longer_preferred"]["mean"].value),
            *(cell(row["strengths"][name], "g") for name in STRENGTHS),
            cell(", ".join(row.value["flags"]) or "none"),
        ]
        for table in found
        for row in table["rows"]
    ]
    note = (
        "Agreement with the newest reward model on held-out comparisons; longer preferred is how "
        "often the longer response was chosen."
    )
    yield Table("quality", "Annotators and vendors", columns, rows, note)


def _mixtures(report: Ref) -> Iterator[Block]:
    if not report["mixtures"]:
        return
    columns = [
        Column("model", numeric=False),
        Column("rows"),
        Column("own axis"),
        Column("ties"),
        Column("sources", numeric=False),
        Column("batches", numeric=False),
    ]
    rows = [
        [
            cell(row["node"]),
            cell(row["rows"], "d"),
            cell(row["own_share"], "p0"),
            cell(row["ties"], "d"),
            _named_counts(row["sources"]),
            _named_counts(row["batches"]),
        ]
        for row in report["mixtures"]
    ]
    yield Table("mixtures", "What the reward models were trained on", columns, rows, open=False)


def _named_counts(counts: Ref) -> Cell:
    shown = Markup(", ").join(
        Markup("{} {}").format(name, cell(counts[name], "d").shown) for name in counts.fields()
    )
    return Cell(shown, None)
