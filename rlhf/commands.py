"""What each subcommand does with its checked configuration; every handler returns an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from rlhf import runner, serving
from rlhf.compose import RUN_FILE, known_runs, run_dir
from rlhf.config import Config, LauncherKind
from rlhf.cost.estimate import estimate
from rlhf.cost.show import estimate_table
from rlhf.errors import STOPPED_EXIT, ConfigError
from rlhf.fingerprint import (
    PLAN_GROUPS,
    STAGES,
    differences,
    effects,
    flat_config,
    read_flat,
)
from rlhf.launch import operator
from rlhf.launch.conclude import conclude
from rlhf.launch.failures import remedy
from rlhf.launch.local import PLAN
from rlhf.launch.ranks import MACHINE, is_rank, needs_srun, run_machines, run_node
from rlhf.lease import current_job
from rlhf.operate import changed_files, clean_run, export_version
from rlhf.plan import Plan, waiting_batches
from rlhf.processes import STOP
from rlhf.progress import duration, show_work
from rlhf.state import log_tail, node_state
from rlhf.versions import current_version, list_versions, overrule, write_versions
from rlhf.worker import process_environment

SILENT_SECONDS = 120.0
"""A running node that reports no step for longer is shown as silent: it may hang."""

NOT_OF_NODES = ("ingest.", "service.", "recipe")
"""Settings that no node reads."""

COLOURS = {"done": "green", "running": "cyan", "stopped": "yellow", "waiting": "dim"}


def console() -> Console:
    """Return a console for standard output."""
    return Console(soft_wrap=True)


def run(config: Config) -> int:
    out = console()
    prepared = runner.run(config, out)
    folder = prepared.folder
    if prepared.todo or not (folder / "report.json").exists():
        report(config)
    version = current_version(list_versions(config, prepared.plan, folder), folder)
    out.print(f"promoted: {version.name} in {version.path}", highlight=False)
    out.print(f"results: {folder} (report.html, report.json, versions.json, a folder per node)")
    return 0


def stage(config: Config, node: str) -> int:
    folder = run_dir(config)
    plan = frozen_plan(config)
    plan.node(node)
    effect = effects()
    changed = [
        text
        for text in differences(read_flat(folder / RUN_FILE), flat_config(config))
        if effect.get(text.partition(":")[0]) == "result"
        and text.partition(".")[0] not in PLAN_GROUPS
    ]
    if changed:
        raise ConfigError(
            f"stage runs the frozen plan of run={config.run} and takes only settings that do not "
            f"change results ({'; '.join(changed)}): leave them out, or use rlhf run"
        )
    environment = process_environment(config)
    if any(os.environ.get(name) != value for name, value in environment.items()):
        arguments = [sys.executable, "-m", "rlhf.cli", *_stage_arguments(config, node)]
        STOP.pause()
        os.execve(sys.executable, arguments, {**os.environ, **environment})
    out = Console(file=os.fdopen(os.dup(1), "w"), soft_wrap=True)
    resources = config.resources.of(plan.node(node).stage)
    if needs_srun(resources, os.environ):
        arguments = [sys.executable, "-m", "rlhf.cli", *_stage_arguments(config, node)]
        code = run_machines(arguments, resources)
    else:
        in_job = bool(current_job()[0])
        code = run_node(config, plan, folder, node, stages=STAGES, supervise=in_job)
    if is_rank(os.environ) or MACHINE in os.environ:
        return code
    if code == 0:
        write_versions(config, plan, folder)
        out.print(f"{node} is done in {folder / node}")
        return 0
    if code == STOPPED_EXIT:
        out.print(f"{node} saved its state and stopped on request")
    else:
        out.print(runner.failure(config, plan.node(node), folder, code), markup=False)
    return conclude(config, folder / node, code)


def launch(config: Config, *, dry_run: str, detach: str) -> int:
    out = console()
    kind = config.launcher.kind
    is_detached = _flag("detach", detach)
    if _flag("dry_run", dry_run):
        drafted, _ = runner.draft(config)
        nodes = runner.within_limit(config, drafted)
        operator.show_jobs(config, nodes, run_dir(config), out)
        return 0
    needs_follower = config.launcher.follow
    if kind is not LauncherKind.local:
        scheduler = operator.open_launcher(config)
        # Without an answer nothing is written.
        scheduler.poll()
        needs_follower |= not scheduler.orders_jobs
    prepared = runner.prepare(config, out)
    write_versions(config, prepared.plan, prepared.folder)
    nodes = runner.within_limit(config, prepared.plan)
    if kind is LauncherKind.local:
        operator.launch_here(config, prepared.folder, out)
    elif is_detached and needs_follower:
        operator.follow_here(config, prepared.folder, out)
    else:
        operator.launch_jobs(config, nodes, prepared.folder, out)
    return 0


def cancel(config: Config, *, node: str) -> int:
    if node:
        frozen_plan(config).node(node)
    operator.cancel_jobs(config, run_dir(config), console(), node=node)
    return 0


def _stage_arguments(config: Config, node: str) -> list[str]:
    """Return a command line that gives the same execution-only settings in the new process."""
    frozen = read_flat(run_dir(config) / RUN_FILE)
    current = flat_config(config)
    changed = [
        f"{key}={'null' if value is None else value}"
        for key, value in current.items()
        if frozen.get(key) != value and not key.startswith(NOT_OF_NODES)
    ]
    fixed = [f"run={config.run}", f"paths.runs={config.paths.runs}"]
    return ["stage", node, *fixed, *(text for text in changed if text not in fixed)]


def plan(config: Config) -> int:
    drafted, listing = runner.draft(config)
    folder = run_dir(config)
    table = Table("node", "after", "reads", "state", title=f"plan of run {config.run}")
    for node in runner.within_limit(config, drafted):
        reads = ", ".join(f"{role}={symbol}" for role, symbol in node.inputs.items())
        state = node_state(folder, node).state
        table.add_row(node.name, ", ".join(node.after), reads, _coloured(state))
    out = console()
    out.print(table)
    costs = estimate(config, drafted, folder)
    out.print(estimate_table(costs, title=f"estimate of run {config.run}"), highlight=False)
    for item in drafted.rounds:
        rows = f", corrections and withdrawals up to {item.as_of}" if item.as_of else ""
        out.print(f"round {item.round}: {item.stage}, batches {', '.join(item.batches)}{rows}")
    left = waiting_batches(drafted, listing)
    if left:
        out.print(f"batches without a round yet: {', '.join(left)}")
    return 0


def status(config: Config, *, verify: str) -> int:
    drafted, folder, out = frozen_plan(config), run_dir(config), console()
    jobs = operator.known_jobs(config, out)
    title = f"run {config.run} in {folder}"
    table = Table(
        Column("node", no_wrap=True), "state", "step", "time", "left", "peak", title=title
    )
    if jobs:
        table.add_column("job", overflow="fold")
    ended: dict[str, str] = {}
    for node in drafted.nodes:
        state, job = node_state(folder, node), jobs.get(node.name)
        step = f"{state.step}/{state.total}" if state.total else ""
        spent = duration(state.seconds) if state.seconds else ""
        left = duration(state.eta) if state.eta is not None else ""
        silent = state.silent is not None and state.silent > SILENT_SECONDS
        shown = _coloured(state.state) + (f", no step for {duration(state.silent)}" * silent)
        peak = f"{state.peak_memory_mb:.0f} MB" if state.peak_memory_mb else ""
        cells = [node.name, shown, step, spent, left, peak]
        table.add_row(*cells, *([operator.describe_job(job)] if jobs else []))
        failure = operator.failure_of(folder / node.name, job)
        is_over = state.state in ("stopped", "waiting") and not (job and job.is_alive)
        if is_over and (failure or state.state == "stopped"):
            ended[node.name] = failure
    out.print(table)
    for version in list_versions(config, drafted, folder):
        out.print(f"{version.name}: {version.state} {version.overruled}".rstrip())
    _show_ended(drafted, folder, ended, out)
    if _flag("verify", verify):
        checked, changed = changed_files(drafted, folder)
        out.print(f"{checked} files checked by sha256; changed: {', '.join(changed) or 'none'}")
        return 1 if changed else 0
    return 0


def _show_ended(plan: Plan, folder: Path, ended: Mapping[str, str], out: Console) -> None:
    """Print how nodes ended that are not done: the kind of failure, the last lines, the remedy."""
    logs = {name: log_tail(folder / name) for name in ended}
    for failure in dict.fromkeys(ended.values()):
        names = [name for name in ended if ended[name] == failure and not logs[name]]
        if names and failure:
            advice = remedy(failure, plan.node(names[0]).stage)
            out.print(f"never started ({failure}; {advice}): {', '.join(names)}")
    for name, failure in ended.items():
        if not logs[name]:
            continue
        if failure:
            out.print(f"[red]{name}: {failure}[/red]; {remedy(failure, plan.node(name).stage)}")
        out.print(f"the end of {folder / name / 'log.txt'}:")
        out.print("\n".join(logs[name]), markup=False, highlight=False)


def ingest(config: Config, *files: str) -> int:
    # With NumPy and scipy, which other commands need not wait for.
    from rlhf.data.corrections import withdraw
    from rlhf.intake import add_file, chosen_kind, drift_line, target_store
    from rlhf.usage import show_usage, show_withdrawal

    settings = config.ingest
    kind = chosen_kind(config)
    for key in ("id", "supersedes"):
        value = getattr(settings, key)
        if value is not None and len(files) > 1:
            raise ConfigError(f"ingest.{key}={value} names {len(files)} files: give one file")
    store = target_store(config)
    if settings.retract is not None:
        if files or settings.supersedes is not None:
            raise ConfigError(
                f"ingest.retract={settings.retract} withdraws rows and adds none: leave out the "
                "files and ingest.supersedes, and ingest them by another call"
            )
        stone = withdraw(store, Path(settings.retract), reason=settings.reason, kind=kind)
        show_withdrawal(config, store, stone, console())
        return 0
    out = console()
    for file in files:
        with show_work(out) as progress:
            ingested = add_file(config, Path(file), progress=progress)
        out.print(ingested.message, markup=False)
        if settings.supersedes is not None and ingested.added:
            stone = next(s for s in store.tombstones() if s.by == ingested.id)
            show_usage(config, store, stone, out)
        line = drift_line(config, ingested)
        if line:
            out.print(line, markup=False, highlight=False)
    return 0


def drift(config: Config, *names: str, against: str) -> int:
    from rlhf import datacheck

    others = [name for name in against.split(",") if name]
    datacheck.show_drift(datacheck.report_drift(config, names, against=others), console())
    return 0


def quality(config: Config, *batches: str, by: str) -> int:
    from rlhf import datacheck

    datacheck.show_quality(datacheck.report_quality(config, batches, by=by), console())
    return 0


def report(config: Config, *runs: str) -> int:
    from rlhf.report.write import write_comparison, write_report

    if not runs:
        frozen_plan(config)
        write_report(run_dir(config), console(), store=Path(config.paths.store))
        return 0
    if len(runs) > 2:
        raise ConfigError(f"report compares two runs, not {len(runs)}: name one or two of them")
    found = [_run_folder(config, name) for name in runs]
    if len(found) == 1:
        write_report(found[0], console())
    else:
        write_comparison(found, console())
    return 0


def _run_folder(config: Config, name: str) -> Path:
    """Return the folder of a run that is given by its name or its folder."""
    for folder in (Path(config.paths.runs) / name, Path(name)):
        if (folder / PLAN).is_file():
            return folder
    known = ", ".join(known_runs(Path(config.paths.runs))) or "none"
    raise ConfigError(
        f"{name} is neither a run in paths.runs={config.paths.runs} (there: {known}) nor the "
        "folder of one: give a name, or a folder that holds plan.json"
    )


def promote(config: Config, version: str, *, reason: str) -> int:
    drafted = frozen_plan(config)
    last = overrule(config, drafted, run_dir(config), version=version, reason=reason)
    console().print(f"{version} counts as promoted after round {last}: {reason}", markup=False)
    return 0


def export(config: Config, version: str, directory: str) -> int:
    target = Path(directory)
    export_version(config, frozen_plan(config), run_dir(config), version=version, target=target)
    console().print(f"exported {version} of run {config.run} to {target}")
    return 0


def clean(config: Config) -> int:
    freed = clean_run(config, frozen_plan(config), run_dir(config))
    for name, size in freed:
        console().print(f"deleted {name} ({size / 2**20:.1f} MiB)", highlight=False)
    total = sum(size for _, size in freed)
    console().print(f"freed {total / 2**20:.1f} MiB; promoted versions, pools and manifests stay")
    return 0


def doctor(config: Config) -> int:
    from rlhf.doctor import examine

    return examine(config, console())


def frozen_plan(config: Config) -> Plan:
    """Return the plan of a run that has started; raises ConfigError for one that has not."""
    found = runner.read_plan(run_dir(config))
    if found is None:
        known = known_runs(Path(config.paths.runs))
        raise ConfigError(
            f"run={config.run} has not started in paths.runs={config.paths.runs} "
            f"(runs there: {', '.join(known) or 'none'}): start it with `rlhf run recipe=NAME`"
        )
    return found


def _coloured(state: str) -> str:
    return f"[{COLOURS[state]}]{state}[/]"


def _flag(key: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ConfigError(f"{key}={value} is not true or false: write {key}=true")
    return value.lower() == "true"


HANDLERS: Mapping[str, Callable[..., Any]] = {
    "run": run,
    "launch": launch,
    "cancel": cancel,
    "stage": stage,
    "plan": plan,
    "status": status,
    "ingest": ingest,
    "drift": drift,
    "quality": quality,
    "report": report,
    "promote": promote,
    "export": export,
    "clean": clean,
    "doctor": doctor,
    "serve": serving.serve,
    "token": serving.token,
}
