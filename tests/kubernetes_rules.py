"""What is wrong with a manifest: real schemas, and the rules that schemas do not state."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

VERSIONS = ("1.31", "1.37")
"""The oldest version with everything that is used, and the newest that the validator knows."""

NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
POD_SUFFIX = len("-node-0-999-abcde")


def wrong_schema(manifest: dict[str, Any]) -> list[str]:
    """Return what the schemas refuse: unknown fields, wrong types, missing fields."""
    if manifest["kind"] == "JobSet":
        return [*_wrong_jobset(manifest), *wrong_schema(_inner_job(manifest))]
    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {error.message}")
    return found


def _wrong_jobset(manifest: dict[str, Any]) -> list[str]:
    try:
        model = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(manifest))
    except ValueError as error:
        return [str(error)]
    assert model is not None
    # The model drops what it does not know, so only the way back shows a misspelt field.
    return [] if model.to_dict() == manifest else ["a field that JobSet does not have"]


def _inner_job(jobset: dict[str, Any]) -> dict[str, Any]:
    (inner,) = jobset["spec"]["replicatedJobs"]
    metadata = {**inner["template"].get("metadata", {}), "name": jobset["metadata"]["name"]}
    spec = inner["template"]["spec"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def broken_rules(manifests: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what an API server, or a cluster, refuses although the schemas allow it."""
    services = {item["metadata"]["name"]: item for item in manifests if item["kind"] == "Service"}
    for item in manifests:
        name = item["metadata"]["name"]
        if not NAME.fullmatch(name):
            yield f"{name} is no DNS label"
        for text in item["metadata"].get("labels", {}).values():
            if not LABEL.fullmatch(text):
                yield f"{text} is no label"
        if item["kind"] == "JobSet":
            yield from _broken_jobset(item)
            yield from _broken_job(_inner_job(item))
        elif item["kind"] == "Job":
            yield from _broken_job(item)
            yield from _broken_network(item, services)


def _broken_jobset(jobset: dict[str, Any]) -> Iterator[str]:
    name, spec = jobset["metadata"]["name"], jobset["spec"]
    (inner,) = spec["replicatedJobs"]
    if len(name) + POD_SUFFIX > 63:
        yield f"pods of {name} get no host name"
    if inner["template"]["spec"].get("suspend"):
        yield "the JobSet is to be suspended, not the Job inside it"
    first = f"{name}-{inner['name']}-0-0.{name}"
    if _environment(_inner_job(jobset)).get("MASTER_ADDR", {}).get("value") != first:
        yield "MASTER_ADDR is not the JobSet's first pod"


def _broken_job(job: dict[str, Any]) -> Iterator[str]:
    spec = job["spec"]
    pod = spec["template"]["spec"]
    if "podFailurePolicy" in spec and pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy needs restartPolicy Never"
    if spec.get("completionMode") == "Indexed" and spec["completions"] != spec["parallelism"]:
        yield "machines that do not run at the same time cannot meet"
    containers = {container["name"]: container for container in pod["containers"]}
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        yield from _broken_rule(rule, set(containers))
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in containers.values():
        if not {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes:
            yield "a mount without a volume"
        places = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        names = [entry["name"] for entry in container.get("env", [])]
        if len({*places}) < len(places) or len({*names}) < len(names):
            yield "a mount path or variable twice"
        if container["resources"]["limits"] != container["resources"]["requests"]:
            yield "limits and requests of a GPU differ"
        yield from _broken_security(pod, container)
    if any("suspend" in place for place in (pod, spec["template"])):
        yield "suspend stands in the wrong place"


def _broken_rule(rule: dict[str, Any], containers: set[str]) -> Iterator[str]:
    if rule["action"] not in ("FailJob", "Ignore", "Count"):
        yield f"{rule['action']} is not allowed without backoffLimitPerIndex"
    if ("onExitCodes" in rule) == ("onPodConditions" in rule):
        yield "a rule needs either exit codes or conditions"
    codes = rule.get("onExitCodes", {}).get("values", [1])
    if codes != sorted({*codes}) or 0 in codes:
        yield "exit codes must be sorted, unique and not 0"
    if rule.get("onExitCodes", {}).get("containerName", next(iter(containers))) not in containers:
        yield "a rule for a container that is not there"


def _broken_security(pod: dict[str, Any], container: dict[str, Any]) -> Iterator[str]:
    """Yield what the `restricted` Pod Security Standard refuses."""
    outer, inner = pod["securityContext"], container["securityContext"]
    if not outer.get("runAsNonRoot") or outer.get("runAsUser") == 0:
        yield "it may run as root"
    if inner.get("allowPrivilegeEscalation") is not False:
        yield "it may gain privileges"
    if inner.get("capabilities") != {"drop": ["ALL"]}:
        yield "it keeps capabilities"
    if outer.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "it has no seccomp profile"
    if inner.get("readOnlyRootFilesystem") is not True:
        yield "its root file system can be written"


def _broken_network(job: dict[str, Any], services: dict[str, Any]) -> Iterator[str]:
    spec = job["spec"]
    if spec.get("completionMode") != "Indexed":
        return
    subdomain = spec["template"]["spec"].get("subdomain")
    service = services.get(subdomain)
    if service is None:
        yield f"no Service {subdomain}"
        return
    labels = spec["template"]["metadata"]["labels"]
    if not service["spec"]["selector"].items() <= labels.items():
        yield "the Service does not select the pods"
    if service["spec"].get("clusterIP") != "None":
        yield "pods of a Service with an address have no names of their own"
    if not service["spec"].get("publishNotReadyAddresses"):
        yield "pods cannot find each other before their startup probe has passed"
    first = f"{job['metadata']['name']}-0.{subdomain}"
    if _environment(job).get("MASTER_ADDR", {}).get("value") != first:
        yield "MASTER_ADDR is not the Job's first pod"


def _environment(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return {entry["name"]: entry for entry in container.get("env", [])}
