"""Where the numbers of a report come from: the files of a run's finished nodes, and of its store.

A record of report.json that holds numbers says `from`: `FILE#POINTER`, a file of the run's folder
and a JSON pointer into it. A JSONL file counts as the array of its rows; a file that starts with
`store:` lies in the store. The number at key K of the record is the file's value at POINTER/K,
unless the record also says `how`: then it is made from that file as docs/metrics.md describes under
that name. `round` is always that of the node, from plan.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rlhf.artifacts import NodeDir, read_json, read_jsonl
from rlhf.errors import ArtifactError

Row = dict[str, Any]

STORE = "store:"
RUN_SETTINGS = "run.yaml"


def pointer(*parts: str | int) -> str:
    """Return a JSON pointer (RFC 6901) made of keys and positions."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def at(file: str, *parts: str | int) -> str:
    """Return `file#pointer`, as `from` fields hold it."""
    return f"{file}#{pointer(*parts)}"


class Content(dict[str, Any]):
    """An object of a JSON artifact; a key that it lacks is an ArtifactError that names the file."""

    def __init__(self, items: Mapping[str, Any], path: Path) -> None:
        super().__init__(items)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ArtifactError(
            f"{self.path} has no {key}: another version wrote it; delete it and run again"
        )


def content_of(value: Any, path: Path) -> Any:
    """Return a JSON value of a file whose objects know that file."""
    if isinstance(value, dict):
        return Content({key: content_of(item, path) for key, item in value.items()}, path)
    if isinstance(value, list):
        return [content_of(item, path) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class Done:
    """A finished node: its row in plan.json, its folder, its manifest."""

    node: Mapping[str, Any]
    folder: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the node's name, which is also its folder in the run."""
        return str(self.node["name"])

    @property
    def round(self) -> int:
        """Return the node's round."""
        return int(self.node["round"])

    @property
    def stage(self) -> str:
        """Return the kind of work."""
        return str(self.node["stage"])

    def option(self, name: str) -> Any:
        """Return one of the node's options, or None where it has none of this name."""
        return self.node["options"].get(name)

    def has(self, name: str) -> bool:
        """Tell whether the node wrote a file."""
        return (self.folder / name).exists()

    def read(self, name: str) -> Any:
        """Return one of the node's JSON artifacts, or None where it wrote none."""
        path = self.folder / name
        return content_of(read_json(path), path) if self.has(name) else None

    def rows(self, name: str) -> list[Row]:
        """Return the rows of one of the node's JSONL artifacts; none where it wrote none."""
        try:
            return read_jsonl(self.folder / name)
        except ValueError as error:
            raise ArtifactError(
                f"{self.folder / name} has a damaged row ({error}); delete it and run again"
            ) from error

    def at(self, name: str, *parts: str | int) -> str:
        """Return the `from` of a value in one of the node's files."""
        return at(f"{self.name}/{name}", *parts)


@dataclass(frozen=True)
class Run:
    """A run's folder, its plan, and its finished nodes in the plan's order.

    `store` is the folder of all streams; None is the one of run.yaml.
    """

    folder: Path
    plan: Mapping[str, Any]
    done: tuple[Done, ...]
    store: Path | None = None
    _cache: dict[str, list[Row]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, store: Path | None = None) -> Run:
        """Read the plan and the manifests; ArtifactError if there is no plan.json."""
        plan = read_json(folder / "plan.json")
        done = tuple(
            Done(node, directory.path, directory.manifest())
            for node in plan["nodes"]
            if (directory := NodeDir(folder / node["name"])).is_done()
        )
        return cls(folder, plan, done, store)

    def of_stage(self, stage: str) -> Iterator[Done]:
        """Return the finished nodes of a stage."""
        return (item for item in self.done if item.stage == stage)

    def reward_models(self, role: str) -> Iterator[Done]:
        """Return the finished reward nodes of a role: reward or judge."""
        return (item for item in self.of_stage("reward") if item.option("role") == role)

    def newest(self, items: Iterable[Done]) -> Done | None:
        """Return the node of the latest round, or None where there is none."""
        return max(items, key=lambda item: item.round, default=None)

    def rows(self, item: Done, name: str) -> list[Row]:
        """Return rows of a JSONL artifact, read once."""
        key = f"{item.name}/{name}"
        if key not in self._cache:
            self._cache[key] = item.rows(name)
        return self._cache[key]

    @cached_property
    def settings(self) -> Mapping[str, Any] | None:
        """The run's frozen settings as a tree; None for a run without run.yaml."""
        path = self.folder / RUN_SETTINGS
        if not path.exists():
            return None
        found: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        return found

    def artifacts(self, stage: str, file: str) -> list[Row]:
        """Return one JSON artifact of every finished node of a stage, whole."""
        found = ((item, item.read(file)) for item in self.of_stage(stage))
        return [
            {"node": item.name, "round": item.round, "from": item.at(file), **content}
            for item, content in found
            if content is not None
        ]

    @property
    def stream_folder(self) -> Path | None:
        """Where the store keeps the run's stream, or None where it is not there."""
        if self.settings is None:
            return None
        store = self.store or Path(self.settings["paths"]["store"])
        folder = store / self.settings["data"]["stream"]
        return folder if folder.is_dir() else None

    def batch_file(self, batch: str, file: str) -> Any:
        """Return a JSON file that the store keeps for a batch, or None."""
        if self.stream_folder is None:
            return None
        path = self.stream_folder / "batches" / batch / file
        return read_json(path) if path.exists() else None

    def batch_at(self, batch: str, file: str, *parts: str | int) -> str:
        """Return the `from` of a value in a file of a batch."""
        assert self.settings is not None
        return at(f"{STORE}{self.settings['data']['stream']}/batches/{batch}/{file}", *parts)
