"""Section: how to read the page: controls, intervals, scales, and where every number comes from."""

from __future__ import annotations

from rlhf.report.view.blocks import Block, Cell, Column, Section, Table, cell
from rlhf.report.view.refs import Ref

LEAD = "What the controls rule out, what an interval means here, and what may be compared."

RULES = (
    (
        "longer wins",
        "The accuracy of always choosing the response with more tokens, on the same comparisons.",
        "A model that is not better has learned length.",
    ),
    (
        "swapped",
        "A second scoring pass that is told the rejected response is the chosen one.",
        "Accuracy and this control add up to one, or the evaluation leaks the label.",
    ),
    (
        "on arrival",
        "The previous round's model on the new batches, before training on them.",
        "The only accuracy on data that nothing has adapted to.",
    ),
    (
        "judge pair",
        "Reward models trained on data that rejection sampling and PPO never use.",
        "It decides about promotion; the used pair running ahead of it is over-optimisation.",
    ),
    (
        "canary",
        "The judge pair's scores of PPO's own held-out responses, iteration by iteration.",
        "It falls where the policy exploits the reward models.",
    ),
    (
        "gold",
        "The toy world's true quality, which no model and no decision sees.",
        "It tells whether decisions were right; a real run has none.",
    ),
    (
        "intervals",
        "Clustered by prompt, at the level of evaluate.level.",
        "Two intervals that overlap may still differ: read paired differences.",
    ),
    (
        "raw scores",
        "Outputs of a reward model before the sigmoid.",
        "Never compare scores of different models or rounds; only inside one panel.",
    ),
    (
        "few",
        "Cells with too few distinct prompts.",
        "Shown in grey and compared with nothing.",
    ),
)


def section(report: Ref) -> Section:
    """Return the section."""
    columns = [
        Column("what", numeric=False),
        Column("is", numeric=False),
        Column("tells", numeric=False),
    ]
    rows: list[list[Cell]] = [[cell(part) for part in row] for row in RULES]
    blocks: list[Block] = [Table("reading-guide", "Controls and terms", columns, rows)]
    return Section("guide", "Controls and reading guide", LEAD, blocks)
