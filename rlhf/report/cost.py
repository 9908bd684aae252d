"""What a finished node took beside what was expected of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.algo.carbon import SECONDS_PER_HOUR
from rlhf.artifacts import read_json

ESTIMATE = "estimate.json"
NOTHING = "-"
COLUMNS = ("device h", "expected", "ratio", "Wh", "expected", "g CO2")

Row = dict[str, Any]


def read_estimates(run_dir: Path) -> dict[str, Row]:
    """Return the rows of a run's estimate.json by node; none for a run that started without it."""
    path = run_dir / ESTIMATE
    return {row["node"]: row for row in read_json(path)["nodes"]} if path.exists() else {}


def used(manifest: Mapping[str, Any]) -> Row:
    """Return what a node took in the units of its estimate; None where it was not recorded."""
    seconds, energy = manifest.get("device_seconds"), manifest.get("energy") or {}
    return {
        "device_hours": None if seconds is None else seconds / SECONDS_PER_HOUR,
        "kwh": energy.get("kwh"),
        "co2_kg": energy.get("co2_kg"),
    }


def cost_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of COLUMNS for a node's row with `used` and `estimate` (or None)."""
    actual, expected = row["used"], row["estimate"] or {"device_hours": None, "kwh": None}
    hours, expected_hours = actual["device_hours"], expected["device_hours"]
    is_known = hours is not None and bool(expected_hours)
    return [
        _number(hours, digits=4),
        _number(expected_hours, digits=4),
        _number(hours / expected_hours if is_known else None, digits=2),
        *(_number(_times_1000(value), digits=2) for value in (actual["kwh"], expected["kwh"])),
        _number(_times_1000(actual["co2_kg"]), digits=2),
    ]


def _times_1000(value: float | None) -> float | None:
    return None if value is None else 1000.0 * value


def _number(value: float | None, *, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"
