"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suites import UNITS

LOADED = "*"
ONE_UNIT = ("ppo", "startup", "quickstart")
"""Suites whose round is one unit, so that seconds say more than rates."""


def page(result: Mapping[str, Any]) -> str:
    """Return the whole page."""
    parts = [f"# Benchmarks of {result['date']}\n", _machine(result)]
    parts += [section(suite) for suite in result["suites"]]
    parts += [growth(result["growth"])] if result.get("growth") else []
    return "\n".join(parts)


def section(suite: Mapping[str, Any]) -> str:
    """Return a suite's heading, targets and contenders."""
    lines = [f"## {suite['suite']}, {suite['precision']}", ""]
    sizes = ", ".join(f"{name} {value}" for name, value in suite["sizes"].items())
    lines += [f"Work: {sizes or 'one call'}. Rate: {UNITS[suite['suite']]}.", ""]
    lines += [_target(target) for target in suite["targets"]]
    lines += [_bound(bound) for bound in suite.get("bounds", [])]
    if suite.get("check"):
        lines.append(_check(suite["check"]))
    if lines[-1]:
        lines.append("")
    what = "seconds" if suite["suite"] in ONE_UNIT else "rate"
    lines += [
        f"| contender | settings | median seconds | median {what} (range) | {what} of every round "
        "| MFU | of limit | memory, MB | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(entry, what) for entry in suite["contenders"])]) + "\n"


def growth(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the exponents of cost."""
    lines = [
        "## growth",
        "",
        "Seconds = c x size ^ exponent, by least squares on logarithms; FLOPs are counted, not "
        "measured.",
        "",
        "| size | values | seconds, medians | exponent | of the FLOPs | last two | of the FLOPs | "
        "no worse |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        values = ", ".join(map(str, row["values"]))
        seconds = ", ".join(number(value) for value in row["seconds"])
        exponents = " | ".join(
            f"{row[key]:.2f}"
            for key in ("exponent", "flops_exponent", "last_exponent", "last_flops_exponent")
        )
        verdict = "yes" if row["within"] else "NO"
        lines.append(f"| {row['axis']} | {values} | {seconds} | {exponents} | {verdict} |")
    return "\n".join(lines) + "\n"


def without_folders(value: Any) -> Any:
    """Return a JSON value whose absolute paths are names: where things lie concerns nobody else."""
    if isinstance(value, str):
        name, equals, path = value.partition("=")
        if equals and path.startswith("/"):
            return f"{name}={Path(path).name}"
        return Path(value).name if value.startswith("/") else value
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    return value


def number(value: float) -> str:
    """Return a number with three significant digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _machine(result: Mapping[str, Any]) -> str:
    machine, quiet = result["machine"], result["quiet"]
    dirty = " with uncommitted changes" if result["is_dirty"] else ""
    tuned = ", ".join(f"`{name}={value}`" for name, value in sorted(result["tuned"].items()))
    return "\n".join(
        [
            f"- Commit {result['commit']}{dirty}; command `{result['command']}`.",
            f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
            f"AVX-512 {'yes' if machine['avx512'] else 'no'}, bf16 in hardware: "
            f"{', '.join(machine['fast_bf16']) or 'no'}; {machine['system']}, Python "
            f"{machine['python']}.",
            f"- Model {result['model']}, text {result['text']}.",
            f"- {result['rounds']} rounds, interleaved. {LOADED} marks an attempt during which "
            f"others took more than {quiet['max_share']:.0%} of the cores: it was repeated, "
            f"{quiet['repeats']} times at most, and the first quiet one, or else the quietest, "
            "counts. Every attempt is listed.",
            f"- Tuned contenders get what our nodes get: {tuned}. The others get none of it.",
            "",
        ]
    )


def _target(target: Mapping[str, Any]) -> str:
    aim = f"{target['library']}, {target['kind']}"
    if target["reached"] is None:
        return f"- Against {aim}: no figure; the aim is {target['factor']:g}x."
    sign = "at least " if target["is_bound"] else ""
    verdict = "reached" if target["reached"] >= target["factor"] else "NOT reached"
    return (
        f"- Against {aim} ({target['against']}): {sign}{target['reached']:.2f}x; the aim of "
        f"{target['factor']:g}x is {verdict}."
    )


def _bound(bound: Mapping[str, Any]) -> str:
    verdict = "yes" if bound["seconds"] <= bound["most"] else "NO"
    return f"- `{bound['name']}`: {bound['seconds']:.2f} s, at most {bound['most']:g} s: {verdict}."


def _check(check: Mapping[str, Any]) -> str:
    if "problem" in check:
        return f"- Loss after {check['steps']} steps: {check['problem']}."
    verdict = "within" if check["is_within"] else "NOT within"
    return (
        f"- Loss on rows never trained on, after {check['steps']} steps: ours {check['ours']:.5f}, "
        f"a plain loop {check['plain']:.5f}, {check['difference']:.3%} apart, {verdict} "
        f"{check['share']:.0%}; untrained {check['start']:.5f}."
    )


def _row(entry: Mapping[str, Any], what: str) -> str:
    settings = ", ".join(filter(None, [entry["note"], "tuned" if entry["tuned"] else "untuned"]))
    attempts = " ".join(
        number(attempt["seconds"] if what == "seconds" else attempt["units"] / attempt["seconds"])
        + (LOADED if attempt["loaded"] else "")
        for attempt in entry["attempts"]
    )
    if not attempts:
        return f"| {entry['name']} | {settings} | {entry['problem']} | | | | | | |"
    shown = entry[what]
    cells = [
        entry["name"],
        settings,
        number(entry["seconds"]["median"]),
        f"{number(shown['median'])} ({number(shown['low'])} to {number(shown['high'])})",
        attempts + (f"; then {entry['problem']}" if entry["problem"] else ""),
        _share(entry["mfu"]),
        _share(entry["limit_share"]),
        f"{entry['peak_memory_mb']:,.0f}" if entry["peak_memory_mb"] else "",
        f"{entry['loss']:.5f}" if entry["loss"] is not None else "",
    ]
    return f"| {' | '.join(cells)} |"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
