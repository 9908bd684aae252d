"""What a run will cost, node by node, before it starts; frozen into estimate.json when it does.

FLOPs follow from model size and text (rlhf/algo/flops.py). Device time follows from them by the
rate of finished nodes of the same stage and model size, else by an assumed share of the device's
peak. Energy, carbon and money follow from device time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.algo.carbon import SECONDS_PER_HOUR, co2_kg, device_kwh
from rlhf.algo.flops import ModelSize, expected_seconds, work_flops
from rlhf.artifacts import read_json, write_json
from rlhf.config import Config, RewardInit
from rlhf.cost.energy import device_watts
from rlhf.cost.peak import expected_peak, is_gpu
from rlhf.cost.rates import ESTIMATE, Rates, measured_rates
from rlhf.cost.sizes import folder_size, model_size
from rlhf.cost.tokens import CHARACTERS_PER_TOKEN, missing_kinds, read_supply, response_share
from rlhf.cost.work import BASE, Context, tasks
from rlhf.nodes import Node
from rlhf.plan import Plan
from rlhf.state import is_started

Row = dict[str, Any]
SUMS = ("flops", "device_hours", "kwh", "co2_kg", "cost")


def estimate(config: Config, plan: Plan, run_dir: Path) -> Row:
    """Return what every node of a plan will cost, the totals, and what it all assumes.

    A node that has started keeps what estimate.json said before; one that started without an
    estimate gets none. Without a known model size there are no nodes.
    """
    size = model_size(config.model)
    waiting = [node for node in plan.nodes if not is_started(run_dir / node.name)]
    unstarted = {node.name for node in waiting}
    found = {name: row for name, row in frozen_rows(run_dir).items() if name not in unstarted}
    if size is not None and waiting:
        sizes, supply = model_sizes(config, size), read_supply(config, plan, run_dir)
        rates = measured_rates(Path(config.paths.runs))
        for node in waiting:
            found[node.name] = _row(Context(config, plan, node, supply), sizes, rates)
    rows = [found[node.name] for node in plan.nodes if node.name in found]
    return {
        "nodes": rows,
        "totals": {name: _sum(rows, name) for name in SUMS},
        "assumptions": _assumptions(config, plan, run_dir, size),
    }


def freeze_estimate(config: Config, plan: Plan, run_dir: Path) -> None:
    """Write estimate.json where a node's estimate is new or has changed."""
    made, path = estimate(config, plan, run_dir), run_dir / ESTIMATE
    if not path.exists() or read_json(path)["nodes"] != made["nodes"]:
        write_json(path, made)


def frozen_rows(run_dir: Path) -> dict[str, Row]:
    """Return the rows of a run's estimate.json by node; none before its first start."""
    path = run_dir / ESTIMATE
    return {row["node"]: row for row in read_json(path)["nodes"]} if path.exists() else {}


def model_sizes(config: Config, base: ModelSize) -> Mapping[str, ModelSize]:
    """Return the sizes of the base model and of reward models from outside."""
    given: RewardInit = config.reward.path
    paths = {"helpfulness": given.helpfulness, "safety": given.safety}
    sizes = {axis: folder_size(Path(path)) for axis, path in paths.items() if path is not None}
    return {BASE: base, **{axis: size or base for axis, size in sizes.items()}}


def _row(context: Context, sizes: Mapping[str, ModelSize], rates: Rates) -> Row:
    config, node = context.config, context.node
    found = [
        (task.work.kind, work_flops(sizes.get(task.model, sizes[BASE]), task.work))
        for task in tasks(context)
    ]
    flops = sum(value for _, value in found)
    seconds, basis = _seconds(config, node, found, sizes[BASE].parameters, rates)
    hours = seconds / SECONDS_PER_HOUR
    has_gpu = is_gpu(config, node.stage)
    kwh = device_kwh(hours, watts=device_watts(config, has_gpu=has_gpu))
    price = config.cost.price_per_device_hour
    return {
        "node": node.name,
        "stage": node.stage,
        "round": node.round,
        "parameters": sizes[BASE].parameters,
        "flops": flops,
        "device_hours": hours,
        "kwh": kwh,
        "co2_kg": co2_kg(kwh, pue=config.cost.pue, kg_per_kwh=config.cost.kg_co2_per_kwh),
        "cost": None if price is None else hours * price,
        "basis": basis,
    }


def _seconds(
    config: Config, node: Node, found: Any, parameters: int, rates: Rates
) -> tuple[float, str]:
    """Return device-seconds and on what they rest."""
    measured = rates.of(config, node.stage, parameters)
    if measured is not None:
        rate, device = measured
        nodes = f"{rate.nodes} finished node{'s' if rate.nodes > 1 else ''}"
        text = f"measured: {rate.value:.3g} FLOP/s in {nodes} of this stage and size on {device}"
        return sum(value for _, value in found) / rate.value, text
    highest, source = expected_peak(config, node.stage)
    training, generation = config.cost.training_utilisation, config.cost.generation_utilisation
    seconds = expected_seconds(
        found,
        peak=highest,
        training_utilisation=training,
        generation_utilisation=generation,
    )
    text = (
        f"assumed: {training:g} of {highest:.3g} FLOP/s ({source}), {generation:g} while sampling"
    )
    return seconds, text


def _assumptions(config: Config, plan: Plan, run_dir: Path, size: ModelSize | None) -> Row:
    cost = config.cost
    return {
        "parameters": None if size is None else size.parameters,
        "characters_per_token": CHARACTERS_PER_TOKEN,
        "responses": response_share(config, plan, run_dir)[1],
        "missing": missing_kinds(config),
        "watts_per_gpu": cost.watts_per_gpu,
        "watts_per_core": cost.watts_per_core,
        "pue": cost.pue,
        "kg_co2_per_kwh": cost.kg_co2_per_kwh,
        "price_per_device_hour": cost.price_per_device_hour,
        "currency": cost.currency,
        "kwh": "at the device; PUE is in co2_kg only",
    }


def _sum(rows: list[Row], name: str) -> float | None:
    """Return a total, or None where a part is unknown or there are no rows."""
    values = [row[name] for row in rows]
    return None if not values or None in values else sum(values)
