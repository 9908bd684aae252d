"""What there is to say about runs, streams and batches, read from their files.

The API and the pages say the same, because both ask here. Everything may be asked while a run is
being written: missing and half-written files count as not there yet. Names that come from outside
are looked up among what exists, and never become part of a path otherwise.
"""

from rlhf.service.facts.logs import (
    has_ended_early,
    read_background,
    read_log,
    read_metrics,
    read_samples,
)
from rlhf.service.facts.nodes import NodeRow, find_node, node_row, node_rows
from rlhf.service.facts.reports import run_report
from rlhf.service.facts.runs import Run, known_runs, open_run, open_runs, run_versions
from rlhf.service.facts.streams import (
    BatchRow,
    StreamRow,
    batch_report,
    list_batches,
    list_streams,
    open_stream,
)
from rlhf.service.facts.summaries import RunSummary, list_runs, run_summary

__all__ = [
    "BatchRow",
    "NodeRow",
    "Run",
    "RunSummary",
    "StreamRow",
    "batch_report",
    "find_node",
    "has_ended_early",
    "known_runs",
    "list_batches",
    "list_runs",
    "list_streams",
    "node_row",
    "node_rows",
    "open_run",
    "open_runs",
    "open_stream",
    "read_background",
    "read_log",
    "read_metrics",
    "read_samples",
    "run_report",
    "run_summary",
    "run_versions",
]
