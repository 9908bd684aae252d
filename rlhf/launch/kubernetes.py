"""Kubernetes: one Job per node of the plan, through kubectl.

Kubernetes has no order between Jobs, so a node is submitted when its parents are done. Every object
carries the run as a label and the node as an annotation, so that the cluster itself says which node
has a job already. Never run on a live cluster: see docs/kubernetes.md.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.compose import run_dir
from rlhf.config import Config
from rlhf.errors import STOPPED_EXIT, LauncherError
from rlhf.launch.failures import (
    BAD_INPUT,
    CANCELLED,
    ERROR,
    NODE_FAILURE,
    OUT_OF_MEMORY,
    PREEMPTED,
    TIME_LIMIT,
    classify,
)
from rlhf.launch.jobs import ENDED, PENDING, RUNNING, Job
from rlhf.launch.kubernetes_settings import check, read_template
from rlhf.launch.manifests import (
    CONTAINER,
    NODE_ANNOTATION,
    RUN_LABEL,
    dump,
    manifests,
    object_id,
    run_key,
)
from rlhf.nodes import Node
from rlhf.state import log_tail

CALL_SECONDS = 60.0
DELETE_SECONDS = 60
"""Time for the deletion of an ended job, besides the time its pods have to save."""

REASON_LENGTH = 160
INDEX = "batch.kubernetes.io/job-completion-index"
SIGNAL_EXITS = 192
"""Python ends with 256 - n where a child was ended by signal n."""

GOOD_ENDS, BAD_END = ("Complete", "Completed"), "Failed"
PREEMPTION_REASONS = ("PreemptionByScheduler", "EvictionByEvictionAPI")
"""Somebody else took the machine, or it is being drained; other disruptions are its failure."""

SEVEREST = (BAD_INPUT, OUT_OF_MEMORY, NODE_FAILURE, PREEMPTED, ERROR)
"""Which pod explains a job on several machines: where one fails, the others fail of its absence."""


class KubernetesLauncher:
    """Submits, finds and cancels the jobs of one run."""

    orders_jobs = False

    def __init__(self, config: Config) -> None:
        check(config)
        self._config = config
        self._folder = run_dir(config)
        self._template = read_template(config.launcher.template)

    def submit(self, nodes: Sequence[Node], after: Sequence[str]) -> dict[str, str]:
        """Submit nodes whose parents are done; returns the job id per node.

        A living job is adopted; an ended one of the same name makes room for the new one.
        """
        known = self.poll()
        alive = {name: job.id for name, job in known.items() if job.is_alive}
        wanted = [node for node in nodes if node.name not in alive]
        ended = [known[node.name].id for node in wanted if node.name in known]
        if ended:
            patience = self._config.launcher.grace_seconds + DELETE_SECONDS
            self._delete(ended, f"--timeout={patience}s", seconds=patience + CALL_SECONDS)
        if wanted:
            self._kubectl("apply", "--filename=-", text=self.render(wanted, after))
        return {node.name: alive.get(node.name, object_id(self._config, node)) for node in nodes}

    def poll(self) -> dict[str, Job]:
        """Return the newest job of each node that the cluster still remembers."""
        kinds = "jobs,jobsets,pods" if self._config.launcher.kubernetes.jobset else "jobs,pods"
        label = f"--selector={RUN_LABEL}={run_key(self._config)}"
        answer = self._kubectl("get", kinds, label, "--output=json")
        return read_jobs(json.loads(answer)["items"], self._folder)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs; their pods may save for launcher.grace_seconds."""
        if jobs:
            self._delete(sorted({job.id for job in jobs}), "--wait=false", seconds=CALL_SECONDS)

    def render(self, nodes: Sequence[Node], after: Sequence[str]) -> str:
        """Return the manifests of nodes as YAML; their order is the launcher's to keep."""
        found = [item for node in nodes for item in manifests(self._config, node, self._template)]
        once = {(item["kind"], item["metadata"]["name"]): item for item in found}
        return dump(list(once.values()))

    def _delete(self, ids: Sequence[str], *options: str, seconds: float) -> None:
        # In the foreground: a job is there until its last pod has ended.
        fixed = ("--ignore-not-found", "--cascade=foreground")
        self._kubectl("delete", *ids, *fixed, *options, seconds=seconds)

    def _kubectl(
        self, *arguments: str, text: str | None = None, seconds: float = CALL_SECONDS
    ) -> str:
        """Call kubectl; raises LauncherError when it is absent, refuses, or takes too long."""
        settings = self._config.launcher.kubernetes
        command = ["kubectl", f"--namespace={settings.namespace}", *arguments]
        try:
            done = subprocess.run(
                command, input=text, capture_output=True, text=True, timeout=seconds, check=False
            )
        except FileNotFoundError as error:
            raise LauncherError(
                "kubectl is not installed here: install it, or add it to the image of the "
                "controller (docs/kubernetes.md)"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise LauncherError(
                f"kubectl {arguments[0]} gave no answer in {seconds:g} s: the cluster is down or "
                "busy; the same command later goes on, and no job is submitted twice"
            ) from error
        if done.returncode != 0:
            raise LauncherError(
                f"kubectl {arguments[0]} failed: {' '.join(done.stderr.split())}; correct "
                "launcher.kubernetes.* or the rights of your account, then the same command goes on"
            )
        return done.stdout


def read_jobs(items: Iterable[Mapping[str, Any]], folder: Path) -> dict[str, Job]:
    """Turn the Jobs, JobSets and pods of a run into the newest job of each node."""
    objects = sorted(items, key=lambda item: item["metadata"]["creationTimestamp"])
    found: dict[str, Job] = {}
    for item in objects:
        name = item["metadata"].get("annotations", {}).get(NODE_ANNOTATION)
        if name is not None and item["kind"] != "Pod" and not _owner(item, "JobSet"):
            parts = [part for part in objects if _belongs(part, item, objects)]
            found[name] = _read_job(name, item, parts, log_tail(folder / name))
    return found


def _owner(item: Mapping[str, Any], kind: str) -> str | None:
    """Return the unique id of an object's owner of a kind."""
    owners = item["metadata"].get("ownerReferences", [])
    return next((owner["uid"] for owner in owners if owner["kind"] == kind), None)


def _belongs(
    part: Mapping[str, Any], whole: Mapping[str, Any], objects: Sequence[Mapping[str, Any]]
) -> bool:
    """Tell whether a pod, or a Job inside a JobSet, is part of a Job or JobSet."""
    top = whole["metadata"]["uid"]
    middle = {item["metadata"]["uid"] for item in objects if _owner(item, "JobSet") == top}
    return _owner(part, "JobSet") == top or _owner(part, "Job") in {top, *middle}


def _read_job(
    name: str, item: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], log: list[str]
) -> Job:
    """Read one Job or JobSet with its pods (and the Jobs inside it), oldest first."""
    number = f"{item['kind'].lower()}/{item['metadata']['name']}"
    conditions = _conditions(item)
    pods = [part for part in parts if part["kind"] == "Pod"]
    if any(end in conditions for end in GOOD_ENDS):
        return Job(name, number, ENDED, "Complete")
    if BAD_END in conditions:
        reasons = [_conditions(part).get(BAD_END, {}).get("reason") for part in [item, *parts]]
        if "DeadlineExceeded" in reasons:
            return Job(name, number, ENDED, "DeadlineExceeded", failure=TIME_LIMIT)
        failure, reason = _explain(pods, log)
        reason = reason or str(conditions[BAD_END].get("reason", BAD_END))
        return Job(name, number, ENDED, reason, failure=failure)
    if "deletionTimestamp" in item["metadata"]:
        return Job(name, number, ENDED, "deleted", failure=CANCELLED)
    if "Suspended" in conditions or item["spec"].get("suspend"):
        return Job(name, number, PENDING, "suspended until its queue admits it")
    if any(pod["status"].get("phase") == "Running" for pod in pods):
        return Job(name, number, RUNNING)
    waiting = [reason for pod in reversed(pods) if (reason := _why_waiting(pod))]
    return Job(name, number, PENDING, waiting[0] if waiting else "")


def _conditions(item: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the conditions of an object that hold, by type."""
    found = item.get("status", {}).get("conditions", [])
    return {condition["type"]: condition for condition in found if condition["status"] == "True"}


def _why_waiting(pod: Mapping[str, Any]) -> str:
    """Return why a pod does not run yet, in the words of the cluster."""
    waiting = [
        status["state"]["waiting"]
        for status in pod["status"].get("containerStatuses", [])
        if "waiting" in status["state"]
    ]
    unscheduled = [
        condition
        for condition in pod["status"].get("conditions", [])
        if condition["type"] == "PodScheduled" and condition["status"] == "False"
    ]
    for found in (*waiting, *unscheduled):
        text = ": ".join(found[key] for key in ("reason", "message") if found.get(key))
        return text[:REASON_LENGTH]
    return ""


def _explain(pods: Sequence[Mapping[str, Any]], log: list[str]) -> tuple[str, str]:
    """Return the kind of failure and the words for it, from the last pod of each machine."""
    last = {pod["metadata"]["annotations"].get(INDEX): pod for pod in pods}
    found = [_explain_pod(pod, log) for pod in last.values() if pod["status"]["phase"] == "Failed"]
    # A lost machine takes its pod with it; what is left then is the job's own word.
    return min(found, key=lambda pair: SEVEREST.index(pair[0]), default=(ERROR, ""))


def _explain_pod(pod: Mapping[str, Any], log: list[str]) -> tuple[str, str]:
    name, status = pod["metadata"]["name"], pod["status"]
    ends = [
        container["state"]["terminated"]
        for container in status.get("containerStatuses", [])
        if container["name"] == CONTAINER and "terminated" in container["state"]
    ]
    if any(end.get("reason") == "OOMKilled" for end in ends):
        return OUT_OF_MEMORY, f"OOMKilled in pod {name}"
    disruption = _conditions(pod).get("DisruptionTarget")
    if disruption is not None:
        reason = str(disruption.get("reason", status.get("reason", "")))
        return PREEMPTED if reason in PREEMPTION_REASONS else NODE_FAILURE, reason
    if not ends:
        return NODE_FAILURE, str(status.get("reason", f"pod {name} was lost"))
    code = ends[-1]["exitCode"]
    reason = f"exit code {code}, see `kubectl logs {name}`"
    if code == STOPPED_EXIT:
        return PREEMPTED, reason
    if code == 128 + 9:
        # Killed, but not for memory: it no longer answered its probe, and did not stop in time.
        return ERROR, reason
    return classify(code - 256 if code > SIGNAL_EXITS else code, log), reason
