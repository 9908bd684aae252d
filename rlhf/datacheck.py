"""`rlhf drift` and `rlhf quality`: what the store and a run know about batches, as tables.

A vendor file that is not ingested yet is ingested into a store of its own in a temporary folder,
so that exactly the rules of `rlhf ingest` decide which of its rows count, and nothing is written to
the real store.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from rlhf.artifacts import NodeDir, read_json, read_jsonl
from rlhf.compose import run_dir
from rlhf.config import Config
from rlhf.data.arrival import Arrival
from rlhf.data.drift import AS_EXPECTED, LOOK, STOP, drift_report, headline
from rlhf.data.ingest import ingest_file
from rlhf.data.ledger import FOLDERS, Store
from rlhf.data.profile import Profile, read_profile
from rlhf.data.quality import BY, quality_report
from rlhf.data.records import AXES, STRENGTHS, Kind
from rlhf.data.rows import verdict_rows
from rlhf.data.tombstones import FOLDER as TOMBSTONES
from rlhf.errors import ConfigError, DataError
from rlhf.plan import Plan
from rlhf.runner import read_plan

MIN_WIDTH = 120
"""Columns of a table that is written to a file or a pipe, whose width rich cannot know."""

COLOURS = {AS_EXPECTED: "green", LOOK: "yellow", STOP: "red"}
"""Colour of each verdict in a table."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where batches come from: a stream of the store, and a run that trained on them, if named."""

    config: Config
    store: Store
    plan: Plan | None

    @classmethod
    def of(cls, config: Config) -> Source:
        """Find the stream: the run's, when a run or a recipe is named, else that of ingest."""
        has_run = config.recipe != "none"
        stream = config.data.stream if has_run else config.ingest.stream
        plan = read_plan(run_dir(config)) if has_run else None
        return cls(config, Store(Path(config.paths.store), stream), plan)

    def folder(self, batch: str) -> Path:
        """Return a batch's folder; DataError when it is not in the stream."""
        self.store.manifest(Kind.batch, batch)
        return self.store.folder / FOLDERS[Kind.batch] / batch

    def profile(self, batch: str) -> Profile:
        """Return the profile of a batch of the stream."""
        is_first = self.store.ids(Kind.batch)[0] == batch
        return read_profile(self.folder(batch), batch=batch, is_first=is_first)


def report_drift(config: Config, names: Sequence[str], *, against: Sequence[str]) -> list[Any]:
    """Return the drift reports of batches or files, by default of the stream's newest batch.

    Without `against` a batch is compared with all batches that came before it, and a file with all
    there are. With `against` both sides are taken as they are.
    """
    source = Source.of(config)
    known = source.store.ids(Kind.batch)
    if not names and not known:
        raise DataError(
            f"stream {source.store.stream!r} of {source.store.root} has no batch; add one with "
            "`rlhf ingest`, or name a file"
        )
    reports = []
    for name in names or known[-1:]:
        is_file = _is_file(name, known)
        if against:
            earlier = [_profile(source, other, known, history=False) for other in against]
            profile = _profile(source, name, known, history=False)
        else:
            before = known if is_file else known[: known.index(name)]
            earlier = [source.profile(id) for id in before]
            profile = _profile(source, name, known, history=True)
        arrivals = [] if is_file else find_arrivals(source, name)
        reports.append(drift_report(profile, earlier, arrivals=arrivals))
    return reports


def batch_headline(config: Config, store: Store, batch: str) -> str:
    """Return the verdict on a batch that was just added, in one line."""
    source = Source(config, store, None)
    known = store.ids(Kind.batch)
    earlier = [source.profile(id) for id in known[: known.index(batch)]]
    return headline(drift_report(source.profile(batch), earlier))


def find_arrivals(source: Source, batch: str) -> list[Arrival]:
    """Return what the run's reward models said of a batch before they were trained on it."""
    if source.plan is None:
        return []
    numbers = [item.round for item in source.plan.rounds if batch in item.batches]
    found = []
    for number in numbers:
        for axis in AXES:
            now, earlier = (
                run_dir(source.config) / f"round-{k:02d}" / f"reward-{axis}" / name
                for k, name in ((number, "accuracy_before.json"), (number - 1, "accuracy.json"))
            )
            if now.exists() and earlier.exists():
                level = source.config.evaluate.level
                found.append(Arrival(axis, read_json(now), read_json(earlier), level))
    return found


def _is_file(name: str, known: Sequence[str]) -> bool:
    """Tell a file from a batch's name; DataError when it is neither."""
    if name in known:
        return False
    if Path(name).is_file():
        return True
    raise DataError(
        f"{name} is neither a batch of the stream (there: {', '.join(known) or 'none'}) nor a file"
    )


def _profile(source: Source, name: str, known: Sequence[str], *, history: bool) -> Profile:
    """Return the profile of a batch, or of a file as it would be ingested.

    Without `history` a file is taken by itself: rows that repeat earlier batches stay.
    """
    if not _is_file(name, known):
        return source.profile(name)
    with tempfile.TemporaryDirectory(prefix="rlhf-drift-") as scratch:
        store = Store(Path(scratch), source.store.stream)
        if history:
            _lend(source.store, store)
        settings, data = source.config.ingest, source.config.data
        report = ingest_file(
            Path(name),
            store,
            kind=Kind.batch,
            id=settings.id,
            on_bad_row=settings.on_bad_row,
            axis=settings.axis,
            heldout_share=data.heldout_share,
            heldout_salt=data.heldout_salt,
            max_chars=settings.max_chars,
            is_safety_default=data.is_safety_default,
        )
        if not report.added:
            raise DataError(
                f"{name}: all its rows are in stream {source.store.stream} already; "
                "compare it as it is with against=BATCH"
            )
        return Source(source.config, store, None).profile(report.id)


def _lend(source: Store, scratch: Store) -> None:
    """Link a stream's batches into a scratch store, so that ingest sees what came before.

    Corrections and withdrawals come along: rows that they took away are nobody's original.
    """
    folder = source.folder / FOLDERS[Kind.batch]
    target = scratch.folder / FOLDERS[Kind.batch]
    target.mkdir(parents=True)
    for id in source.entries(Kind.batch):
        (target / id).symlink_to((folder / id).resolve(), target_is_directory=True)
    for name in ("stream.json", TOMBSTONES):
        if (source.folder / name).exists():
            (scratch.folder / name).symlink_to((source.folder / name).resolve())


def show_drift(reports: Sequence[Mapping[str, Any]], out: Console) -> None:
    """Print one table per report."""
    _widen(out)
    for report in reports:
        against = ", ".join(report["against"]) or "nothing: it is the first batch"
        title = f"{report['batch']} ({report['rows']} comparisons) against {against}"
        table = Table(
            Column("verdict", no_wrap=True),
            "what",
            Column("effect", justify="right"),
            Column("p", justify="right"),
            title=escape(title),
        )
        for line in report["lines"]:
            verdict, p_value, effect = line["verdict"], line["p_value"], line["effect"]
            shown = "" if p_value is None else "< 0.0001" if p_value < 1e-4 else f"{p_value:.4f}"
            table.add_row(
                f"[{COLOURS[verdict]}]{verdict}[/]",
                escape(line["text"]),
                "" if effect is None else f"{effect:.2f}",
                shown,
            )
        out.print(table)
        out.print(headline(report), markup=False, highlight=False)


def report_quality(config: Config, names: Sequence[str], *, by: str) -> dict[str, Any]:
    """Return how annotators or sources judged in some batches, by default in all of the stream."""
    if by not in BY:
        raise ConfigError(f"by={by} is unknown: choose one of {', '.join(BY)}")
    source = Source.of(config)
    batches = list(names) or source.store.ids(Kind.batch)
    if not batches:
        raise DataError(
            f"stream {source.store.stream!r} of {source.store.root} has no batch; add one with "
            "`rlhf ingest`"
        )
    scores = _scores(source)

    def rows() -> Iterator[dict[str, Any]]:
        for batch in batches:
            for row in verdict_rows(source.folder(batch)):
                found = scores.get((batch, row["id"]), (None, None))
                yield {**row, "chosen_score": found[0], "rejected_score": found[1]}

    return quality_report(rows(), by=by, level=config.evaluate.level)


def _scores(source: Source) -> dict[tuple[str, str], tuple[float, float]]:
    """Return the scores of comparisons that their reward model was not trained on, by batch and id.

    Scores on arrival come first, because they cover whole batches; held-out ones fill in.
    """
    found: dict[tuple[str, str], tuple[float, float]] = {}
    if source.plan is None:
        return found
    for name in ("scores.jsonl", "scores_before.jsonl"):
        for item in source.plan.rounds:
            for axis in AXES:
                node = NodeDir(
                    run_dir(source.config) / f"round-{item.round:02d}" / f"reward-{axis}"
                )
                for row in read_jsonl(node.path / name) if node.is_done() else []:
                    if row["axis"] == axis:
                        key = (row["batch"], row["id"])
                        found[key] = (row["chosen_score"], row["rejected_score"])
    return found


def show_quality(report: Mapping[str, Any], out: Console) -> None:
    """Print a row per annotator or source, then the flags."""
    _widen(out)
    short = ("sig.", "better", "slightly", "negl.", "ties", "longer preferred", "agreement")
    table = Table(Column(report["by"], overflow="fold"), title=f"quality by {report['by']}")
    for name in ("n", "prompts", *short):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        graded = sum(row["strengths"][name] for name in STRENGTHS)
        shares = [row["strengths"][name] / graded if graded else None for name in STRENGTHS]
        cells = ["" if share is None else f"{100 * share:.0f} %" for share in shares]
        rates = [_interval(row[key]) for key in ("longer_preferred", "agreement")]
        ties = f"{100 * row['ties']['mean']:.0f} %"
        table.add_row(escape(row["name"]), str(row["n"]), str(row["prompts"]), *cells, ties, *rates)
    out.print(table)
    if not report["rows"]:
        hint = "" if report["by"] == "source" else "; by=source compares the vendors"
        out.print(f"no comparison names its {report['by']}{hint}")
        return
    flagged = [(row["name"], flag) for row in report["rows"] for flag in row["flags"]]
    for name, flag in flagged:
        out.print(f"{name}: {flag}", markup=False, highlight=False)
    if not flagged:
        out.print("no flags")


def _interval(value: Mapping[str, Any]) -> str:
    if not value["n"]:
        return ""
    mean, low, high = (f"{100 * value[key]:.0f}" for key in ("mean", "low", "high"))
    return f"{mean} % ({low} to {high})"


def _widen(out: Console) -> None:
    if not out.is_terminal:
        out.width = max(out.width, MIN_WIDTH)
