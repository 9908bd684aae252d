"""The plan: one pure function from configuration and store to an ordered list of nodes.

Which batches a round uses is decided once, when the round is appended, and never changes. Nodes are
derived from the rounds; what they read is symbolic (`promoted(1)`, `batches(2)`), because decisions
are known only at run time. The symbols are explained in rlhf/resolve.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.config import (
    Annotators,
    Config,
    CriticInit,
    JudgeData,
    Reference,
    RejectionInit,
    RoundStage,
)
from rlhf.data.records import AXES
from rlhf.data.tombstones import newest
from rlhf.errors import ConfigError
from rlhf.nodes import Node

Listing = Mapping[str, Mapping[str, str]]
"""Kind to (id to digest of the accepted rows), ids in ingest order; and the stream's corrections
and withdrawals, see rlhf/data/tombstones.py."""

SYMBOL = re.compile(r"(\w+)(?:\((.*)\))?")


@dataclass(frozen=True, slots=True)
class Round:
    """How one round improves the policy, and the new batches it uses.

    `as_of` is the newest correction or withdrawal that it takes into account; 0 is none.
    """

    round: int
    stage: str
    batches: tuple[str, ...]
    sampling_jobs: int = 1
    as_of: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """A run's rounds and the nodes that follow from them, in an order that can be executed."""

    run: str
    recipe: str
    rounds: tuple[Round, ...]
    nodes: tuple[Node, ...]
    as_of: int = 0
    """As a round's, for the nodes before the first round."""

    def rows_as_of(self, round_: int) -> int:
        """Return the number of the stream as of which a round's nodes read their rows."""
        return self.rounds[round_ - 1].as_of if round_ > 0 else self.as_of

    def node(self, name: str) -> Node:
        """Return a node; raises ConfigError naming the nodes there are."""
        for node in self.nodes:
            if node.name == name:
                return node
        names = ", ".join(node.name for node in self.nodes)
        raise ConfigError(
            f"node {name} is not in the plan of run={self.run}: choose one of {names}"
        )

    def improves(self, round_: int) -> str:
        """Return the node whose output is the version of a round (v0: `sft`, or "" without)."""
        if round_ == 0:
            return "sft" if any(node.name == "sft" for node in self.nodes) else ""
        stages = ("rejection", "ppo")
        found = [node for node in self.nodes if node.round == round_ and node.stage in stages]
        return found[-1].name

    def downstream(self, name: str) -> list[Node]:
        """Return every node that depends on a node, itself excluded, in plan order."""
        reached = {name}
        for node in self.nodes:
            if reached & set(node.after):
                reached.add(node.name)
        return [node for node in self.nodes if node.name in reached and node.name != name]

    def upstream(self, name: str) -> list[Node]:
        """Return every node that a node depends on, itself included, in plan order."""
        wanted = {name}
        for node in reversed(self.nodes):
            if node.name in wanted:
                wanted |= set(node.after)
        return [node for node in self.nodes if node.name in wanted]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as it is written to plan.json."""
        rounds = [
            {
                "round": item.round,
                "stage": item.stage,
                "batches": list(item.batches),
                "sampling_jobs": item.sampling_jobs,
                "as_of": item.as_of,
            }
            for item in self.rounds
        ]
        nodes = [node.to_json() for node in self.nodes]
        head = {"run": self.run, "recipe": self.recipe, "as_of": self.as_of}
        return {**head, "rounds": rounds, "nodes": nodes}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Plan:
        """Read a plan from plan.json."""
        rounds = tuple(
            Round(
                item["round"],
                item["stage"],
                tuple(item["batches"]),
                item.get("sampling_jobs", 1),
                item.get("as_of", 0),
            )
            for item in tree["rounds"]
        )
        nodes = tuple(Node.from_json(row) for row in tree["nodes"])
        return cls(tree["run"], tree["recipe"], rounds, nodes, tree.get("as_of", 0))


def parse_symbol(symbol: str) -> tuple[str, str]:
    """Split `promoted(2)` into its name and its argument ("" without one)."""
    match = SYMBOL.fullmatch(symbol)
    assert match is not None, symbol
    return match.group(1), match.group(2) or ""


def build_plan(
    config: Config, listing: Listing, previous: Plan | None, *, started: int = -1
) -> Plan:
    """Plan a run, or extend its previous plan by the rounds that new batches or limits allow.

    `started` is the newest round of which a node has started, 0 for the nodes before the first, -1
    for none: up to there corrections and withdrawals stay as they were, later rounds take in all.
    Raises ConfigError when the previous plan belongs to another recipe.
    """
    if previous is not None and previous.recipe != config.recipe:
        raise ConfigError(
            f"recipe={config.recipe} cannot be used for run={config.run}, which started as "
            f"recipe={previous.recipe}: choose another run=NAME"
        )
    known = newest(listing)
    rounds = tuple(
        item if item.round <= started else replace(item, as_of=known)
        for item in _extend_rounds(config, listing, previous.rounds if previous else ())
    )
    as_of = previous.as_of if previous is not None and started >= 0 else known
    return Plan(config.run, config.recipe, rounds, _Wiring(config, rounds).nodes(), as_of)


def check_sets(config: Config, listing: Listing) -> None:
    """Refuse a plan whose sets are not in the store; raises ConfigError with the command to run."""
    needed = {
        "sft": not config.sft.skip,
        "prompts": True,
        "open": config.judge.data is JudgeData.open,
    }
    for kind, is_needed in needed.items():
        if is_needed and not listing[kind]:
            choice = " (or set judge.data=batches judge.share=0.2)" if kind == "open" else ""
            raise ConfigError(
                f"data.stream={config.data.stream} in paths.store={config.paths.store} holds no "
                f"{kind} set: add one with `rlhf ingest FILE ingest.kind={kind} "
                f"ingest.stream={config.data.stream}`{choice}"
            )


def waiting_batches(plan: Plan, listing: Listing) -> list[str]:
    """Return the ingested batches that no round uses yet."""
    used = {name for item in plan.rounds for name in item.batches}
    return [name for name in listing["batch"] if name not in used]


def _extend_rounds(
    config: Config, listing: Listing, before: tuple[Round, ...]
) -> tuple[Round, ...]:
    rounds = list(before)
    limit = config.rounds.limit
    used = {name for item in rounds for name in item.batches}
    unused = [name for name in listing["batch"] if name not in used]
    size = config.rounds.batches_per_round
    while limit is None or len(rounds) < limit:
        number = len(rounds) + 1
        if config.collect.annotators is Annotators.simulated:
            batches = [batch_id(number)]
        else:
            batches, unused = unused[:size], unused[size:]
        if len(batches) < size:
            break
        stage = config.rounds.schedule[(number - 1) % len(config.rounds.schedule)]
        jobs = 1 if stage is RoundStage.ppo else config.rounds.sampling_jobs
        rounds.append(Round(number, stage.name, tuple(batches), jobs))
    return tuple(rounds)


def batch_id(round_: int) -> str:
    """Return the name of the batch that simulated annotators deliver for a round."""
    return f"round-{round_:02d}"


def node_name(round_: int, name: str) -> str:
    """Return the name of a node of a round."""
    return f"round-{round_:02d}/{name}"


class _Wiring:
    """Derives the nodes from the rounds: who reads what, and who therefore waits for whom."""

    def __init__(self, config: Config, rounds: tuple[Round, ...]) -> None:
        self.config = config
        self.rounds = rounds
        self.simulated = config.collect.annotators is Annotators.simulated
        path = config.reward.path
        self.given = {"helpfulness": path.helpfulness, "safety": path.safety}

    def nodes(self) -> tuple[Node, ...]:
        found = []
        if not self.config.sft.skip:
            found.append(self._node("sft", "sft", 0, {"base": "model", "sft": "set(sft)"}))
        for item in self.rounds:
            found += self._round(item)
        return tuple(found)

    def _round(self, item: Round) -> list[Node]:
        k = item.round
        nodes = [self._collect(k, newest=k - 1)] if self.simulated else []
        nodes += [self._reward(k, axis) for axis in AXES if self.given[axis] is None]
        stage = RoundStage[item.stage]
        if stage is not RoundStage.ppo:
            samples = self._samples(k, item.sampling_jobs) if item.sampling_jobs > 1 else []
            nodes += [*self._sweep(k), *samples, self._rejection(k, samples)]
        if stage is not RoundStage.rejection:
            start = self._output(k, "rejection") if stage is RoundStage.rejection_ppo else ""
            nodes.append(self._ppo(k, start or f"promoted({k - 1})"))
        # The judges come last: beside the longer policy stage they fill a second slot.
        nodes += [self._judge(k, axis) for axis in AXES]
        nodes.append(self._evaluate(k))
        return nodes if self.simulated else [*nodes, self._collect(k, newest=k)]

    def _collect(self, k: int, *, newest: int) -> Node:
        inputs = {
            "newest": f"version({newest})",
            "other": f"version({max(newest - 1, 0)})",
            "prompts": "set(prompts)",
        }
        batch = {"batch": batch_id(k)} if self.simulated else {}
        return self._node(node_name(k, "collect"), "collect", k, inputs, batch)

    def _reward(self, k: int, axis: str) -> Node:
        inputs = {"init": f"promoted({k - 1})"}
        if k > 1:
            inputs["previous"] = self._output(k - 1, f"reward-{axis}")
        inputs |= {"batches": f"batches({k})", "open": "set(open)"}
        options = {"axis": axis, "role": "reward"}
        return self._node(node_name(k, f"reward-{axis}"), "reward", k, inputs, options)

    def _judge(self, k: int, axis: str) -> Node:
        inputs = {"init": f"promoted({k - 1})"}
        if k > 1:
            inputs["previous"] = self._output(k - 1, f"judge-{axis}")
        inputs |= {"batches": f"batches({k})", "open": "set(open)"}
        options = {"axis": axis, "role": "judge"}
        return self._node(node_name(k, f"judge-{axis}"), "reward", k, inputs, options)

    def _sweep(self, k: int) -> list[Node]:
        """Return the node that chooses the round's temperature, where there is a choice."""
        if not self.config.rejection.temperatures:
            return []
        inputs = {
            "policy": f"promoted({k - 1})",
            **self._scorers(k),
            "prompts": "set(prompts)",
        }
        options = {"for": node_name(k, "rejection")}
        return [self._node(node_name(k, "sweep"), "sweep", k, inputs, options)]

    def _temperature(self, k: int) -> dict[str, str]:
        has_sweep = bool(self.config.rejection.temperatures)
        return {"sweep": f"node({node_name(k, 'sweep')})"} if has_sweep else {}

    def _samples(self, k: int, number: int) -> list[Node]:
        """Return the nodes that sample side by side for the round's rejection node."""
        inputs = {
            "policy": f"promoted({k - 1})",
            **self._scorers(k),
            **self._temperature(k),
            "prompts": "set(prompts)",
        }
        made_for = node_name(k, "rejection")
        return [
            self._node(
                node_name(k, f"sample-{shard}"),
                "sample",
                k,
                inputs,
                {"shard": shard, "of": number, "for": made_for},
            )
            for shard in range(number)
        ]

    def _rejection(self, k: int, samples: Sequence[Node]) -> Node:
        init = {
            RejectionInit.promoted: f"promoted({k - 1})",
            RejectionInit.sft: "version(0)",
            RejectionInit.base: "model",
        }[self.config.rejection.init]
        inputs = {"policy": f"promoted({k - 1})", "init": init, **self._scorers(k)}
        inputs |= self._temperature(k)
        inputs |= {f"sampled_{n}": f"node({node.name})" for n, node in enumerate(samples)}
        earlier = [
            item.round
            for item in self.rounds
            if item.round < k and item.stage != RoundStage.ppo.name
        ]
        inputs |= {f"pool_{j}": f"node({node_name(j, 'rejection')})" for j in earlier}
        inputs["prompts"] = "set(prompts)"
        if self.config.rejection.sft_share > 0:
            inputs["sft"] = "set(sft)"
        return self._node(node_name(k, "rejection"), "rejection", k, inputs)

    def _ppo(self, k: int, start: str) -> Node:
        scorers = self._scorers(k)
        critic = {
            CriticInit.helpfulness: scorers["reward_helpfulness"],
            CriticInit.safety: scorers["reward_safety"],
            CriticInit.policy: start,
        }[self.config.ppo.critic_init]
        reference = start if self.config.ppo.reference is Reference.start else "version(0)"
        inputs = {"policy": start, "reference": reference, "critic": critic, **scorers}
        inputs["prompts"] = "set(prompts)"
        return self._node(node_name(k, "ppo"), "ppo", k, inputs)

    def _evaluate(self, k: int) -> Node:
        inputs = {
            "candidate": f"version({k})",
            "promoted": f"promoted({k - 1})",
            "judge_helpfulness": self._output(k, "judge-helpfulness"),
            "judge_safety": self._output(k, "judge-safety"),
            **self._scorers(k),
            **{f"history_{j}": f"node({node_name(j, 'evaluate')})" for j in range(1, k)},
        }
        if self.rounds[k - 1].stage != RoundStage.rejection.name:
            inputs["ppo"] = f"node({node_name(k, 'ppo')})"
        inputs["prompts"] = "set(prompts)"
        return self._node(node_name(k, "evaluate"), "evaluate", k, inputs)

    def _scorers(self, k: int) -> dict[str, str]:
        return {
            f"reward_{axis}": f"path({axis})"
            if self.given[axis] is not None
            else self._output(k, f"reward-{axis}")
            for axis in AXES
        }

    def _output(self, k: int, name: str) -> str:
        return f"output({node_name(k, name)})"

    def _node(
        self,
        name: str,
        stage: str,
        k: int,
        inputs: Mapping[str, str],
        options: Mapping[str, Any] | None = None,
    ) -> Node:
        after: list[str] = []
        if k > 0 and stage != "collect":
            after += self._waits_for(f"promoted({k - 1})")
        for symbol in inputs.values():
            after += self._waits_for(symbol)
        return Node(name, stage, k, tuple(dict.fromkeys(after)), dict(inputs), options or {})

    def _waits_for(self, symbol: str) -> list[str]:
        name, argument = parse_symbol(symbol)
        if name in ("output", "node"):
            return [argument]
        if name == "promoted" and int(argument) > 0:
            return [node_name(int(argument), "evaluate")]
        if name in ("promoted", "version") and int(argument) == 0:
            return [] if self.config.sft.skip else ["sft"]
        if name == "version":
            stage = self.rounds[int(argument) - 1].stage
            return [node_name(int(argument), "rejection" if stage == "rejection" else "ppo")]
        if name == "batches" and self.simulated:
            return [node_name(int(argument), "collect")]
        return []
