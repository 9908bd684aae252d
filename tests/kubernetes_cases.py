"""What the golden files of the Kubernetes launcher hold.

Run `python tests/kubernetes_cases.py` only when the manifests are meant to change, and say why in
the commit that changes tests/golden/kubernetes/.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from rlhf import compose
from rlhf.config import Config
from rlhf.launch.kubernetes import KubernetesLauncher
from rlhf.plan import build_plan

FOLDER = Path(__file__).parent / "golden" / "kubernetes"

PLACE = ("launcher=kubernetes", "paths.runs=/data/runs", "paths.store=/data/store")
GPUS = ("processes=8", "cpus=12", "gpus=1", "memory=900G", "time=1-12")
MACHINES = tuple(f"resources.ppo.{text}" for text in ("nodes=2", *GPUS))

CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "one": (("sft",), ()),
    "reward_gpus": (
        ("round-01/reward-helpfulness", "round-01/reward-safety"),
        (
            *(f"resources.reward.{text}" for text in GPUS),
            "launcher.kubernetes.image=registry.example/rlhf:cuda",
            "launcher.kubernetes.secrets=[wandb]",
            "launcher.kubernetes.tolerations=[nvidia.com/gpu,'pool=training']",
            "launcher.kubernetes.node_selector=['pool=training']",
            "launcher.setup=['export NCCL_DEBUG=WARN']",
        ),
    ),
    "ppo_indexed": (("round-02/ppo",), MACHINES),
    "ppo_jobset": (("round-02/ppo",), (*MACHINES, "launcher.kubernetes.jobset=true")),
    "kueue": (
        ("sft", "round-02/ppo"),
        (*MACHINES, "launcher.kubernetes.jobset=true", "launcher.kubernetes.queue=training"),
    ),
}
"""Name of the golden file to nodes and overrides."""


@cache
def config_of(*overrides: str) -> Config:
    """Return the quickstart's configuration for a cluster."""
    return compose.load(["recipe=quickstart", *PLACE, *overrides])


def rendered(case: str) -> str:
    """Return what `rlhf launch dry_run=true` prints for some nodes of the quickstart."""
    names, overrides = CASES[case]
    config = config_of(*overrides)
    plan = build_plan(config, {"batch": {}}, None)
    return KubernetesLauncher(config).render([plan.node(name) for name in names], [])


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        (FOLDER / f"{case}.yaml").write_text(rendered(case), encoding="utf-8")


if __name__ == "__main__":
    main()
