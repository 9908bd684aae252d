"""What Kubernetes is told about a node: a Job, an Indexed Job with a Service, or a JobSet.

Pure functions from configuration and node to manifests. What a site may want to change without
changing code stands in jobs/kubernetes/job.yaml; the fields made here are laid over it.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from rlhf.compose import run_dir
from rlhf.config import Config
from rlhf.errors import STOPPED_EXIT
from rlhf.launch.kubernetes_settings import quantity, seconds, selector, toleration
from rlhf.launch.ranks import MACHINE
from rlhf.launch.slurm import cpus_per_process
from rlhf.lease import LEASE
from rlhf.nodes import Node

Manifest = dict[str, Any]

RUN_LABEL, NODE_ANNOTATION, STAGE_LABEL = "rlhf/run", "rlhf/node", "rlhf/stage"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
CONTAINER, MACHINES = "main", "node"
PORT = 29500
BAD_INPUT_EXIT = 2

LONGEST_NAME = 45
"""Pods add up to 18 characters to the name of their JobSet, and a host name ends at 63."""
NUMBER_LIKE = re.compile(r"[-+.]?\d")

STARTED = "/tmp/started"
START_SECONDS = 900
"""Time for the imports and for a killed predecessor's lease, besides the meeting of processes."""
STARTED_TEST = f'test -n "$(find "$0" -newer {STARTED})"'
ALIVE_TEST = 'test -n "$(find "$0" -mmin -5)"'
"""The lease is renewed every 10 s, and after 120 s of silence anyone may take it over."""

SCRIPT = """\
set -e
trap 'exit {stopped}' TERM
{setup}# A killed predecessor cannot give its lease back: wait until it counts no longer.
while test -n "$(find {lease} -mmin -3 2>/dev/null)"; do sleep 5; done
touch {started}
exec {command}
"""


def run_key(config: Config) -> str:
    """Return the label of all objects of a run; it starts with a letter, so YAML keeps it text."""
    place = f"{config.launcher.kubernetes.claim}:{run_dir(config).as_posix()}"
    return "r" + hashlib.blake2b(place.encode(), digest_size=6).hexdigest()


def object_name(config: Config, node: Node) -> str:
    """Return the name of a node's Job or JobSet, the same each time."""
    digest = hashlib.blake2b(f"{run_key(config)}/{node.name}".encode(), digest_size=4).hexdigest()
    words = re.sub(r"[^a-z0-9]+", "-", node.name.lower())
    return f"rlhf-{words[: LONGEST_NAME - 14].strip('-')}-{digest}"


def object_id(config: Config, node: Node) -> str:
    """Return how kubectl calls a node's object, such as job/rlhf-sft-0a1b2c3d."""
    kind = "jobset" if _is_jobset(config, node) else "job"
    return f"{kind}/{object_name(config, node)}"


def _is_jobset(config: Config, node: Node) -> bool:
    return config.launcher.kubernetes.jobset and config.resources.of(node.stage).nodes > 1


def manifests(config: Config, node: Node, template: Mapping[str, Any]) -> list[Manifest]:
    """Return the objects of one node: its Service first, where it has one."""
    job = overlay(dict(template), _job(config, node))
    if _is_jobset(config, node):
        return [_jobset(config, job)]
    if config.resources.of(node.stage).nodes > 1:
        return [_service(config, node), job]
    return [job]


def overlay(base: Any, top: Any) -> Any:
    """Lay fields over a template's: mappings by key, lists of objects by name, the rest replaced.

    Objects without a name, such as tolerations, follow those of the template.
    """
    if isinstance(base, dict) and isinstance(top, dict):
        laid = {key: overlay(base[key], top[key]) if key in base else top[key] for key in top}
        return laid | {key: base[key] for key in base if key not in top}
    if isinstance(base, list) and isinstance(top, list) and all(isinstance(i, dict) for i in base):
        found = list(base)
        places = {_list_key(item): place for place, item in enumerate(base)}
        for item in top:
            place = places.get(_list_key(item)) if _list_key(item) else None
            if place is None:
                found.append(item)
            else:
                found[place] = overlay(base[place], item)
        return found
    return top


def _list_key(item: Mapping[str, Any]) -> str | None:
    """Return what Kubernetes itself tells the entries of such a list apart by."""
    key: str | None = item.get("mountPath", item.get("name"))
    return key


def dump(objects: list[Manifest]) -> str:
    """Return manifests as YAML documents."""
    text: str = yaml.dump_all(
        objects, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=100
    )
    return text


class _Dumper(yaml.SafeDumper):
    """Writes scripts as blocks, and quotes what some YAML parser could take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else "'" if NUMBER_LIKE.match(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _job(config: Config, node: Node) -> Manifest:
    resources = config.resources.of(node.stage)
    retries = config.launcher.retries
    spec: Manifest = {
        # Which failures come again is the launcher's to judge. On several machines it cannot: when
        # one is lost, the pods of the others fail too, and their exit codes say error.
        "backoffLimit": retries.node_failure * resources.nodes if resources.nodes > 1 else 0,
        "podFailurePolicy": {"rules": _failure_rules(retries.preempted > 0)},
    }
    limit = seconds(resources.time)
    if limit is not None:
        spec["activeDeadlineSeconds"] = limit
    if resources.nodes > 1:
        spec |= {"completionMode": "Indexed"}
        spec |= {"completions": resources.nodes, "parallelism": resources.nodes}
    labels = _labels(config, node)
    queue = config.launcher.kubernetes.queue
    if queue is not None:
        spec["suspend"] = True
    identity = {"labels": labels, "annotations": {NODE_ANNOTATION: node.name}}
    spec["template"] = {"metadata": identity, "spec": _pod(config, node)}
    metadata = {
        "name": object_name(config, node),
        "namespace": config.launcher.kubernetes.namespace,
        "labels": {**labels, **({QUEUE_LABEL: queue} if queue is not None else {})},
        "annotations": {NODE_ANNOTATION: node.name},
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _labels(config: Config, node: Node) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "rlhf",
        "app.kubernetes.io/instance": config.run[:63].rstrip("._-"),
        RUN_LABEL: run_key(config),
        STAGE_LABEL: node.stage,
    }


def _failure_rules(is_retried: bool) -> list[Manifest]:
    """Return what an ended pod means: first match wins, no match counts against backoffLimit."""

    def on_exit(code: int, action: str) -> Manifest:
        codes = {"containerName": CONTAINER, "operator": "In", "values": [code]}
        return {"action": action, "onExitCodes": codes}

    bad_input = on_exit(BAD_INPUT_EXIT, "FailJob")
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    preempted = {"action": "Ignore", "onPodConditions": disrupted}
    stopped = on_exit(STOPPED_EXIT, "Ignore")
    return [bad_input, preempted, stopped] if is_retried else [bad_input]


def _pod(config: Config, node: Node) -> Manifest:
    settings = config.launcher.kubernetes
    resources = config.resources.of(node.stage)
    volumes: list[Manifest] = [
        {"name": "data", "persistentVolumeClaim": {"claimName": settings.claim}},
        {"name": "tmp", "emptyDir": {}},
    ]
    if resources.processes > 1:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    pod: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": config.launcher.grace_seconds,
        "containers": [_container(config, node)],
        "volumes": volumes,
    }
    if resources.nodes > 1 and not settings.jobset:
        pod["subdomain"] = run_key(config)
    if settings.tolerations:
        pod["tolerations"] = [toleration(text) for text in settings.tolerations]
    if settings.node_selector:
        pod["nodeSelector"] = dict(selector(text) for text in settings.node_selector)
    return pod


def _container(config: Config, node: Node) -> Manifest:
    settings = config.launcher.kubernetes
    resources = config.resources.of(node.stage)
    amounts = {"cpu": str(cpus_per_process(resources, config) * resources.processes)}
    if resources.memory is not None:
        amounts["memory"] = quantity(resources.memory)
    if resources.gpus:
        amounts[settings.gpu_resource] = str(resources.gpus * resources.processes)
    mounts = [
        {"name": "data", "mountPath": settings.mount_path},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if resources.processes > 1:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    container: Manifest = {
        "name": CONTAINER,
        "image": settings.image,
        "command": ["sh", "-c", _script(config, node)],
        "workingDir": "/tmp",
        "resources": {"requests": amounts, "limits": dict(amounts)},
        **_probes(config, node),
        "volumeMounts": mounts,
    }
    if resources.nodes > 1:
        container["env"] = _meeting(config, node)
    if settings.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in settings.secrets]
    return container


def _script(config: Config, node: Node) -> str:
    run = [f"run={config.run}", f"paths.runs={config.paths.runs}"]
    return SCRIPT.format(
        stopped=STOPPED_EXIT,
        setup="".join(f"{line}\n" for line in config.launcher.setup),
        lease=shlex.quote(_lease(config, node)),
        started=STARTED,
        command=shlex.join(["rlhf", "stage", node.name, *run]),
    )


def _lease(config: Config, node: Node) -> str:
    return (run_dir(config) / node.name / LEASE).as_posix()


def _probes(config: Config, node: Node) -> Manifest:
    """Return probes of the node's sign of life; a pod on another machine sees the first one's."""
    lease = _lease(config, node)
    budget = config.distributed.timeout_seconds + START_SECONDS
    return {
        "startupProbe": {
            "exec": {"command": ["sh", "-c", STARTED_TEST, lease]},
            "periodSeconds": 10,
            "timeoutSeconds": 10,
            "failureThreshold": math.ceil(budget / 10),
        },
        "livenessProbe": {
            "exec": {"command": ["sh", "-c", ALIVE_TEST, lease]},
            "periodSeconds": 60,
            "timeoutSeconds": 30,
            "failureThreshold": 3,
        },
    }


def _meeting(config: Config, node: Node) -> list[Manifest]:
    """Return the variables that tell the machines of a node who they are and where to meet."""
    name = object_name(config, node)
    settings = config.launcher.kubernetes
    # A JobSet names its own Service after itself, and its pods after the Job inside it.
    first = f"{name}-{MACHINES}-0-0.{name}" if settings.jobset else f"{name}-0.{run_key(config)}"
    return [
        {"name": MACHINE, "valueFrom": {"fieldRef": {"fieldPath": INDEX}}},
        {"name": "MASTER_ADDR", "value": first},
        {"name": "MASTER_PORT", "value": str(PORT)},
    ]


def _service(config: Config, node: Node) -> Manifest:
    """Return the Service that gives the pods of a run names; it has no address of its own.

    One per run, because nothing deletes a Service together with a Job.
    """
    labels = {name: text for name, text in _labels(config, node).items() if name != STAGE_LABEL}
    metadata = {
        "name": run_key(config),
        "namespace": config.launcher.kubernetes.namespace,
        "labels": labels,
    }
    # Pods look for each other before their startup probe lets them count as ready.
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {RUN_LABEL: run_key(config)},
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def _jobset(config: Config, job: Manifest) -> Manifest:
    """Put an Indexed Job into a JobSet, which starts all machines again when one is lost."""
    inner = {**job["spec"], "backoffLimit": 0}
    outer = {
        name: inner.pop(name) for name in ("suspend", "ttlSecondsAfterFinished") if name in inner
    }
    metadata = job["metadata"]
    kept = {name: text for name, text in metadata["labels"].items() if name != QUEUE_LABEL}
    identity = {"labels": kept, "annotations": metadata["annotations"]}
    final = {
        "name": "final",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
    }
    spec = {
        **outer,
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": config.launcher.retries.node_failure,
            "rules": [final],
        },
        "replicatedJobs": [
            {"name": MACHINES, "replicas": 1, "template": {"metadata": identity, "spec": inner}}
        ],
    }
    kind = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}
    return {**kind, "metadata": metadata, "spec": spec}
