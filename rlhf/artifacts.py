"""Atomic files, node folders, checkpoints and manifests: what survives a kill at any moment.

Every write goes to a temporary name, is flushed to disk and renamed. A folder counts only when its
marker, written last, is there: `complete.json` for a checkpoint, `manifest.json` for a node.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import ArtifactError, Stopped
from rlhf.faults import boundary
from rlhf.processes import STOP, Processes

MANIFEST = "manifest.json"
COMPLETE = "complete.json"


def fsync_path(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    write_parts(path, [data])


def write_parts(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file as `write_bytes` does, piece by piece."""
    boundary("before-temp", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    with temporary.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    boundary("before-rename", path)
    temporary.replace(path)
    fsync_path(path.parent)
    boundary("after-rename", path)


def write_text(path: Path, text: str) -> None:
    """Write text atomically as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with a closing newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically; rows are taken as they come."""
    write_parts(path, ((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows))


def read_json(path: Path) -> Any:
    """Read JSON; raises ArtifactError naming the file when it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing; run the node that writes it") from error
    except ValueError as error:
        raise ArtifactError(
            f"{path} is not valid JSON ({error}); delete it and run again"
        ) from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line; a missing file is an empty list."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def sha256_file(path: Path) -> str:
    """Return the hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """Return a stable digest of a JSON value (sorted keys)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def temporary_folder(target: Path) -> Path:
    """Return where the files of a folder lie until it is complete."""
    return target.with_name(f".{target.name}.tmp")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `target` when the block ends without an error."""
    boundary("before-temp", target)
    temporary = temporary_folder(target)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    yield temporary
    for path in sorted(temporary.rglob("*")):
        fsync_path(path)
    boundary("before-rename", target)
    if target.exists():
        shutil.rmtree(target)
    temporary.replace(target)
    fsync_path(target.parent)
    boundary("after-rename", target)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that a killed writer left in a folder of its own."""
    for path in sorted(folder.rglob(".*.tmp"), reverse=True):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Saved:
    """A complete checkpoint: its step, its stage's state and the bytes of each log at that time."""

    path: Path
    step: int
    state: dict[str, Any]
    log_sizes: dict[str, int]


class JsonlLog:
    """An append-only JSONL file that can be cut back to a recorded size on resume.

    Of a node's processes only the first writes it; in the others it is muted.
    """

    def __init__(self, path: Path, *, muted: bool = False) -> None:
        self.path = path
        self.muted = muted
        self.mirror: Callable[[Mapping[str, Any]], None] | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row and hand it to the operating system."""
        if self.muted:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if self.mirror is not None:
            self.mirror(row)

    def size(self) -> int:
        """Return the size in bytes; 0 when there is no file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def sync(self) -> None:
        """Flush to disk what was added, before a checkpoint records the size."""
        if self.path.exists():
            fsync_path(self.path)

    def cut(self, size: int) -> None:
        """Drop everything after `size` bytes, which a checkpoint recorded."""
        if self.path.exists() and not self.muted:
            os.truncate(self.path, size)


class NodeDir:
    """The folder of one node: logs, checkpoints, the model, and the manifest, written last.

    A node may have several processes: all read here, the first one writes.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep: int = 2,
        on_step: Callable[[int, int], None] | None = None,
        processes: Processes | None = None,
    ):
        self.path = path
        self.processes = processes or Processes()
        muted = not self.processes.is_main
        names = ("metrics", "samples", "heldout")
        self._logs = tuple(JsonlLog(path / f"{name}.jsonl", muted=muted) for name in names)
        self.metrics, self.samples, self.heldout = self._logs
        self.checkpoints = path / "checkpoints"
        self._keep = keep
        self._on_step = on_step
        self._is_stopping = False

    @property
    def model(self) -> Path:
        """The folder of the finished model."""
        return self.path / "model"

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON artifact of the node."""
        if self.processes.is_main:
            write_json(self.path / name, value)

    def write_jsonl(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a JSONL artifact of the node."""
        if self.processes.is_main:
            write_jsonl(self.path / name, rows)

    def has(self, name: str) -> bool:
        """Tell whether a file or folder of the node is there; the same answer in all processes."""
        return bool(self.processes.broadcast((self.path / name).exists(), f"a look for {name}"))

    def shards(
        self,
        names: Sequence[str],
        make: Callable[[int], list[dict[str, Any]]],
        *,
        done: int = 0,
        total: int | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Make the files of shards/ that are missing, each in one process; returns the rows of all.

        Without a total no progress is reported. A request to stop raises Stopped in all processes.
        """
        paths = [self.path / "shards" / f"{name}.jsonl" for name in names]
        for number in self.processes.share(list(range(len(paths)))):
            self.processes.passed(f"shard {names[number]}")
            if not paths[number].exists():
                write_jsonl(paths[number], make(number))
            if total is not None:
                self.step(done + number + 1, total)
            if STOP.made:
                break
        self.stop_together("shards of all processes")
        return [read_jsonl(path) for path in paths]

    def stop_together(self, what: str) -> None:
        """Meet the other processes where everything is saved; Stopped if one was asked to stop."""
        if self.processes.any(STOP.made, what=what)[0]:
            raise Stopped(f"stopped on request at `{what}`; its state is saved")

    def step(self, step: int, total: int) -> None:
        """Report a finished step: the runner shows it and renews the lease.

        Raises Stopped after a request to stop that `save_now` has saved the state for.
        """
        boundary(f"step-{step}", self.path)
        self.processes.passed(f"step {step}")
        if self._on_step is not None:
            self._on_step(step, total)
        if self._is_stopping:
            raise Stopped(f"stopped on request after step {step} of {total}; its state is saved")

    def save_now(self, step: int, *, is_due: bool) -> bool:
        """Agree with the other processes whether to checkpoint after this step.

        A request to stop asks for a checkpoint; `step` then ends the node.
        """
        what = f"whether to save after step {step}"
        due, self._is_stopping = self.processes.any(is_due, STOP.made, what=what)
        return due or self._is_stopping

    @contextmanager
    def checkpoint(self, step: int, state: Mapping[str, Any]) -> Iterator[Path]:
        """Write a checkpoint: fill the folder inside the block; older ones beyond `keep` go away.

        `state` must be JSON; the sizes of the logs are recorded beside it.
        Every process of the node comes here and may add files of its own.
        """
        target = self.checkpoints / f"step-{step:08d}"
        moments = ("folder", "files", "end")
        ready, filled, kept = (f"{moment} of checkpoint {step}" for moment in moments)
        if not self.processes.is_main:
            self.processes.wait(ready)
            yield temporary_folder(target)
            self.processes.wait(filled)
            # Whoever stops after this step must not be the first to end: srun ends the others then.
            self.processes.wait(kept)
            return
        with atomic_folder(target) as folder:
            self.processes.wait(ready)
            yield folder
            self.processes.wait(filled)
            files = {
                str(path.relative_to(folder)): path.stat().st_size
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            for entry in self._logs:
                entry.sync()
            marker = {
                "step": step,
                "state": dict(state),
                **{f"{entry.path.stem}_size": entry.size() for entry in self._logs},
                "files": files,
            }
            write_json(folder / COMPLETE, marker)
        for old in sorted(self.checkpoints.glob("step-*"))[: -self._keep]:
            shutil.rmtree(old)
        self.processes.wait(kept)

    def last_checkpoint(self) -> Saved | None:
        """Return the newest complete checkpoint, or None; incomplete folders are passed over."""
        for folder in sorted(self.checkpoints.glob("step-*"), reverse=True):
            marker_path = folder / COMPLETE
            if not marker_path.exists():
                continue
            marker = read_json(marker_path)
            sizes = {name: folder / name for name in marker["files"]}
            if all(p.exists() and p.stat().st_size == marker["files"][n] for n, p in sizes.items()):
                # Only PPO writes heldout.jsonl: other stages' older markers do not name it.
                names = [entry.path.stem for entry in self._logs]
                log_sizes = {name: marker.get(f"{name}_size", 0) for name in names}
                return Saved(folder, marker["step"], marker["state"], log_sizes)
        return None

    def resume(self) -> Saved | None:
        """Find the newest complete checkpoint and cut the logs back to it, else to nothing."""
        saved = self.last_checkpoint()
        for entry in self._logs:
            entry.cut(saved.log_sizes[entry.path.stem] if saved else 0)
        return saved

    def drop_checkpoints(self) -> None:
        """Delete all checkpoints, once the manifest is written."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def is_done(self) -> bool:
        """Tell whether the manifest exists and the files it lists have their sizes."""
        return self._complete_manifest() is not None

    def manifest(self) -> dict[str, Any]:
        """Return the manifest; raises ArtifactError when the node is not done."""
        found = self._complete_manifest()
        if found is None:
            raise ArtifactError(f"{self.path} is not finished; run `rlhf run` to finish it")
        return found

    def _complete_manifest(self) -> dict[str, Any] | None:
        path = self.path / MANIFEST
        if not path.exists():
            return None
        found: dict[str, Any] = read_json(path)
        sizes = {self.path / name: entry["size"] for name, entry in found["files"].items()}
        is_whole = all(file.exists() and file.stat().st_size == sizes[file] for file in sizes)
        return found if is_whole else None


EXCLUDED = (
    "checkpoints",
    "energy",
    "exits.jsonl",
    "jobs",
    "lease.json",
    "log.txt",
    "processes",
    "progress.json",
    "wandb",
    MANIFEST,
)
"""Parts of a node folder that are not artifacts; neither is anything hidden."""


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return relative name to size and sha256 of every artifact in a node folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and name.parts[0] not in EXCLUDED and not is_hidden:
            found[str(name)] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    return found


def write_manifest(folder: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest, which makes the node done; returns it with its own digest of results.

    `digest` covers the files that later nodes read: the model, the tables and the decisions; logs
    and timing are left out, so that a repeated node with equal results has an equal digest.
    """
    files = list_files(folder)
    volatile = ("metrics.jsonl", "provenance.json", "inputs.json", "config.yaml", "wandb")
    stable = {n: f["sha256"] for n, f in files.items() if Path(n).parts[0] not in volatile}
    manifest = {**entries, "files": files, "digest": digest_json(stable)}
    write_json(folder / MANIFEST, manifest)
    return manifest
