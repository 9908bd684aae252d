"""Estimate beside actual in the report."""

from __future__ import annotations

from rlhf.report.cost import COLUMNS, cost_cells, used

MANIFEST = {
    "device_seconds": 1800.0,
    "energy": {"kwh": 0.02, "method": "estimated", "source": "x", "co2_kg": 0.00847},
}
ESTIMATE = {"device_hours": 0.25, "kwh": 0.01}


def test_actual_and_estimate_stand_side_by_side() -> None:
    row = {"used": used(MANIFEST), "estimate": ESTIMATE}
    # Half an hour where a quarter was expected.
    assert cost_cells(row) == ["0.5000", "0.2500", "2.00", "20.00", "10.00", "8.47"]
    assert len(COLUMNS) == 6


def test_what_was_not_recorded_is_a_dash() -> None:
    older = {"used": used({"wall_seconds": 3.0, "energy_kwh": None}), "estimate": None}
    assert older["used"] == {"device_hours": None, "kwh": None, "co2_kg": None}
    assert cost_cells(older) == ["-"] * 6
    without = {"used": used(MANIFEST), "estimate": None}
    assert cost_cells(without) == ["0.5000", "-", "-", "20.00", "-", "8.47"]
    nothing_planned = {"used": used(MANIFEST), "estimate": {"device_hours": 0.0, "kwh": 0.0}}
    assert cost_cells(nothing_planned)[2] == "-"
