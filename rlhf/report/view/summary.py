"""Section: the run in one view: what was promoted, what to look at, what the newest batch holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from rlhf.report.view.blocks import Block, Column, Folded, Note, Section, Table, cell
from rlhf.report.view.common import badge, words
from rlhf.report.view.refs import Ref, interval, number, text

LEAD = "The state of the run and what deserves a look, worst first; each line leads to its section."

SHOWN = 3
"""Findings that are shown at once; the others are a click away."""


def section(report: Ref) -> Section:
    """Return the section."""
    blocks: list[Block] = [_facts(report), *_findings(report), *_newest(report)]
    return Section("summary", "Summary", LEAD, blocks)


def _facts(report: Ref) -> Note:
    """State how far the run is, and which version counts."""
    versions = report["versions"]
    states = {
        state: [v for v in versions if v.value["state"] == state]
        for state in ("promoted", "refused", "pending")
    }
    parts = [
        Markup("{} of {} nodes are done.").format(
            number(report["nodes_done"], "d"), number(report["nodes_planned"], "d")
        )
    ]
    for state, found in states.items():
        if found:
            names = Markup(", ").join(text(version["name"]) for version in found)
            parts.append(Markup("{}: {}.").format(state.capitalize(), names))
    parts += _last_win_rate(report["evaluations"])
    return Note(Markup(" ").join(parts), level="facts")


def _last_win_rate(evaluations: Ref) -> Iterator[Markup]:
    if evaluations:
        last = evaluations[len(evaluations) - 1]
        yield Markup("{} against {}: judges' win rate {}.").format(
            text(last["candidate"]),
            text(last["promoted"]),
            interval(last["win_rate"]["judge"]["all"]),
        )


def _findings(report: Ref) -> Iterator[Block]:
    findings = report["summary"]["findings"]
    if not findings:
        if report["evaluations"]:
            yield Note("Nothing stands out: no rule of this report raised a finding.", "quiet")
        return
    notes = []
    for finding in findings:
        values = Markup(", ").join(
            Markup("{} {}").format(value.value["label"], number(at(report, value["at"]), "g"))
            for value in finding["values"]
        )
        body = Markup('{} <a href="#{}">{}</a>{} <span class="none">round {}</span>').format(
            badge(finding.value["level"]),
            finding.value["section"],
            text(finding["text"]),
            Markup(": {}").format(values) if values else "",
            number(at(report, finding["about"])["round"], "d"),
        )
        notes.append(Note(body, "finding"))
    yield from notes[:SHOWN]
    if len(notes) > SHOWN:
        yield Folded("more-findings", "Further findings", notes[SHOWN:])


def at(report: Ref, place: Ref) -> Ref:
    """Follow a JSON pointer of the report."""
    found: Any = report
    for part in place.value.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        found = found[int(key) if isinstance(found.value, list) else key]
    assert isinstance(found, Ref)
    return found


def _newest(report: Ref) -> Iterator[Block]:
    if not report["batches"]:
        return
    batch = report["batches"][len(report["batches"]) - 1]
    counts = batch["counts"]
    if not counts:
        yield Note(
            Markup("Newest batch: {}. Its counts are in the store, which is not there.").format(
                text(batch["id"])
            )
        )
        return
    names = ("read", "accepted", "refused", "excluded", "heldout", "repeat_prompt", "ties")
    columns = [Column("newest batch", numeric=False), *(Column(words(n)) for n in names)]
    row = [cell(batch["id"]), *(cell(counts[name], "d") for name in names)]
    yield Table("newest-batch", "The newest batch", columns, [row])
