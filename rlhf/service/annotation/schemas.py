"""What the annotation API takes and gives: sides as shown, never models."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Side = Literal["left", "right"]
Strength = Literal["significantly_better", "better", "slightly_better", "negligibly_better"]
MAX_COMMENT = 10_000
MAX_REASON = 1_000


def _storable(text: str) -> str:
    """Refuse what no database stores."""
    if "\x00" in text:
        raise ValueError("a text must not hold a null character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a text must not hold half a character") from error
    return text


Text = Annotated[str, AfterValidator(_storable)]
Seconds = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Verdict(_Body):
    """Which response is preferred, how strongly, and whether each is safe."""

    preferred: Side = Field(description="The side on which the better response was shown.")
    strength: Strength = Field(description="How much better it is.")
    safe_left: bool | None = Field(default=None, description="Needed on the safety axis.")
    safe_right: bool | None = Field(default=None, description="Needed on the safety axis.")
    comment: Text = Field(default="", max_length=MAX_COMMENT)
    seconds: Seconds | None = Field(
        default=None, description="Time that the page was in view since it was last loaded."
    )


class Draft(_Body):
    """What has been typed so far; an older draft never replaces a newer one."""

    preferred: Side | None = None
    strength: Strength | None = None
    safe_left: bool | None = None
    safe_right: bool | None = None
    comment: Text = Field(default="", max_length=MAX_COMMENT)
    reason: Text = Field(default="", max_length=MAX_REASON)
    saved: int = Field(default=0, ge=0, le=2**53, description="The page's clock, in milliseconds.")


class NewDraft(Draft):
    """A draft to keep, and which one it changes."""

    based_on: int | None = Field(
        default=None,
        ge=0,
        le=2**53,
        description="`saved` of the newest draft that the page knows. It replaces no later one, "
        "such as another browser's; null replaces any that is older than itself.",
    )


class Skip(_Body):
    """Why a pair cannot be judged."""

    reason: Text = Field(min_length=1, max_length=MAX_REASON)


class NewWeek(_Body):
    """A finished collect node whose pairs become a week; without a name it gets the run's."""

    run: str = Field(min_length=1, max_length=80)
    node: str = Field(min_length=1, max_length=200)
    name: str | None = Field(default=None, min_length=1, max_length=100)


class Turn(BaseModel):
    """A turn of the conversation."""

    role: str
    content: str


class TaskView(BaseModel):
    """A pair as its annotator sees it: in their order, without a word about where it came from."""

    key: str
    week: str
    axis: str
    guideline: str
    is_qualification: bool
    prompt: list[Turn]
    left: str
    right: str
    state: str = Field(description="open, done, skipped or expired")
    draft: Draft | None


class Progress(BaseModel):
    """How far somebody is with a week."""

    judged: int = Field(description="Pairs that the annotator has judged.")
    left: int = Field(description="Verdicts that the week still needs, from anybody.")
    qualification_total: int
    qualification_answered: int


class NextTask(BaseModel):
    """What comes next: a task, or a message that says why there is none."""

    status: Literal["task", "none", "not_qualified"]
    message: str
    task: TaskView | None
    progress: Progress | None


class Saved(BaseModel):
    """The draft as it is kept now: another one where that was not to be replaced."""

    key: str
    state: str = Field(description="open; expired when somebody else has the pair now.")
    draft: Draft


class Answer(BaseModel):
    """An assignment that is finished; the same submission again gives the same answer."""

    key: str
    state: str
    verdict: Verdict | None = None
    reason: str | None = None


class Counts(BaseModel):
    """A week's pairs and verdicts, qualification items apart."""

    pairs: int
    judged: int = Field(description="Pairs with at least one verdict.")
    complete: int = Field(description="Pairs with as many verdicts as they need.")
    verdicts: int
    needed: int = Field(description="Verdicts of all pairs together.")
    in_progress: int = Field(description="Pairs in the hands of annotators.")
    skips: int
    skipped_only: int = Field(description="Pairs that were skipped and never judged.")
    axes: dict[str, dict[str, int]]


class AgreementView(BaseModel):
    """Agreement on the pairs that several annotators judged; null where there are too few."""

    pairs: int = Field(description="Pairs with at least two verdicts.")
    annotators: int
    same_preference: float | None = Field(description="Share of verdict pairs of one direction.")
    ac2: dict[str, float | None] = Field(description="Gwet's AC2 by weights, eight levels.")
    kappa: dict[str, float | None] = Field(
        description="Cohen's weighted kappa, mean over pairs of annotators."
    )
    safety_ac1: float | None = Field(description="Gwet's AC1 of the safety labels.")


class _Week(BaseModel):
    name: str
    stream: str
    run: str
    node: str
    state: str
    created: datetime
    closed: datetime | None


class WeekView(_Week):
    """A week of pairs."""

    counts: Counts
    agreement: AgreementView


class WeekRow(_Week):
    """A week in a list."""

    pairs: int
    verdicts: int
    needed: int


class AnnotatorRow(BaseModel):
    """What one annotator has done in a week."""

    annotator: str
    judged: int
    skipped: int
    open: int
    median_seconds: float | None
    qualification_right: int
    qualification_total: int
    qualification_answered: int
    qualified: bool | None = Field(description="Null until all items are answered.")


class Discarded(BaseModel):
    """A week that is no more; its pairs can become another one."""

    week: str
    run: str
    node: str


class Closed(BaseModel):
    """A closed week: what was counted, and the batch file that went to the inbox."""

    week: str
    file: str
    rows: int
    report: dict[str, Any]
