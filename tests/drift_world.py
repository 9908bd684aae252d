"""Batches of generated comparisons whose rows are clustered by prompt, for tests of drift.

Everything about a row depends on its prompt: axis, source, turns, words and lengths are the
prompt's own, strengths and labels vary around its habits. Batches of one recipe are drawn from one
population, so that whatever a report finds between them is chance.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from rlhf.data.profile import Profile, profile_chunks
from rlhf.data.records import STRENGTHS

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TYPES = {
    "prompt": MESSAGES,
    "chosen_safe": pa.bool_(),
    "rejected_safe": pa.bool_(),
    "annotator": pa.string(),
    "strength": pa.string(),
}
TOPICS = {"helpfulness": "bread oven yeast flour crust", "safety": "poison weapon theft fraud bomb"}
FILLER = "the a of and to in it is that was he for on are with as his they be at one have this"


@dataclass(frozen=True)
class Recipe:
    """A population; shares are of prompts."""

    rows_per_prompt: float = 3.0
    safety: float = 0.3
    sources: tuple[float, ...] = (0.5, 0.3, 0.15, 0.05)
    strengths: tuple[float, ...] = (0.35, 0.2, 0.3, 0.15)
    habit: float = 2.0
    """How alike the rows of one prompt are: small is very."""
    length: float = 20.0
    """Words of a response."""
    multi_turn: float = 0.1
    longer: float = 0.6
    """Share of comparisons where the longer response is chosen."""
    repeated: float = 0.3
    """Share of prompts that came before."""

    def but(self, **changes: Any) -> Recipe:
        return replace(self, **changes)


def draw(recipe: Recipe, num_rows: int, *, seed: int) -> list[dict[str, Any]]:
    """Draw rows as a store keeps them, with the prompts in random order."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < num_rows:
        number = 1 + int(rng.geometric(1.0 / recipe.rows_per_prompt)) - 1
        rows += _rows_of_prompt(recipe, rng, f"{seed}-{len(rows)}", min(number, 40))
    kept = rows[:num_rows]
    return [kept[i] for i in rng.permutation(num_rows)]


def batches(
    population: list[dict[str, Any]], sizes: tuple[int, ...], *, seed: int
) -> list[list[dict[str, Any]]]:
    """Draw batches of about these sizes from a population of rows, each prompt in one batch."""
    rng = np.random.default_rng(seed)
    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in population:
        prompts.setdefault(row["cluster"], []).append(row)
    names = list(prompts)
    order = iter(rng.permutation(len(names)))
    found = []
    for size in sizes:
        rows: list[dict[str, Any]] = []
        while len(rows) < size:
            rows += prompts[names[next(order)]]
        found.append(rows)
    return found


def profile_of(
    rows: list[dict[str, Any]], *, batch: str = "b", is_first: bool = False, clustered: bool = True
) -> Profile:
    """Return the profile of rows; not `clustered` makes every row a prompt of its own."""
    keys = [f"{i}" if not clustered else row["cluster"] for i, row in enumerate(rows)]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    columns["key_prompt"] = [_digest(key) for key in keys]
    columns["key_exact"] = [_digest(row["id"]) for row in rows]
    table = pa.table({name: pa.array(v, TYPES.get(name)) for name, v in columns.items()})
    return profile_chunks(
        table.to_batches(1000), num_rows=len(rows), batch=batch, is_first=is_first
    )


def for_vendor(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows as a vendor's file has them."""
    return [
        {name: value for name, value in row.items() if name not in ("cluster", "repeat_prompt")}
        for row in rows
    ]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _rows_of_prompt(
    recipe: Recipe, rng: np.random.Generator, name: str, number: int
) -> list[dict[str, Any]]:
    axis = "safety" if rng.random() < recipe.safety else "helpfulness"
    source = f"vendor-{rng.choice(len(recipe.sources), p=recipe.sources)}"
    words = [*rng.choice(TOPICS[axis].split(), 3), *rng.choice(FILLER.split(), 8)]
    question = " ".join([f"q{_digest(name)}", *words])
    turns = [{"role": "user", "content": question}]
    if rng.random() < recipe.multi_turn:
        turns += [{"role": "assistant", "content": "What?"}, {"role": "user", "content": "That."}]
    strengths = rng.dirichlet(np.array(recipe.strengths) * recipe.habit)
    usual = recipe.length * float(rng.lognormal(0.0, 0.5))
    is_repeated = bool(rng.random() < recipe.repeated)
    vocabulary = np.array([*words, *FILLER.split()])
    longer = rng.beta(recipe.longer * recipe.habit, (1 - recipe.longer) * recipe.habit)
    rows = []
    for i in range(number):
        sizes = sorted(1 + rng.poisson(usual, size=2))
        if rng.random() < longer:
            sizes.reverse()
        texts = [" ".join(vocabulary[rng.integers(len(vocabulary), size=n)]) for n in sizes]
        safe = [bool(rng.random() < 0.8), bool(rng.random() < 0.5)]
        known = axis == "safety" and safe != [False, True]
        rows.append(
            {
                "id": f"{name}/{i}",
                "cluster": name,
                "prompt": turns,
                "chosen": f"{texts[0]} {i}",
                "rejected": f"{texts[1]} {i} no",
                "strength": str(rng.choice(STRENGTHS, p=strengths)),
                "axis": axis,
                "source": source,
                "annotator": f"person-{rng.integers(5)}",
                "chosen_safe": safe[0] if known else None,
                "rejected_safe": safe[1] if known else None,
                "tie": bool(rng.random() < 0.08),
                "repeat_prompt": is_repeated,
            }
        )
    return rows
