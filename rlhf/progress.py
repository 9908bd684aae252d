"""What a person sees while nodes run: a live line per running node on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from rlhf.state import read_progress

if TYPE_CHECKING:
    from rich.progress import TaskID


def duration(seconds: float | None) -> str:
    """Return seconds as a short text, such as 1h02m, 3m05s or 4.2s."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


@contextmanager
def follow(console: Console, run_folder: Path) -> Iterator[Callable[[Sequence[str]], None]]:
    """Show progress; call what it gives now and then with the names of the running nodes."""
    if not console.is_terminal:
        yield lambda names: None
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[steps]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def update(names: Sequence[str]) -> None:
            for name in set(tasks) - set(names):
                bar.remove_task(tasks.pop(name))
            for name in names:
                if name not in tasks:
                    tasks[name] = bar.add_task(name, total=None, steps="", eta="")
                seen = read_progress(run_folder / name)
                if seen["total"]:
                    bar.update(
                        tasks[name],
                        completed=seen["step"],
                        total=seen["total"],
                        steps=f"{seen['step']}/{seen['total']}",
                        eta=f"left {duration(seen['eta'])}",
                    )

        yield update


@contextmanager
def show_work(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show long work in this process; call what it gives with what, how much is done, and of what.

    A new `what` takes the place of the one before. Nothing is shown where there is no terminal.
    """
    if not console.is_terminal:
        yield lambda what, done, total: None
        return
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        shown: list[tuple[str, TaskID]] = []

        def update(what: str, done: int, total: int) -> None:
            if not shown or shown[-1][0] != what:
                for _, task in shown:
                    bar.remove_task(task)
                shown[:] = [(what, bar.add_task(what, total=total))]
            bar.update(shown[-1][1], completed=done, total=total)

        yield update
