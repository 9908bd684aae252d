"""What a person sees while nodes run: one live line on a terminal, one plain line elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rlhf.state import read_progress


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
def follow(console: Console, folder: Path, title: str) -> Iterator[Callable[[], None]]:
    """Show a node's progress; call what it gives now and then while the node runs."""
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[steps]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None, steps="", eta="")

        def update() -> None:
            seen = read_progress(folder)
            if seen["total"]:
                bar.update(
                    task,
                    completed=seen["step"],
                    total=seen["total"],
                    steps=f"{seen['step']}/{seen['total']}",
                    eta=f"left {duration(seen['eta'])}",
                )

        yield update
