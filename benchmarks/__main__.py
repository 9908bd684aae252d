"""Our stages and other libraries side by side on the same work.

    python -m benchmarks generation sft --folder DIR --model PATH --data DIR

writes a dated Markdown page and the same as JSON into docs/benchmarks. Without --model the tiny toy
model, without --data the toy world's text.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from argparse import BooleanOptionalAction
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.environments import PACKAGES, ROOT, forget_callers_settings, node_settings
from benchmarks.growth import grow
from benchmarks.play import Settings, Stage, play, profile
from benchmarks.rounds import Quiet
from benchmarks.suites import REFERENCE, SIZES, Entry, entries, quickstart, startup
from benchmarks.table import page, without_folders
from benchmarks.workload import Material, prepare

log = logging.getLogger(__name__)

MAX_LENGTH = {True: 1024, False: 256}
"""Longest prompt and response in tokens: of a given model, and of the toy's."""
MEASURED_ROWS = 16


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help=", ".join(SIZES))
    add("--folder", type=Path, required=True, help="environments, models and logs")
    add("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="where the page goes")
    add("--name", default="", help="added to the page's name")
    add("--model", type=Path, help="folder of a Llama with its tokenizer")
    add("--data", type=Path, help="folder with prompts/, sft/ and weekly/")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--precision", nargs="*", choices=["fp32", "bf16"], help="default: bf16 where it pays")
    add("--contender", nargs="*", default=[], help="play only these")
    add("--size", nargs="*", default=[], metavar="SUITE.KEY=VALUE")
    add("--environment", nargs="*", default=[], metavar="NAME=DIR", help=", ".join(PACKAGES))
    add("--limit-seconds", type=float, default=300.0, help="bound of one round")
    add("--check-seconds", type=float, default=3600.0, help="bound of the training compared")
    add("--max-load", type=float, default=Quiet().max_share, help="others' share of the cores")
    add("--repeats", type=int, default=Quiet().repeats, help="further attempts at a loaded round")
    add("--wait-seconds", type=float, default=Quiet().wait_seconds, help="for a quiet machine")
    add("--trim", action=BooleanOptionalAction, default=True, help="free memory after each turn")
    add("--baseline-commit", help="what quickstart is compared with")
    add("--quickstart-rounds", type=int, default=1)
    add("--quickstart-override", nargs="*", default=[], metavar="KEY=VALUE")
    add("--profile", nargs="*", default=[], metavar="SUITE", help="profile these instead")
    found = parser.parse_args(arguments)
    found.arguments = arguments
    unknown = {*found.suites, *found.profile} - {*SIZES}
    if unknown or not (found.suites or found.profile):
        parser.error(f"name suites out of {', '.join(SIZES)}, not {sorted(unknown)}")
    if "quickstart" in found.suites and not found.baseline_commit:
        parser.error("quickstart needs --baseline-commit")
    return found


def sizes_of(changes: list[str]) -> dict[str, dict[str, Any]]:
    """Return all sizes with the changes applied; SystemExit for one that does not exist."""
    sizes = {suite: dict(values) for suite, values in SIZES.items()}
    for change in changes:
        name, _, value = change.partition("=")
        suite, _, key = name.partition(".")
        if key not in sizes.get(suite, {}):
            raise SystemExit(f"--size {change}: there is no {name}")
        sizes[suite][key] = type(sizes[suite][key])(value)
    return sizes


def rows_needed(sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return how many rows of each kind the suites need."""
    steps = {name: max(sizes[name]["steps"], sizes[name]["check_steps"]) for name in REFERENCE}
    prompts = (sizes[name]["prompts"] for name in ("generation", "ppo", "growth"))
    return {
        "prompts": max(*prompts, 16),
        "chats": max(steps["sft"] * sizes["sft"]["batch_size"], 16),
        "pairs": steps["reward"] * sizes["reward"]["batch_size"],
        "measured": MEASURED_ROWS,
    }


def describe(given: argparse.Namespace, *, text: str) -> dict[str, Any]:
    """Return what the page says before the figures."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": _git("rev-parse", "HEAD"),
        "is_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join(["python", "-m", "benchmarks", *without_folders(given.arguments)]),
        "machine": machine.describe(),
        "model": str(given.model or "toy"),
        "text": text,
        "rounds": given.rounds,
        "threads": given.threads,
        "quiet": {"max_share": given.max_load, "repeats": given.repeats},
        "tuned": node_settings(given.threads),
        "suites": [],
        "growth": [],
    }


def settings_of(given: argparse.Namespace, folder: Path) -> Settings:
    """Return how to measure."""
    return Settings(
        folder=folder,
        environments=_named(given.environment),
        threads=given.threads,
        rounds=given.rounds,
        quiet=Quiet(given.max_load, given.repeats, given.wait_seconds),
        limit_seconds=given.limit_seconds,
        check_seconds=given.check_seconds,
        trim=given.trim,
        max_length=MAX_LENGTH[given.model is not None],
        only=given.contender,
    )


def main(arguments: list[str]) -> None:
    """Measure what was asked for; the page is written anew after every suite."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # The contenders' processes are ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    given = parse(arguments)
    forget_callers_settings()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = sizes_of(given.size)
    material = prepare(folder, model=given.model, data=given.data, counts=rows_needed(sizes))
    how = settings_of(given, folder)
    result = describe(given, text=material.work.text)
    has_bf16 = result["machine"]["fast_bf16"]
    precisions = given.precision or (["fp32", "bf16"] if has_bf16 else ["fp32"])
    given.out.mkdir(parents=True, exist_ok=True)
    stem = f"{result['date'][:10]}{'-' if given.name else ''}{given.name}"

    def stage(suite: str, precision: str, who: Sequence[Entry] | None = None) -> Stage:
        chosen = entries(suite, precision) if who is None else who
        return Stage(suite, precision, chosen, sizes=sizes[suite], settings=how, material=material)

    for suite in given.profile:
        for precision in precisions:
            path = given.out / f"{stem}-profile-{suite}-{precision}.txt"
            path.write_text(profile(stage(suite, precision)), encoding="utf-8")
            log.info("the profile is written to %s", path)
    for suite in given.suites:
        if suite == "growth":
            result["growth"] = grow({name: stage(name, "fp32") for name in ("growth", "sft")})
        elif suite == "startup":
            result["suites"].append(play(stage(suite, "fp32", startup())))
        elif suite == "quickstart":
            result["suites"].append(_quickstart(given, how, material))
        else:
            result["suites"] += [play(stage(suite, precision)) for precision in precisions]
        shown = without_folders(result)
        (given.out / f"{stem}.json").write_text(json.dumps(shown, indent=1) + "\n")
        (given.out / f"{stem}.md").write_text(page(shown), encoding="utf-8")
        log.info("%s is written to %s", suite, given.out / f"{stem}.md")


def _quickstart(given: argparse.Namespace, how: Settings, material: Material) -> dict[str, Any]:
    """Time the whole quickstart of this commit and of an earlier one, each checked out anew."""
    how = replace(how, rounds=given.quickstart_rounds, limit_seconds=max(how.limit_seconds, 3600.0))
    with ExitStack() as stack:
        checkouts = {}
        for name, commit in (("quickstart", "HEAD"), ("quickstart before", given.baseline_commit)):
            where = how.folder / "checkouts" / name.replace(" ", "-")
            _git("worktree", "add", "--force", "--detach", str(where), commit)
            stack.callback(_git, "worktree", "remove", "--force", str(where))
            checkouts[name] = str(where)
        stage = Stage(
            "quickstart",
            "fp32",
            quickstart(checkouts, given.quickstart_override),
            sizes={"baseline": _git("rev-parse", given.baseline_commit)},
            settings=how,
            material=material,
        )
        return play(stage)


def _named(pairs: Sequence[str]) -> dict[str, Path]:
    return {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main(sys.argv[1:])
