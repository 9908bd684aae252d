"""A run's report, made again only after something that it is made from has changed."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from rlhf.artifacts import MANIFEST
from rlhf.compose import RUN_FILE
from rlhf.data.ledger import FOLDERS
from rlhf.data.records import Kind
from rlhf.data.tombstones import FOLDER as TOMBSTONES
from rlhf.errors import RlhfError
from rlhf.launch.local import PLAN
from rlhf.report.gather import gather
from rlhf.service.facts.cache import Cache
from rlhf.service.facts.files import UNREADABLE, stamp, steadily
from rlhf.service.facts.runs import Run
from rlhf.service.problems import Problem
from rlhf.service.state import State
from rlhf.versions import OVERRULES, VERSIONS

log = logging.getLogger(__name__)

MAX_REPORTS = 16
"""Reports that are kept in memory."""
_REPORTS = Cache(MAX_REPORTS)


def run_report(state: State, run: Run) -> dict[str, Any]:
    """Return the content of report.json as it would be written now.

    The store is the run's own, as on the command line. Not to be changed: others get the same
    object. Raises a Problem: 503 while nodes are made or deleted, 409 for an artifact that cannot
    be used.
    """
    store = Path(run.config.paths.store)
    mark = _mark(run, store)
    try:
        found: dict[str, Any] = _REPORTS.get(
            run.folder, mark, lambda: steadily(lambda: gather(run.folder, store=store))
        )
    except (*UNREADABLE, AttributeError) as error:
        if _mark(run, store) != mark:
            raise Problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"run {run.name} is changing while its report is made ({error}): ask again in a "
                "moment",
            ) from error
        what = str(error)
        if not isinstance(error, RlhfError | OSError):
            log.exception("the report of run %s cannot be made", run.name)
            what = f"a file has another form than this version writes ({error!r})"
        raise Problem(
            HTTPStatus.CONFLICT, f"the report of run {run.name} cannot be made: {what}"
        ) from error
    return found


def _mark(run: Run, store: Path) -> Hashable:
    """Return what changes with any file that a report is made from; manifests stand for nodes."""
    own = [RUN_FILE, PLAN, VERSIONS, OVERRULES, "estimate.json"]
    own += [f"{node.name}/{MANIFEST}" for node in run.plan.nodes]
    stream = store / run.config.data.stream
    batches = stream / FOLDERS[Kind.batch]
    used = {name for item in run.plan.rounds for name in item.batches}
    paths = [run.folder / name for name in own]
    paths += [batches / name / MANIFEST for name in sorted(used)]
    paths += [batches, stream / TOMBSTONES]
    return tuple(stamp(path) for path in paths)
