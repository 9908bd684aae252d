"""Drift and quality of a stream's batches, made once: batches never change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

from rlhf import datacheck
from rlhf.artifacts import digest_json
from rlhf.data.drift import drift_report, headline
from rlhf.data.ledger import FOLDERS, Store
from rlhf.data.profile import Profile, read_profile
from rlhf.data.records import Kind
from rlhf.service.facts.cache import Cache
from rlhf.service.facts.files import finite
from rlhf.service.problems import Problem
from rlhf.service.state import State

Manifests = Mapping[str, Mapping[str, Any]]
"""Name to manifest of a stream's original batches, in the order they came."""

_CHECKS = Cache(1000)


def drift(store: Store, batches: Manifests, id: str) -> dict[str, Any]:
    """Return a batch's `report` against all earlier ones and its `headline`, as `rlhf drift`."""

    def make() -> dict[str, Any]:
        known = list(batches)
        profiles = [
            _profile(store.folder, name, position == 0, batches[name]["digest"])
            for position, name in enumerate(known[: known.index(id) + 1])
        ]
        report = drift_report(profiles[-1], profiles[:-1])
        return {"report": finite(report), "headline": headline(report)}

    return _checked("drift", store, batches, id, make)


def quality(state: State, store: Store, batches: Manifests, id: str) -> dict[str, Any]:
    """Return how the annotators of a batch judged, or its sources where no annotator is named."""
    # A stream by itself, whatever run the service was started with.
    ingest = replace(state.config.ingest, stream=store.stream)
    settings = replace(state.config, recipe="none", ingest=ingest)

    def make() -> dict[str, Any]:
        report = datacheck.report_quality(settings, [id], by="annotator")
        if not report["rows"]:
            report = datacheck.report_quality(settings, [id], by="source")
        found: dict[str, Any] = finite(report)
        return found

    return _checked("quality", store, batches, id, make)


def _checked(
    what: str, store: Store, batches: Manifests, id: str, make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return a check of a batch; a Problem (503) where a simulated batch is being made anew."""
    try:
        found: dict[str, Any] = _CHECKS.get((what, store.folder, id), _mark(batches, id), make)
    except FileNotFoundError as error:
        raise Problem(
            HTTPStatus.SERVICE_UNAVAILABLE, f"batch {id} is being made anew: ask again in a moment"
        ) from error
    return found


def _mark(batches: Manifests, id: str) -> str:
    """Return what a batch and those before it are; a simulated one may be made anew."""
    known = list(batches)
    upto = known[: known.index(id) + 1]
    return digest_json([[name, batches[name]["digest"]] for name in upto])


@lru_cache(maxsize=256)
def _profile(folder: Path, id: str, is_first: bool, digest: str) -> Profile:
    """Read the profile of a batch with these rows."""
    return read_profile(folder / FOLDERS[Kind.batch] / id, batch=id, is_first=is_first)
