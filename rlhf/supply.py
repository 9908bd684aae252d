"""What a run finds in its stream of the store, and how the toy world fills it."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf.artifacts import write_jsonl
from rlhf.config import Config, OnBadRow
from rlhf.data.corrections import list_tombstones
from rlhf.data.ledger import FOLDERS, Store
from rlhf.data.records import Kind
from rlhf.data.tombstones import LISTED
from rlhf.plan import Listing

log = logging.getLogger(__name__)


class Row(Protocol):
    """A record of the store."""

    def to_json(self) -> dict[str, Any]: ...


def open_store(config: Config) -> Store:
    """Return the stream of the store that a run reads."""
    return Store(Path(config.paths.store), config.data.stream)


def reads_store(config: Config, store: Store) -> bool:
    """Tell whether a run reads a stream of this very store."""
    is_here = Path(config.paths.store).resolve() == store.root.resolve()
    return is_here and config.data.stream == store.stream


def list_store(config: Config) -> Listing:
    """List the ids and digests of every kind in a run's stream, in ingest order."""
    store = open_store(config)
    listing = {
        kind.name: {key: store.digest(kind, key) for key in store.ids(kind)} for kind in Kind
    }
    return {**listing, LISTED: list_tombstones(store)}


def check_split(config: Config) -> None:
    """Refuse a held-out split other than the one that the stream was ingested with."""
    data = config.data
    open_store(config).check_split(share=data.heldout_share, salt=data.heldout_salt)


def fill_from_toy_world(config: Config) -> list[str]:
    """Ingest the toy world's sets that are not there yet; returns the ids that were added."""
    from rlhf.toy import World

    world = World(config.seed)
    store = open_store(config)
    toy = config.toy
    number = toy.prompts_per_kind
    makers: dict[Kind, tuple[str, Callable[[], Sequence[Row]]]] = {
        Kind.sft: ("toy-sft", lambda: world.sft_set(toy.sft_rows)),
        Kind.prompts: ("toy-prompts", lambda: world.prompt_set(number, number, number)),
        Kind.open: ("toy-open", lambda: world.open_set(toy.open_rows, config.seed)),
    }
    added = []
    for kind, (name, make) in makers.items():
        if name not in store.ids(kind):
            _ingest_rows(make(), kind, name, store=store, config=config)
            added.append(name)
    return added


def forget_batch(config: Config, batch: str) -> None:
    """Drop a simulated batch from the run's own stream, so that its node can be run again."""
    store = open_store(config)
    shutil.rmtree(store.folder / FOLDERS[Kind.batch] / batch, ignore_errors=True)
    log.warning("dropped batch %s from stream %s", batch, config.data.stream)


def _ingest_rows(
    rows: Sequence[Row], kind: Kind, name: str, *, store: Store, config: Config
) -> None:
    from rlhf.data.ingest import ingest_file  # With NumPy.

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.jsonl"
        write_jsonl(path, [row.to_json() for row in rows])
        ingest_file(
            path,
            store,
            kind=kind,
            id=name,
            on_bad_row=OnBadRow.quarantine,
            heldout_share=config.data.heldout_share,
            heldout_salt=config.data.heldout_salt,
        )
