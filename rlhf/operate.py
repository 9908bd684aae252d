"""Work on a finished run: export a version, clean up, verify files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rlhf.artifacts import (
    MANIFEST,
    NodeDir,
    atomic_folder,
    read_json,
    sha256_file,
    write_json,
    write_text,
)
from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.nodes import Node
from rlhf.plan import Plan, node_name
from rlhf.state import INPUTS
from rlhf.versions import Version, list_versions

CARD = """# {run} {name}

State: {state}{overruled}. Made by node `{node}` of run `{run}` (recipe `{recipe}`).

## Lineage

| node | digest | read |
|---|---|---|
{lineage}

## Data

| kind | id | digest of the accepted rows |
|---|---|---|
{data}

## Decision against {against}

{decision}

## Scores

```json
{scores}
```

The licences of the base model and of the data apply to this model.
"""


def export_version(
    config: Config, plan: Plan, run_dir: Path, *, version: str, target: Path
) -> None:
    """Copy a version's model and write its card; raises ConfigError for an unknown version."""
    versions = {item.name: item for item in list_versions(config, plan, run_dir)}
    if version not in versions:
        known = ", ".join(versions) or "none yet"
        raise ConfigError(f"version {version} of run={config.run} does not exist: there is {known}")
    chosen = versions[version]
    if not Path(chosen.path).is_dir():
        raise ConfigError(f"{chosen.path} of {version} is gone: it was cleaned; choose another")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty: give a new folder")
    with atomic_folder(target) as folder:
        shutil.copytree(chosen.path, folder, dirs_exist_ok=True)
        write_text(folder / "README.md", _card(config, plan, run_dir, chosen))


def _card(config: Config, plan: Plan, run_dir: Path, version: Version) -> str:
    nodes = plan.upstream(version.node) if version.node else []
    lineage, data = [], {}
    for node in nodes:
        inputs = read_json(run_dir / node.name / INPUTS)
        digest = NodeDir(run_dir / node.name).manifest()["digest"]
        read = ", ".join(f"{role}: {row['name']}" for role, row in inputs["models"].items())
        lineage.append(f"| {node.name} | {digest} | {read} |")
        for row in inputs["data"]:
            data[row["kind"], row["id"]] = row["digest"]
    round_ = int(version.name[1:])
    evaluation = run_dir / node_name(round_, "evaluate") / "evaluation.json"
    reasons = [f"- {json.dumps(reason, ensure_ascii=False)}" for reason in version.reasons]
    return CARD.format(
        run=config.run,
        name=version.name,
        state=version.state,
        overruled=f" by an operator: {version.overruled}" if version.overruled else "",
        node=version.node or config.model.path,
        recipe=config.recipe,
        lineage="\n".join(lineage) or "| (base model) | | |",
        data="\n".join(f"| {kind} | {key} | {data[kind, key]} |" for kind, key in sorted(data)),
        against=version.against or "nothing (first version)",
        decision="\n".join(reasons) or "none",
        scores=json.dumps(read_json(evaluation), indent=2) if evaluation.exists() else "{}",
    )


def clean_run(config: Config, plan: Plan, run_dir: Path) -> list[tuple[str, int]]:
    """Delete what no later node reads; returns what was deleted and its size in bytes.

    Promoted versions, winners' pools, tables and manifests stay, and so does everything of the
    newest round. A manifest loses the entries of deleted files and keeps its digest.
    """
    versions = list_versions(config, plan, run_dir)
    kept = {version.node for version in versions if version.state != "refused"}
    freed: list[tuple[str, int]] = []
    newest = max((item.round for item in plan.rounds), default=0)
    for node in plan.nodes:
        folder = NodeDir(run_dir / node.name)
        if not folder.is_done():
            continue
        doomed = ["shards", "wandb", "checkpoints"]
        if node.round < newest and node.name not in kept and _round_is_over(plan, run_dir, node):
            doomed.append("model")
        for name in doomed:
            freed += _delete(folder, name)
    return freed


def _round_is_over(plan: Plan, run_dir: Path, node: Node) -> bool:
    """Tell whether every node that depends on a node directly is done."""
    children = [other for other in plan.nodes if node.name in other.after]
    return all(NodeDir(run_dir / other.name).is_done() for other in children)


def _delete(folder: NodeDir, name: str) -> list[tuple[str, int]]:
    path = folder.path / name
    if not path.exists():
        return []
    size = sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    manifest: dict[str, Any] = folder.manifest()
    files = {key: row for key, row in manifest["files"].items() if Path(key).parts[0] != name}
    cleaned = sorted({*manifest.get("cleaned", []), name})
    if len(files) != len(manifest["files"]):
        write_json(folder.path / MANIFEST, {**manifest, "files": files, "cleaned": cleaned})
    shutil.rmtree(path)
    return [(str(path), size)]


def changed_files(plan: Plan, run_dir: Path) -> tuple[int, list[str]]:
    """Return how many files were checked by sha256, and those that differ from their manifest."""
    checked, changed = 0, []
    for node in plan.nodes:
        folder = run_dir / node.name
        if not (folder / MANIFEST).exists():
            continue
        for name, entry in read_json(folder / MANIFEST)["files"].items():
            checked += 1
            path = folder / name
            if not path.exists() or sha256_file(path) != entry["sha256"]:
                changed.append(str(path))
    return checked, changed
