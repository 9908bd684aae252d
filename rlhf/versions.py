"""Versions of a run: which node made each one, and which one counts as promoted after a round."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.artifacts import NodeDir, read_json, write_json
from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.plan import Plan, node_name

VERSIONS = "versions.json"
OVERRULES = "overrules.json"
INPUTS = "inputs.json"


@dataclass(frozen=True, slots=True)
class Version:
    """A version: `state` is promoted, refused, or pending until its evaluation is done."""

    name: str
    node: str
    path: str
    state: str
    digest: str
    against: str
    reasons: list[dict[str, Any]]
    overruled: str

    def to_json(self) -> dict[str, Any]:
        """Return the row as it is written to versions.json."""
        return {name: getattr(self, name) for name in self.__slots__}


def read_overrules(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return round to the operator's choice: {version, reason, time}."""
    path = run_dir / OVERRULES
    found: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
    return found


def forget_overrules(run_dir: Path, *, from_round: int) -> None:
    """Drop an operator's choices that belong to evaluations which are run again."""
    overrules = read_overrules(run_dir)
    kept = {k: choice for k, choice in overrules.items() if int(k) < from_round}
    if kept != overrules:
        write_json(run_dir / OVERRULES, kept)


def promoted_version(run_dir: Path, round_: int) -> str:
    """Return the name of the version that counts as promoted after a round.

    Raises ArtifactError when an evaluation that decides it is not done: the newest one, and those
    before it as long as each refused its version.
    """
    overrules = read_overrules(run_dir)
    for k in range(round_, 0, -1):
        folder = NodeDir(run_dir / node_name(k, "evaluate"))
        folder.manifest()
        if str(k) in overrules:
            return str(overrules[str(k)]["version"])
        if read_json(folder.path / "decision.json")["promoted"]:
            return f"v{k}"
    return "v0"


def list_versions(config: Config, plan: Plan, run_dir: Path) -> list[Version]:
    """Return every version that exists, oldest first."""
    overrules = read_overrules(run_dir)
    versions = []
    evaluated = True
    for k in range(len(plan.rounds) + 1):
        node = plan.improves(k)
        folder = NodeDir(run_dir / node) if node else None
        if folder is not None and not folder.is_done():
            break
        path = str(folder.model) if folder is not None else config.model.path
        digest = folder.manifest()["digest"] if folder is not None else ""
        state = "promoted" if k == 0 else "pending"
        against, overruled = "", ""
        reasons: list[dict[str, Any]] = []
        evaluate = NodeDir(run_dir / node_name(k, "evaluate"))
        evaluated = evaluated and (k == 0 or evaluate.is_done())
        if k > 0 and evaluated:
            decision = read_json(evaluate.path / "decision.json")
            state = "promoted" if decision["promoted"] else "refused"
            reasons = list(decision["reasons"])
            against = promoted_version(run_dir, k - 1)
            if str(k) in overrules:
                choice = overrules[str(k)]
                state = "promoted" if choice["version"] == f"v{k}" else "refused"
                overruled = choice["reason"]
        versions.append(Version(f"v{k}", node, path, state, digest, against, reasons, overruled))
    return versions


def write_versions(config: Config, plan: Plan, run_dir: Path) -> list[Version]:
    """Bring versions.json up to date."""
    versions = list_versions(config, plan, run_dir)
    write_json(run_dir / VERSIONS, [version.to_json() for version in versions])
    return versions


def current_version(versions: list[Version], run_dir: Path) -> Version:
    """Return the version that counts now: promoted after the last evaluated round."""
    rounds = [k for k, version in enumerate(versions) if k > 0 and version.state != "pending"]
    name = promoted_version(run_dir, rounds[-1] if rounds else 0)
    return next(version for version in versions if version.name == name)


def overrule(config: Config, plan: Plan, run_dir: Path, *, version: str, reason: str) -> int:
    """Make a version count as promoted after the last evaluated round; returns that round.

    Raises ConfigError without a reason, for a version that does not exist or is not evaluated, and
    once a node of the next round has started.
    """
    if not reason.strip():
        raise ConfigError(f'promote {version} needs a reason: add reason="why" (it is recorded)')
    versions = list_versions(config, plan, run_dir)
    known = [item.name for item in versions if item.state != "pending"]
    if version not in known:
        raise ConfigError(
            f"version {version} is not an evaluated version of run={config.run}: "
            f"choose one of {', '.join(known) or '(none yet)'}"
        )
    last = len(known) - 1
    if last == 0:
        raise ConfigError(
            f"run={config.run} has no evaluated round yet: finish one with `rlhf run`"
        )
    started = [
        node.name
        for node in plan.nodes
        if node.round > last and (run_dir / node.name / INPUTS).exists()
    ]
    if started:
        raise ConfigError(
            f"promote {version} comes too late: {started[0]} has started from "
            f"{promoted_version(run_dir, last)}; start a new run=NAME with sft.skip=true and "
            f"model.path=<folder of {version}>"
        )
    overrules = read_overrules(run_dir)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    overrules[str(last)] = {"version": version, "reason": reason, "time": now}
    write_json(run_dir / OVERRULES, overrules)
    write_versions(config, plan, run_dir)
    return last
