"""Estimates as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from rlhf.progress import duration

NOTHING = "-"
PREFIXES = {1e24: "Y", 1e21: "Z", 1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k"}

Row = dict[str, Any]


def estimate_table(estimate: Row, *, title: str) -> Table:
    """Return what every node and all together are expected to take."""
    currency = estimate["assumptions"]["currency"]
    table = Table("node", title=title, caption=caption(estimate), caption_justify="left")
    for name in ("FLOPs", "device time", "kWh", "kg CO2", currency):
        table.add_column(name, justify="right", no_wrap=True)
    for row in estimate["nodes"]:
        table.add_row(row["node"], *cells(row))
    table.add_section()
    table.add_row("all", *cells(estimate["totals"]))
    return table


def cells(row: Row) -> list[str]:
    """Return the figures of a node or of the total."""
    hours = row["device_hours"]
    return [
        NOTHING if row["flops"] is None else scaled(row["flops"]),
        NOTHING if hours is None else duration(hours * 3600.0),
        *(significant(row[name]) for name in ("kwh", "co2_kg", "cost")),
    ]


def caption(estimate: Row) -> str:
    """Say on what the figures rest."""
    assumed: Row = estimate["assumptions"]
    lines = [f"{names}: {basis}" for basis, names in bases(estimate["nodes"])]
    lines.append(
        f"text at {assumed['characters_per_token']:g} characters a token; {assumed['responses']}; "
        f"CO2 at {assumed['kg_co2_per_kwh']:g} kg/kWh and PUE {assumed['pue']:g}"
    )
    if assumed["missing"]:
        kinds = ", ".join(assumed["missing"])
        lines.append(f"not in the store yet, so that work on it counts as nothing: {kinds}")
    if assumed["parameters"] is None:
        lines.append("the size of model.path is not known: give its folder or model.shape")
    return "\n".join(lines)


def bases(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return each basis once, with the stages that rest on it."""
    stages: dict[str, list[str]] = {}
    for row in rows:
        stages.setdefault(row["basis"], []).append(row["stage"])
    return [(basis, ", ".join(dict.fromkeys(names))) for basis, names in stages.items()]


def scaled(value: float) -> str:
    """Return a large number with three digits and its prefix, such as 8.41P."""
    for size, prefix in PREFIXES.items():
        if value >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def significant(value: float | None) -> str:
    """Return a number with three significant digits, a dash for None."""
    return NOTHING if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
