"""Numbers for Prometheus: what the service was asked, and where runs, weeks and files stand."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.service.database.models import Annotation, Audit, InboxFile, Task, Week
from rlhf.service.facts.summaries import STATES, list_runs
from rlhf.service.state import State
from rlhf.service.watch import last_look

METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
OTHER = "other"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Upper bounds of the buckets of request durations."""


class Meter:
    """The numbers of one application."""

    def __init__(self, state: State) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "rlhf_requests",
            "Requests that were answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "rlhf_request_seconds",
            "Time from a request to the end of its answer.",
            ("method", "route"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Standing(state))

    def text(self) -> bytes:
        """Return all numbers in Prometheus' text format."""
        return generate_latest(self.registry)


class Metered:
    """ASGI middleware that counts and times requests by route, never by the address itself."""

    def __init__(self, app: ASGIApp, meter: Meter) -> None:
        self.app = app
        self.meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500
        start = time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            method = scope["method"] if scope["method"] in METHODS else OTHER
            route = getattr(scope.get("route"), "path", OTHER)
            self.meter.requests.labels(method, route, str(status)).inc()
            self.meter.seconds.labels(method, route).observe(time.perf_counter() - start)


class _Standing(Collector):
    """Where runs, nodes, weeks and inbox files stand at the moment they are asked for."""

    def __init__(self, state: State) -> None:
        self.state = state

    def describe(self) -> Iterable[Metric]:
        """Name nothing ahead: naming would read every run once more."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the numbers as they are now."""
        runs = list_runs(self.state)
        yield _gauge("rlhf_runs", "Runs by state.", "state", Tally(run.state for run in runs))
        nodes = {name: sum(run.counts[name] for run in runs) for name in STATES}
        yield _gauge("rlhf_nodes", "Nodes of all runs by state.", "state", nodes)
        yield from self._stored()
        looked = last_look(self.state)
        if looked is not None:
            text = "When the watcher looked last, in Unix seconds."
            yield GaugeMetricFamily("rlhf_watcher_last_look_seconds", text, looked)

    def _stored(self) -> Iterator[Metric]:
        by_week = (
            select(Week.name, func.count(Annotation.id))
            .outerjoin(Task, Task.week_id == Week.id)
            .outerjoin(Annotation, Annotation.task_id == Task.id)
            .group_by(Week.name)
        )
        by_outcome = select(InboxFile.state, func.count()).group_by(InboxFile.state)
        with self.state.reading() as session:
            weeks = {row[0]: row[1] for row in session.execute(by_week)}
            files = {row[0]: row[1] for row in session.execute(by_outcome)}
            writes = session.scalar(select(func.count()).select_from(Audit)) or 0
        yield _gauge("rlhf_annotations", "Annotations by week.", "week", weeks)
        yield _gauge("rlhf_inbox_files", "Files of the inbox by outcome.", "state", files)
        yield GaugeMetricFamily("rlhf_audited_writes", "Rows of the audit log.", writes)


def _gauge(name: str, text: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, number in sorted(values.items()):
        family.add_metric([value], number)
    return family
