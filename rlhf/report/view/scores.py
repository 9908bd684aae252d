"""Section: distributions of scores, calibration, the gate, and where the two models disagree."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from rlhf.report.view.blocks import Block, Column, Figure, Note, Section, Table, cell
from rlhf.report.view.charts import Panel
from rlhf.report.view.common import AXIS_COLOURS, SERIES, ramp, sentence, strength_name
from rlhf.report.view.marks import Dots, Line, Mark, Point, Rule, Steps
from rlhf.report.view.refs import Ref, number
from rlhf.report.view.scales import Values, axis

LEAD = (
    "What the scores look like and whether they mean what they say. Healthy: histograms of newer "
    "versions move right and lose their left tail, gaps grow with strength without splitting in "
    "two, reliability follows the diagonal, and few responses lie in the conflict corners."
)


def section(report: Ref) -> Section:
    """Return the section."""
    blocks = [
        _versions(report["version_histograms"]),
        _gaps(report["gap_histograms"]),
        *_calibration(report["calibration"]),
        *_gate(report["gate"], report["safety_detection"]),
        _conflicts(report["conflicts"]),
    ]
    return Section("scores", "Scores and calibration", LEAD, blocks)


def _versions(histograms: Ref) -> Block:
    if not histograms:
        return Note(
            "Score histograms per version: nothing yet. The evaluation of a round writes "
            "version_scores.jsonl; rounds that an older release evaluated have none."
        )
    panels = []
    for table in histograms:
        names = [group.value["name"] for group in table["groups"]]
        marks = [
            Steps(
                name=group.value["name"],
                edges=Values.of(table["edges"]),
                counts=Values.of(group["counts"]),
                total=group["n"],
                colour="c0" if i == 0 else ramp(i, len(names)),
                filled=i == len(names) - 1,
                dashed=i == 0,
            )
            for i, group in enumerate(table["groups"])
        ]
        panels.append(_histogram(f"judge {table.value['axis']}", "raw score", table, marks))
    rounds = histograms[0]["round"]
    note = sentence(
        "All versions under the judges of round {round}, on the same held-out prompts: "
        "helpfulness on prompts without, safety on prompts with a safety tag. Compare positions "
        "inside a panel only.",
        round=number(rounds, "d"),
    )
    return Figure("version-histograms", "Judge scores of every version", panels, note)


def _histogram(title: str, label: str, table: Ref, marks: list[Steps]) -> Panel:
    edges = table["edges"].value
    top = max(height for mark in marks for height in mark.heights())
    x = axis(label, edges, limits=(edges[0], edges[-1]))
    return Panel(title, x, axis("share", [0.0, top], form="p0", ticks=4), marks)


def _gaps(histograms: Ref) -> Block:
    if not histograms:
        return Note("Gaps by strength: nothing yet. A finished reward model writes scores.jsonl.")
    panels = []
    for table in histograms:
        marks = [
            Steps(
                name=strength_name(group.value["name"]),
                edges=Values.of(table["edges"]),
                counts=Values.of(group["counts"]),
                total=group["n"],
                colour=SERIES[i % len(SERIES)],
            )
            for i, group in enumerate(table["groups"])
        ]
        panel = _histogram(table.value["axis"], "reward gap", table, marks)
        panels.append(Panel(panel.title, panel.x, panel.y, [Rule(at=0.0, along="x"), *marks]))
    return Figure(
        "gap-histograms",
        "Reward gap by strength, newest models",
        panels,
        "Score of the chosen minus score of the rejected response, as a share of the strength's "
        "comparisons. Two humps instead of one mean that the margin pushes scores to the extremes.",
    )


def _calibration(rows: Ref) -> Iterator[Block]:
    if not rows:
        yield Note("Calibration: nothing yet. A finished reward model writes scores.jsonl.")
        return
    newest = rows.where(round=max(row.value["round"] for row in rows))
    panels = [_reliability(row) for row in newest]
    errors = Markup(", ").join(
        Markup("{} {}").format(panel.title, number(row["ece"], "f3"))
        for panel, row in zip(panels, newest, strict=True)
    )
    note = sentence(
        "On the diagonal a probability is a frequency. Points below it: too sure. Bins hold "
        "equally many comparisons. Expected calibration error: {errors}.",
        errors=errors,
    )
    yield Figure("reliability", "Reliability of the newest models", panels, note)
    columns = [
        Column("round"),
        Column("axis", numeric=False),
        Column("probability of", numeric=False),
        Column("n"),
        Column("ECE"),
    ]
    table = [
        [
            cell(row["round"], "d"),
            cell(row["axis"]),
            cell("agreement" if row.value["kind"] == "preference" else "safe"),
            cell(row["n"], "d"),
            cell(row["ece"], "f3"),
        ]
        for row in rows
    ]
    yield Table("ece", "Expected calibration error of every round", columns, table, open=False)


def _reliability(row: Ref) -> Panel:
    name, bins = row.value["axis"], row["bins"]
    is_preference = row.value["kind"] == "preference"
    subject = "agreement" if is_preference else "labelled safe"
    low = 0.5 if is_preference else 0.0
    xs, ys = Values.of(bins, "confidence"), Values.of(bins, "accuracy")
    marks: list[Mark] = [
        Rule(along="diagonal"),
        Line(colour=AXIS_COLOURS[name], xs=xs, ys=ys),
    ]
    marks += [
        Point(
            label=f"{name}: {subject}",
            colour=AXIS_COLOURS[name],
            x=part["confidence"],
            y=part["accuracy"],
        )
        for part in bins
    ]
    least = min(low, *(part["accuracy"].value for part in bins))
    return Panel(
        f"{name}: {subject}",
        axis("model's probability", [], limits=(low, 1.0)),
        axis(f"observed {subject}", [], limits=(least, 1.0)),
        marks,
    )


def _gate(gates: Ref, detection: Ref) -> Iterator[Block]:
    if not gates:
        yield Note(
            "The gate: nothing to show. Precision and recall need comparisons whose responses are "
            "labelled safe or unsafe (`chosen_safe`, `rejected_safe`)."
        )
        return
    newest = max(gates, key=lambda gate: gate.value["round"])
    rows = newest["rows"]
    marks: list[Mark] = []
    for field, colour in (("precision", "c1"), ("recall", "c2")):
        xs, ys = Values.of(rows, "threshold"), Values.of(rows, field)
        marks.append(Line(name=field, colour=colour, xs=xs, ys=ys))
    current = [row for row in rows if row.value["current"]]
    for row in current:
        marks.append(Rule(at=row["threshold"], along="x", label="in use"))
        for field, colour in (("precision", "c1"), ("recall", "c2")):
            marks.append(
                Point(label=f"{field} in use", colour=colour, x=row["threshold"], y=row[field])
            )
    threshold = axis("gate threshold", [], limits=(0.0, 1.0))
    panel = Panel("unsafe responses found", threshold, axis("", [], limits=(0.0, 1.0)), marks)
    recalls, precisions = Values.of(rows, "recall"), Values.of(rows, "precision")
    trade: list[Mark] = [Line(colour="c3", xs=recalls, ys=precisions)]
    trade += [
        Point(label="in use", colour="c3", x=row["recall"], y=row["precision"]) for row in current
    ]
    second = Panel(
        "precision against recall",
        axis("recall", [], limits=(0.0, 1.0)),
        axis("precision", [], limits=(0.0, 1.0)),
        trade,
    )
    note = sentence(
        "Of {labelled} labelled responses {unsafe} are unsafe. A response whose probability of "
        "being safe lies below the threshold is judged by the safety model alone.",
        labelled=number(newest["labelled"], "d"),
        unsafe=number(newest["unsafe"], "d"),
    )
    yield Figure("gate", "Precision and recall over the gate's threshold", [panel, second], note)
    yield _detection(detection)


def _detection(detection: Ref) -> Table:
    columns = [
        Column("model", numeric=False),
        Column("round"),
        *map(
            Column, ("labelled", "unsafe", "recall at one half", "gate at", "precision", "recall")
        ),
    ]
    fields = {
        "labelled": "d",
        "unsafe": "d",
        "unsafe_recall": "f3",
        "gate_threshold": "f2",
        "gate_precision": "f3",
        "gate_recall": "f3",
    }
    table = [
        [
            cell(row["role"]),
            cell(row["round"], "d"),
            *(cell(row[name], form) for name, form in fields.items()),
        ]
        for row in detection
    ]
    return Table("detection", "Unsafe responses found by the safety models", columns, table)


def _conflicts(conflicts: Ref) -> Block:
    if not conflicts:
        return Note(
            "Helpfulness against safety: nothing yet. Both reward models of one round have to be "
            "finished."
        )
    colours = {"labelled safe": "c3", "labelled unsafe": "c2", "not labelled": "c0"}
    limits = conflicts["limits"]
    values = {
        name: [v for group in conflicts["groups"].value for v in group[name]]
        for name in ("helpfulness", "safety")
    }
    x = axis("helpfulness score", values["helpfulness"])
    y = axis("safety score", values["safety"])
    rules = [
        Rule(at=limits[name][end], along=along)
        for along, name in (("x", "helpfulness"), ("y", "safety"))
        for end in ("low", "high")
    ]
    panels = []
    for group in conflicts["groups"]:
        if group["helpfulness"]:
            xs, ys = Values.of(group["helpfulness"]), Values.of(group["safety"])
            dots = Dots(label="response", colour=colours[group.value["name"]], xs=xs, ys=ys)
            panels.append(Panel(group.value["name"], x, y, [*rules, dots]))
    corners = conflicts["corners"]
    note = sentence(
        "Of {n} responses ({drawn} drawn), {safe} lie in the upper quarter of safety and the lower "
        "of helpfulness (upper left corner), {unsafe} the other way round (lower right). Were the "
        "two models independent, either corner would hold {expected}. Correlation {r}.",
        n=number(conflicts["n"], "d"),
        drawn=number(conflicts["drawn"], "d"),
        safe=number(corners["safe_unhelpful"], "d"),
        unsafe=number(corners["unsafe_helpful"], "d"),
        expected=number(corners["expected"], "f1"),
        r=number(conflicts["correlation"], "f2"),
    )
    return Figure("conflicts", "Helpfulness against safety", panels, note)
