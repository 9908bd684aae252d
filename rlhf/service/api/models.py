"""What the API answers and takes, as OpenAPI describes it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rlhf.service.annotation.schemas import Text
from rlhf.service.facts.nodes import NodeRow
from rlhf.service.facts.streams import BatchRow, StreamRow
from rlhf.service.facts.summaries import RunSummary
from rlhf.versions import Version

Row = dict[str, Any]


class _Read(BaseModel):
    """Made from an object's attributes."""

    model_config = ConfigDict(from_attributes=True)


class _Taken(BaseModel):
    """A body that a caller sends; a field that is not known is a mistake."""

    model_config = ConfigDict(extra="forbid")


class RunModel(_Read):
    """A run in one line."""

    name: str = Field(description="Name of the run and of its folder.")
    recipe: str = Field(description="Recipe that it started from.")
    stream: str = Field(description="Stream of the store that it reads.")
    rounds: int = Field(description="Rounds of its plan.")
    counts: dict[str, int] = Field(description="Nodes that are done, running, stopped, waiting.")
    version: str = Field(description="Version that counts as promoted now; empty before v0.")
    started: datetime | None = Field(description="When its first node started.")
    finished_at: datetime | None = Field(description="When its last node ended, if all are done.")
    running: list[str] = Field(description="Nodes that run.")
    failed: list[str] = Field(description="Nodes that ended with a failure.")
    has_ended_early: bool = Field(description="Whether nothing works on what is left of a launch.")
    problem: str = Field(description="Why the run cannot be read; empty if it can.")

    @classmethod
    def of(cls, summary: RunSummary) -> RunModel:
        """Return the model of a summary."""
        return cls.model_validate(summary)


class RoundModel(_Read):
    """A round of a run's plan."""

    round: int = Field(description="Number, from 1.")
    stage: str = Field(description="How it improves the policy: rejection, ppo, rejection_ppo.")
    batches: list[str] = Field(description="Batches that are new in it.")
    as_of: int = Field(description="Newest correction or withdrawal that it takes in; 0 for none.")


class RunDetailModel(RunModel):
    """A run with the rounds of its plan."""

    plan: list[RoundModel] = Field(description="Rounds, oldest first.")


class JobModel(BaseModel):
    """A node's newest job as its scheduler knows it."""

    id: str = Field(description="The scheduler's number.")
    state: str = Field(description="pending, running, ended, or unknown: the scheduler is silent.")
    reason: str = Field(
        description="The scheduler's word for why it waits or how it ended, or why it is unknown."
    )


class NodeModel(_Read):
    """A node of the plan, and where it stands."""

    name: str = Field(description="Name, such as round-01/reward-helpfulness.")
    stage: str = Field(description="Kind of work.")
    round: int = Field(description="Round; 0 before the first.")
    after: list[str] = Field(description="Nodes that it waits for.")
    state: Literal["done", "running", "stopped", "waiting"] = Field(description="Where it stands.")
    step: int = Field(description="Steps that are done.")
    total: int = Field(description="Steps in all; 0 before that is known.")
    seconds: float = Field(description="Time that it has taken.")
    eta: float | None = Field(description="Time that is left, in seconds, while it runs.")
    silent: float | None = Field(description="Seconds since its last step, while it runs.")
    peak_memory_mb: float | None = Field(description="Of its largest process, when it is done.")
    job: JobModel | None = Field(description="Its job, where a scheduler has one.")
    failure: str = Field(description="Kind of failure it ended with; empty without one.")
    remedy: str = Field(description="What to do about the failure.")

    @classmethod
    def of(cls, row: NodeRow) -> NodeModel:
        """Return the model of a node's row."""
        return cls.model_validate(row)


class MetricsModel(BaseModel):
    """Rows of a node's metrics.jsonl."""

    node: str = Field(description="The node.")
    available: list[str] = Field(description="Every metric of the file.")
    total: int = Field(description="Rows of the file.")
    matched: int = Field(description="Rows of the window that hold a wanted metric.")
    rows: list[Row] = Field(description="Evenly chosen among those; `step` and metrics.")


class LogModel(BaseModel):
    """The end of a node's log."""

    node: str = Field(description="The node.")
    lines: list[str] = Field(description="Lines that are not blank, oldest first.")


class VersionModel(_Read):
    """A version of the policy."""

    name: str = Field(description="v0, v1, ...")
    node: str = Field(description="Node that made it; empty for a base model that was given.")
    state: str = Field(description="promoted, refused, or pending until it is evaluated.")
    digest: str = Field(description="Digest of the node's files.")
    against: str = Field(description="Version that it was compared with.")
    reasons: list[Row] = Field(description="Rules of the promotion, with value, bound and ok.")
    overruled: str = Field(description="Why an operator decided otherwise; empty if nobody did.")

    @classmethod
    def of(cls, version: Version) -> VersionModel:
        """Return the model of a version, without its folder."""
        return cls.model_validate(version)


class StreamModel(_Read):
    """A stream of the store."""

    name: str = Field(description="Its name.")
    sets: dict[str, int] = Field(description="Batches and sets of each kind.")
    rows: int = Field(description="Comparisons of all batches.")
    newest: str = Field(description="Newest batch; empty without one.")
    ingested: str = Field(description="When that one came.")
    heldout_share: float = Field(description="Share of prompts that is never trained on.")
    withdrawals: int = Field(description="Withdrawals of rows.")
    runs: list[str] = Field(description="Runs that read it.")

    @classmethod
    def of(cls, row: StreamRow) -> StreamModel:
        """Return the model of a stream."""
        return cls.model_validate(row)


class BatchModel(_Read):
    """A batch or set of a stream."""

    id: str = Field(description="Its name.")
    kind: str = Field(description="batch, open, sft or prompts.")
    rows: int = Field(description="Accepted rows.")
    digest: str = Field(description="Digest of the accepted rows.")
    ingested: str = Field(description="When it came.")
    counts: dict[str, int] = Field(description="What became of the file's rows.")
    verdict: str = Field(description="Drift against all earlier batches: as expected, look, stop.")
    headline: str = Field(description="The drift in one sentence.")
    supersedes: str = Field(description="Batch or set that it corrects; empty for an original.")
    used_by: dict[str, list[int]] = Field(description="Run to the rounds that it is new in.")

    @classmethod
    def of(cls, row: BatchRow) -> BatchModel:
        """Return the model of a batch."""
        return cls.model_validate(row)


class BatchReportModel(BaseModel):
    """Everything about a batch or set."""

    manifest: Row = Field(description="What ingest recorded.")
    drift: Row | None = Field(description="Drift report of an original batch.")
    quality: Row | None = Field(description="How its annotators, or else its sources, judged.")
    refused: list[Row] = Field(description="First rows that could not be used: line, reason.")
    excluded: list[Row] = Field(description="First rows that were left out: line, policy.")
    used_by: dict[str, list[int]] = Field(description="Run to the rounds that it is new in.")


class ExtendedModel(_Read):
    """A run whose plan became longer."""

    run: str = Field(description="The run.")
    rounds: list[int] = Field(description="Its new rounds.")


class IngestedModel(BaseModel):
    """What became of an upload."""

    added: bool = Field(description="False if all rows were in the stream already.")
    kind: str = Field(description="batch, open, sft or prompts.")
    id: str = Field(description="Name of the batch or set.")
    stream: str = Field(description="Its stream.")
    digest: str = Field(description="Digest of the accepted rows.")
    counts: dict[str, int] = Field(description="What became of the file's rows.")
    refused: list[Row] = Field(description="Rows that were set aside: line, reason, value.")
    excluded: list[Row] = Field(description="Rows that were left out: line, id, policy, reason.")
    message: str = Field(description="What `rlhf ingest` says.")
    drift: str = Field(description="Drift of a new batch in one sentence.")
    extended: list[ExtendedModel] = Field(description="Runs whose plan became longer by it.")


class AuditModel(_Read):
    """A write: one that somebody asked for, or that the watcher made."""

    id: int = Field(description="Number, rising.")
    time: datetime = Field(description="When, in UTC.")
    user: str = Field(description="Who; `watcher` for what nobody asked for.")
    role: str = Field(description="As which role.")
    action: str = Field(description="Method and route, or what the watcher did.")
    target: str = Field(description="Address, run, file or user that was written to.")
    status: int = Field(description="HTTP status of the answer.")
    detail: Row = Field(description="What else is recorded, such as the reason.")


class LaunchModel(_Read):
    """A launch that was asked for."""

    id: int = Field(description="Its number.")
    run: str = Field(description="The run.")
    user: str = Field(description="Who asked for it.")
    state: str = Field(description="wanted (the run is busy), launched or failed.")
    launcher: str = Field(description="local, slurm or kubernetes.")
    output: str = Field(description="What `rlhf launch` said.")
    created: datetime = Field(description="When it was asked for, in UTC.")
    changed: datetime = Field(description="When its state changed, in UTC.")


Value = bool | int | Annotated[float, Field(allow_inf_nan=False)] | Text | None
Settings = Annotated[
    dict[Annotated[Text, Field(max_length=200)], Value],
    Field(
        max_length=100,
        description="Dotted settings to values: numbers, switches and choices only.",
    ),
]


class NewRun(_Taken):
    """A run to start."""

    recipe: Text = Field(max_length=100, description="Name of a recipe.")
    run: Text | None = Field(
        default=None, max_length=100, description="Name of the run; null takes the recipe's."
    )
    settings: Settings = Field(default_factory=dict)


class LaunchOrder(_Taken):
    """A run to go on with."""

    settings: Settings = Field(default_factory=dict)


class CancelOrder(_Taken):
    """What to end of a run."""

    node: Text | None = Field(
        default=None, max_length=200, description="Node whose job ends; null ends all."
    )


class CancelledModel(BaseModel):
    """What was ended."""

    run: str = Field(description="The run.")
    output: str = Field(description="What `rlhf cancel` said.")


class Promotion(_Taken):
    """A version to put in the place of the rule's choice."""

    version: Text = Field(max_length=20, description="Name of an evaluated version.")
    reason: Text = Field(max_length=2000, description="Why; it is recorded.")


class PromotedModel(BaseModel):
    """A promotion that overrules the rule."""

    run: str = Field(description="The run.")
    version: str = Field(description="Version that counts as promoted.")
    round: int = Field(description="Round after which it does.")
    reason: str = Field(description="Why.")


class StatusModel(BaseModel):
    """How the service feels."""

    status: str = Field(description="alive, or ready.")
