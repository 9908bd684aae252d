"""The Kubernetes launcher, offline: golden manifests, real schemas, and a kubectl that records."""

from __future__ import annotations

import copy
import json
import os
import shlex
import subprocess
import time
from functools import reduce
from pathlib import Path
from typing import Any

import kubernetes_cases as cases
import pytest
import yaml
from kubernetes_rules import broken_rules, wrong_schema

from rlhf import compose
from rlhf.config import Config, Kubernetes, LauncherKind
from rlhf.errors import ConfigError, LauncherError
from rlhf.launch.jobs import ENDED, PENDING, RUNNING, Job, reconcile
from rlhf.launch.kubernetes import KubernetesLauncher
from rlhf.launch.kubernetes_settings import check, quantity, seconds, selector, toleration
from rlhf.launch.manifests import object_id, object_name, overlay, run_key
from rlhf.launch.operator import open_launcher
from rlhf.launch.templates import jobs_dir
from rlhf.nodes import Node
from rlhf.plan import build_plan

JOBSET = "launcher.kubernetes.jobset=true"
FILES = ("pvc", "rbac", "controller")


def golden(case: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((cases.FOLDER / f"{case}.yaml").read_text(encoding="utf-8")))


def file_of(name: str) -> list[dict[str, Any]]:
    path = jobs_dir() / "kubernetes" / f"{name}.yaml"
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def nodes_of(config: Config) -> tuple[Node, ...]:
    return build_plan(config, {"batch": {}}, None).nodes


def node_of(config: Config, name: str) -> Node:
    return build_plan(config, {"batch": {}}, None).node(name)


def rendered(name: str, *overrides: str) -> list[dict[str, Any]]:
    config = cases.config_of(*overrides)
    text = KubernetesLauncher(config).render([node_of(config, name)], [])
    return list(yaml.safe_load_all(text))


# --- manifests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.CASES)
def test_manifests_equal_the_golden_files(case: str) -> None:
    """Recorded by `python tests/kubernetes_cases.py`."""
    assert cases.rendered(case) == (cases.FOLDER / f"{case}.yaml").read_text(encoding="utf-8")


def test_there_is_no_golden_file_without_a_case() -> None:
    assert {path.stem for path in cases.FOLDER.iterdir()} == set(cases.CASES)


@pytest.mark.parametrize("case", cases.CASES)
def test_manifests_hold_against_schemas_and_rules(case: str) -> None:
    manifests = golden(case)
    assert [problem for item in manifests for problem in wrong_schema(item)] == []
    assert list(broken_rules(manifests)) == []


@pytest.mark.parametrize("name", FILES)
def test_the_files_to_apply_hold_against_schemas_and_rules(name: str) -> None:
    manifests = file_of(name)
    assert [problem for item in manifests for problem in wrong_schema(item)] == []
    assert list(broken_rules(manifests)) == []


SPEC = ("spec", "template", "spec")
INNER = ("spec", "replicatedJobs", 0, "template", "spec")
BY_SCHEMA: list[tuple[str, int, tuple[str | int, ...], Any]] = [
    ("one", 0, ("spec", "backofLimit"), 3),
    ("one", 0, ("spec", "backoffLimit"), "three"),
    ("one", 0, (*SPEC, "containers", 0, "readinesProbe"), {}),
    ("one", 0, (*SPEC, "containers", 0, "command"), "rlhf"),
    ("ppo_indexed", 0, ("spec", "selector"), ["rlhf"]),
    ("ppo_indexed", 1, ("spec", "completions"), "two"),
    ("ppo_jobset", 0, ("spec", "replicatedJobz"), []),
    ("ppo_jobset", 0, ("spec", "failurePolicy", "maxRestarts"), "five"),
    ("ppo_jobset", 0, (*INNER, "backofLimit"), 0),
    ("ppo_jobset", 0, (*INNER, "template", "spec", "tolerations"), [{"kee": "x"}]),
]
BY_RULES: list[tuple[str, int, tuple[str | int, ...], Any]] = [
    ("one", 0, (*SPEC, "restartPolicy"), "OnFailure"),
    ("one", 0, (*SPEC, "volumes"), []),
    ("one", 0, (*SPEC, "securityContext", "runAsUser"), 0),
    ("one", 0, (*SPEC, "containers", 0, "securityContext", "capabilities"), {}),
    ("one", 0, ("metadata", "name"), "round-01/sft"),
    ("one", 0, ("spec", "podFailurePolicy", "rules", 0, "action"), "FailIndex"),
    ("one", 0, ("spec", "podFailurePolicy", "rules", 0, "onExitCodes", "values"), [3, 2]),
    ("reward_gpus", 0, (*SPEC, "containers", 0, "resources", "limits"), {"nvidia.com/gpu": "1"}),
    ("ppo_indexed", 1, ("spec", "parallelism"), 1),
    ("ppo_indexed", 1, (*SPEC, "subdomain"), "elsewhere"),
    ("ppo_indexed", 0, ("spec", "selector"), {"rlhf/run": "other"}),
    ("ppo_indexed", 0, ("spec", "publishNotReadyAddresses"), False),
    ("ppo_jobset", 0, ("metadata", "name"), "x" * 60),
    ("kueue", 1, (*INNER, "suspend"), True),
]


def mutate(manifest: Any, path: tuple[str | int, ...], value: Any) -> None:
    for part in path[:-1]:
        manifest = manifest[part]
    manifest[path[-1]] = value


@pytest.mark.parametrize(("case", "number", "path", "value"), BY_SCHEMA)
def test_schemas_catch_typos_and_types(
    case: str, number: int, path: tuple[str | int, ...], value: Any
) -> None:
    manifests = golden(case)
    mutate(manifests[number], path, value)
    assert wrong_schema(manifests[number]) != []


@pytest.mark.parametrize(("case", "number", "path", "value"), BY_RULES)
def test_rules_catch_what_schemas_allow(
    case: str, number: int, path: tuple[str | int, ...], value: Any
) -> None:
    manifests = golden(case)
    mutate(manifests[number], path, value)
    assert list(broken_rules(manifests)) != []


def test_a_queue_suspends_and_labels_jobs_and_jobsets() -> None:
    for item in golden("kueue"):
        assert item["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
        assert item["spec"]["suspend"] is True


def test_several_machines_survive_the_loss_of_one() -> None:
    """Each loss ends every pod, so an Indexed Job counts all of them."""
    assert golden("ppo_indexed")[1]["spec"]["backoffLimit"] == 5 * 2
    assert golden("ppo_jobset")[0]["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert golden("reward_gpus")[0]["spec"]["backoffLimit"] == 0


def test_without_retries_a_preempted_pod_fails_its_job() -> None:
    (job,) = rendered("sft", "launcher.retries.preempted=0")
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])


def test_names_are_short_distinct_and_stable() -> None:
    config = cases.config_of("run=Odd_Run.name")
    names = [object_name(config, node) for node in nodes_of(config)]
    assert len({*names}) == len(names)
    assert max(map(len, names)) <= 45
    assert names == [object_name(config, node) for node in nodes_of(config)]
    long = Node("round-01/" + "x" * 70, "ppo", 1, (), {})
    assert len(object_name(config, long)) <= 45
    other = cases.config_of("run=other")
    assert object_name(other, long) != object_name(config, long)
    assert run_key(other) != run_key(config)
    assert run_key(cases.config_of("launcher.kubernetes.claim=other")) != run_key(cases.config_of())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("30", 1800),
        ("90:30", 5430),
        ("4:00:00", 14400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:05", 172805),
        ("0", None),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str | None, expected: int | None) -> None:
    assert seconds(text) == expected


def test_memory_is_binary_as_in_slurm() -> None:
    assert [quantity(text) for text in ("64G", "500M", "2T", "4096")] == [
        "64Gi",
        "500Mi",
        "2Ti",
        "4096Mi",
    ]


def test_tolerations_and_selectors() -> None:
    assert toleration("nvidia.com/gpu") == {"key": "nvidia.com/gpu", "operator": "Exists"}
    assert toleration("pool=a") == {"key": "pool", "operator": "Equal", "value": "a"}
    assert selector("pool=a") == ("pool", "a")


IMPOSSIBLE: list[tuple[str, Any, list[str]]] = [
    ("paths.runs", "runs", ["paths.runs=runs", "below /data"]),
    ("paths.runs", "/data", ["paths.runs=/data", "below /data"]),
    ("paths.runs", "/data/../etc", ["paths.runs=/data/../etc"]),
    ("paths.store", "/elsewhere/store", ["paths.store=/elsewhere/store", "claim=rlhf"]),
    ("launcher.kubernetes.mount_path", "data", ["mount_path=data", "/data"]),
    ("launcher.kubernetes.image", "", ["image=", "name a container image"]),
    ("launcher.kubernetes.image", "a b", ["image=a b"]),
    ("launcher.kubernetes.namespace", "Team_A", ["namespace=Team_A", "lower-case"]),
    ("launcher.kubernetes.claim", "My", ["claim=My"]),
    ("launcher.kubernetes.queue", "a/b", ["queue=a/b"]),
    ("launcher.kubernetes.secrets", ["Wandb"], ["secrets=Wandb"]),
    ("launcher.kubernetes.gpu_resource", "a b", ["gpu_resource=a b", "nvidia.com/gpu"]),
    ("launcher.kubernetes.tolerations", ["=x"], ["tolerations==x", "KEY=VALUE"]),
    ("launcher.kubernetes.tolerations", ["a=b=c"], ["tolerations=a=b=c"]),
    ("launcher.kubernetes.node_selector", ["gpu"], ["node_selector=gpu", "KEY=VALUE"]),
    ("launcher.template", "/nowhere.yaml", ["launcher.template=/nowhere.yaml", "job.yaml"]),
]


@pytest.mark.parametrize(("key", "value", "words"), IMPOSSIBLE)
def test_impossible_settings_are_refused_by_key_value_and_remedy(
    key: str, value: Any, words: list[str]
) -> None:
    config = copy.deepcopy(cases.config_of())
    check(config)
    *groups, name = key.split(".")
    setattr(reduce(getattr, groups, config), name, value)
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_template_keeps_what_is_not_filled_in(tmp_path: Path) -> None:
    template = file_of("job")[0]
    template["metadata"] = {"labels": {"team": "a", "rlhf/run": "mine"}}
    pod = template["spec"]["template"]["spec"]
    pod["restartPolicy"] = "Always"
    pod["tolerations"] = [{"key": "own", "operator": "Exists"}]
    pod["containers"].append({"name": "sidecar", "image": "x"})
    pod["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/more", "subPath": "m"}]
    pod["volumes"] = [{"name": "extra", "emptyDir": {}}]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(template))
    more = [f"launcher.template={path}", "launcher.kubernetes.tolerations=[gpu]"]
    (job,) = rendered("sft", *more)
    assert job["metadata"]["labels"]["team"] == "a"
    assert job["metadata"]["labels"]["rlhf/run"] == run_key(cases.config_of())
    found = job["spec"]["template"]["spec"]
    assert found["restartPolicy"] == "Never"
    assert [item["key"] for item in found["tolerations"]] == ["own", "gpu"]
    assert [item["name"] for item in found["containers"]] == ["main", "sidecar"]
    assert [item["name"] for item in found["volumes"]] == ["extra", "data", "tmp"]
    mounts = found["containers"][0]["volumeMounts"]
    assert [item["mountPath"] for item in mounts] == ["/more", "/data", "/tmp"]
    assert wrong_schema(job) == []


@pytest.mark.parametrize("text", ["kind: Pod", "- a", "a: [", ""])
def test_a_template_that_is_no_job_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"launcher\.template=.*mine\.yaml.*copy jobs/"):
        KubernetesLauncher(cases.config_of(f"launcher.template={path}"))


def test_fields_are_laid_over_a_template() -> None:
    base = {"a": 1, "b": {"c": 2, "d": 3}, "list": [{"name": "x", "v": 1}, {"name": "y"}]}
    top = {"b": {"c": 9}, "list": [{"name": "x", "w": 2}, {"name": "z"}], "words": ["q"]}
    assert overlay(base, top) == {
        "a": 1,
        "b": {"c": 9, "d": 3},
        "list": [{"name": "x", "v": 1, "w": 2}, {"name": "y"}, {"name": "z"}],
        "words": ["q"],
    }


def test_text_that_looks_like_a_number_stays_text() -> None:
    """Go's YAML reads 1e3 as a number where Python's does not."""
    config = cases.config_of("launcher.kubernetes.node_selector=['rack=1e3']")
    text = KubernetesLauncher(config).render([node_of(config, "sft")], [])
    assert "rack: '1e3'" in text


# --- what runs in a pod --------------------------------------------------------------------------


def script_of(job: dict[str, Any], folder: Path) -> str:
    """Return a pod's script with the volume and /tmp in a folder of the test."""
    script: str = job["spec"]["template"]["spec"]["containers"][0]["command"][2]
    return script.replace("/data/", f"{folder}/").replace("/tmp/started", f"{folder}/started")


def start_script(folder: Path, script: str) -> subprocess.Popen[str]:
    tools = folder / "bin"
    tools.mkdir()
    (tools / "rlhf").write_text('#!/bin/sh\necho "$X" "$@"\n')
    (tools / "rlhf").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["sh", "-c", script], env={"PATH": path}, stdout=subprocess.PIPE, text=True
    )


def test_the_script_runs_setup_and_then_the_node(tmp_path: Path) -> None:
    (job,) = rendered("sft", "launcher.setup=['export X=1']")
    script = script_of(job, tmp_path)
    output, _ = start_script(tmp_path, script).communicate(timeout=20)
    assert output == f"1 stage sft run=quickstart paths.runs={tmp_path}/runs\n"
    assert (tmp_path / "started").exists()


def test_the_script_waits_while_a_lease_counts_and_stops_on_request(tmp_path: Path) -> None:
    (job,) = rendered("sft")
    lease = tmp_path / "runs" / "quickstart" / "sft" / "lease.json"
    lease.parent.mkdir(parents=True)
    lease.touch()
    script = script_of(job, tmp_path).replace("sleep 5", "sleep 0.1")
    waiting = start_script(tmp_path, script)
    time.sleep(0.6)
    assert waiting.poll() is None
    assert not (tmp_path / "started").exists()
    waiting.terminate()
    assert waiting.wait(timeout=20) == 75


def test_the_script_goes_on_when_the_lease_is_silent(tmp_path: Path) -> None:
    (job,) = rendered("sft")
    lease = tmp_path / "runs" / "quickstart" / "sft" / "lease.json"
    lease.parent.mkdir(parents=True)
    lease.touch()
    old = time.time() - 200
    os.utime(lease, (old, old))
    output, _ = start_script(tmp_path, script_of(job, tmp_path)).communicate(timeout=20)
    assert output.split()[:2] == ["stage", "sft"]


def probe(job: dict[str, Any], name: str, folder: Path) -> bool:
    command = job["spec"]["template"]["spec"]["containers"][0][name]["exec"]["command"]
    assert command[3] == "/data/runs/quickstart/sft/lease.json"
    test = command[2].replace("/tmp/started", f"{folder}/started")
    command = [*command[:2], test, str(folder / "lease.json")]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


def test_probes_follow_the_lease(tmp_path: Path) -> None:
    (job,) = rendered("sft")
    started, lease = tmp_path / "started", tmp_path / "lease.json"
    now = time.time()

    def touch(path: Path, age: float) -> None:
        path.touch()
        os.utime(path, (now - age, now - age))

    assert not probe(job, "startupProbe", tmp_path)
    assert not probe(job, "livenessProbe", tmp_path)
    touch(started, 100)
    # A predecessor's lease is no sign of life of this pod.
    touch(lease, 130)
    assert not probe(job, "startupProbe", tmp_path)
    touch(lease, 20)
    assert probe(job, "startupProbe", tmp_path)
    assert probe(job, "livenessProbe", tmp_path)
    touch(lease, 400)
    assert not probe(job, "livenessProbe", tmp_path)


# --- kubectl -------------------------------------------------------------------------------------

KUBECTL = """\
#!/bin/sh
echo "$@" >> {folder}/calls
case "$2" in
  get) cat {folder}/get.json ;;
  apply) cat >> {folder}/applied.yaml ;;
esac
test ! -e {folder}/slow || sleep 5
test ! -e {folder}/error || {{ cat {folder}/error >&2; exit 1; }}
"""


class Cluster:
    """A kubectl that notes its calls and answers with what the test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "kubectl").write_text(KUBECTL.format(folder=shlex.quote(str(folder))))
        (folder / "kubectl").chmod(0o755)
        self.hold()

    def hold(self, *items: dict[str, Any]) -> None:
        answer = {"apiVersion": "v1", "kind": "List", "items": list(items)}
        (self.folder / "get.json").write_text(json.dumps(answer))

    def calls(self) -> list[str]:
        """Return the calls but `get`, each without its namespace."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        assert all(line.startswith("--namespace=default ") for line in lines)
        return [line.split(" ", 1)[1] for line in lines if " get " not in line]

    def applied(self) -> list[dict[str, Any]]:
        return list(yaml.safe_load_all((self.folder / "applied.yaml").read_text()))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    folder = tmp_path / "kubectl"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Cluster(folder)


def job_of(name: str, *, kind: str = "Job", age: int = 0, **status: Any) -> dict[str, Any]:
    """Return a node's Job or JobSet as the cluster shows it; `conditions` as type to reason."""
    config = cases.config_of(JOBSET, "resources.ppo.nodes=2")
    found = rendered(name, *([JOBSET, "resources.ppo.nodes=2"] if kind == "JobSet" else []))[-1]
    assert found["kind"] == kind
    found["metadata"] |= {
        "uid": f"uid-{object_name(config, node_of(config, name))}-{kind}-{age}",
        "creationTimestamp": f"2026-07-01T10:{59 - age:02}:00Z",
    }
    found["status"] = {**status, "conditions": conditions(status.get("conditions", {}))}
    return found


def conditions(found: dict[str, str]) -> list[dict[str, str]]:
    times = {"lastTransitionTime": "2026-07-01T11:00:00Z"}
    return [{"type": kind, "status": "True", "reason": why} | times for kind, why in found.items()]


def pod_of(job: dict[str, Any], phase: str, state: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a pod of a job; `state` is that of its container."""
    index = more.pop("index", None)
    template = job["spec"]["template"]
    annotations = dict(template["metadata"]["annotations"])
    if index is not None:
        annotations["batch.kubernetes.io/job-completion-index"] = str(index)
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"]}
    metadata = {
        "name": f"{job['metadata']['name']}-{more.pop('suffix', 'abcde')}",
        "labels": template["metadata"]["labels"],
        "annotations": annotations,
        "creationTimestamp": more.pop("created", "2026-07-01T10:59:30Z"),
        "ownerReferences": [{**owner, "uid": job["metadata"]["uid"], "controller": True}],
    }
    image = {"image": "rlhf:cpu", "imageID": "", "ready": False, "restartCount": 0}
    status = {"phase": phase, "conditions": conditions(more.pop("conditions", {})), **more}
    if state:
        status["containerStatuses"] = [{"name": "main", **image, "state": state}]
    spec = template["spec"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status}


def ended(code: int, reason: str = "Error") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason}}


def poll(cluster: Cluster, *items: dict[str, Any], more: tuple[str, ...] = ()) -> dict[str, Job]:
    for item in items:
        assert wrong_schema(item) == []
    cluster.hold(*items)
    return KubernetesLauncher(cases.config_of(*more)).poll()


FAILED = {"Failed": "BackoffLimitExceeded"}


@pytest.mark.parametrize(
    ("job", "pod", "expected"),
    [
        ({"conditions": {"Complete": "CompletionsReached"}}, None, (ENDED, "Complete", "")),
        ({"active": 1}, ("Running", {"running": {}}), (RUNNING, "", "")),
        ({}, None, (PENDING, "", "")),
        (
            {"conditions": {"Suspended": "JobSuspended"}},
            None,
            (PENDING, "suspended until its queue admits it", ""),
        ),
        (
            {"active": 1},
            ("Pending", {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}),
            (PENDING, "ImagePullBackOff: no such image", ""),
        ),
        (
            {"conditions": FAILED},
            ("Failed", ended(137, "OOMKilled")),
            (ENDED, "OOMKilled in pod", "out_of_memory"),
        ),
        ({"conditions": FAILED}, ("Failed", ended(1)), (ENDED, "exit code 1, see", "error")),
        ({"conditions": FAILED}, ("Failed", ended(137)), (ENDED, "exit code 137", "error")),
        ({"conditions": FAILED}, ("Failed", ended(247)), (ENDED, "exit code", "out_of_memory")),
        ({"conditions": FAILED}, ("Failed", ended(75)), (ENDED, "exit code 75", "preempted")),
        (
            {"conditions": {"Failed": "PodFailurePolicy"}},
            ("Failed", ended(2)),
            (ENDED, "exit code 2", "bad_input"),
        ),
        ({"conditions": FAILED}, None, (ENDED, "BackoffLimitExceeded", "error")),
        (
            {"conditions": {"Failed": "DeadlineExceeded"}},
            ("Failed", ended(75)),
            (ENDED, "DeadlineExceeded", "time_limit"),
        ),
    ],
)
def test_poll_reads_states_reasons_and_failures(
    cluster: Cluster,
    job: dict[str, Any],
    pod: tuple[str, dict[str, Any]] | None,
    expected: tuple[str, str, str],
) -> None:
    item = job_of("sft", **job)
    pods = [pod_of(item, *pod)] if pod is not None else []
    (found,) = poll(cluster, item, *pods).values()
    state, reason, failure = expected
    assert (found.node, found.id) == ("sft", f"job/{item['metadata']['name']}")
    assert (found.state, found.failure) == (state, failure)
    assert found.reason.startswith(reason)
    assert bool(reason) == bool(found.reason)


@pytest.mark.parametrize(
    ("reason", "failure"),
    [
        ("PreemptionByScheduler", "preempted"),
        ("EvictionByEvictionAPI", "preempted"),
        ("TerminationByKubelet", "node_failure"),
        ("DeletionByTaintManager", "node_failure"),
    ],
)
def test_a_disrupted_pod_is_not_an_error(cluster: Cluster, reason: str, failure: str) -> None:
    job = job_of("sft", conditions=FAILED)
    pod = pod_of(job, "Failed", ended(137), conditions={"DisruptionTarget": reason})
    (found,) = poll(cluster, job, pod).values()
    assert (found.failure, found.reason) == (failure, reason)


def test_an_unschedulable_pod_says_why(cluster: Cluster) -> None:
    job = job_of("sft", active=1)
    pod = pod_of(job, "Pending", {}, conditions={"PodScheduled": "Unschedulable"})
    pod["status"]["conditions"][0] |= {"status": "False", "message": "0/4 nodes have a GPU"}
    (found,) = poll(cluster, job, pod).values()
    assert (found.state, found.reason) == (PENDING, "Unschedulable: 0/4 nodes have a GPU")


def test_of_several_machines_the_one_that_failed_first_explains_the_job(cluster: Cluster) -> None:
    """The others fail too, because it is gone; and an earlier failure of a machine is history."""
    job = job_of("sft", conditions=FAILED)
    earlier = "2026-07-01T10:59:10Z"
    pods = [
        pod_of(job, "Failed", ended(2), index=0, suffix="0-old", created=earlier),
        pod_of(job, "Failed", ended(1), index=0, suffix="0-new"),
        pod_of(job, "Failed", ended(137, "OOMKilled"), index=1, suffix="1-new"),
    ]
    (found,) = poll(cluster, job, *pods).values()
    assert found.failure == "out_of_memory"


def test_the_newest_job_of_a_node_counts_and_a_deleted_one_is_cancelled(cluster: Cluster) -> None:
    old = job_of("sft", age=9, conditions=FAILED)
    new = job_of("sft")
    new["metadata"]["deletionTimestamp"] = "2026-07-01T11:00:00Z"
    (found,) = poll(cluster, new, old).values()
    assert (found.state, found.failure) == (ENDED, "cancelled")


def test_a_jobset_is_explained_by_the_job_and_pods_inside_it(cluster: Cluster) -> None:
    whole = job_of("round-02/ppo", kind="JobSet", conditions={"Failed": "FailedJobs"})
    template = whole["spec"]["replicatedJobs"][0]["template"]
    owner = {"kind": "JobSet", "apiVersion": "jobset.x-k8s.io/v1alpha2"}
    owner |= {"name": whole["metadata"]["name"], "uid": whole["metadata"]["uid"]}
    names = {"name": whole["metadata"]["name"] + "-node-0", "uid": "uid-inner"}
    inner = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            **template["metadata"],
            **names,
            "creationTimestamp": "2026-07-01T10:59:20Z",
            "ownerReferences": [owner],
        },
        "spec": template["spec"],
        "status": {"conditions": conditions({"Failed": "PodFailurePolicy"})},
    }
    pod = pod_of(inner, "Failed", ended(2), index=0)
    # A condition of the JobSet CRD has a message that schemas of core objects do not ask for.
    cluster.hold(whole, inner, pod)
    launcher = KubernetesLauncher(cases.config_of(JOBSET))
    (found,) = launcher.poll().values()
    assert (found.node, found.id) == ("round-02/ppo", f"jobset/{whole['metadata']['name']}")
    assert (found.state, found.failure) == (ENDED, "bad_input")
    inner["status"]["conditions"] = conditions({"Failed": "DeadlineExceeded"})
    cluster.hold(whole, inner, pod)
    assert launcher.poll()["round-02/ppo"].failure == "time_limit"


def test_poll_asks_for_one_run_and_for_jobsets_by_option(cluster: Cluster) -> None:
    for more in ((), (JOBSET,)):
        KubernetesLauncher(cases.config_of(*more)).poll()
    label = f"--selector=rlhf/run={run_key(cases.config_of())} --output=json"
    assert (cluster.folder / "calls").read_text().splitlines() == [
        f"--namespace=default get jobs,pods {label}",
        f"--namespace=default get jobs,jobsets,pods {label}",
    ]


def test_submit_applies_what_render_shows(cluster: Cluster) -> None:
    config = cases.config_of()
    node = node_of(config, "sft")
    launcher = KubernetesLauncher(config)
    assert launcher.submit([node], []) == {"sft": f"job/{object_name(config, node)}"}
    assert cluster.calls() == ["apply --filename=-"]
    assert cluster.applied() == golden("one")


def test_submit_adopts_a_living_job(cluster: Cluster) -> None:
    config = cases.config_of()
    job = job_of("sft", active=1)
    cluster.hold(job, pod_of(job, "Running", {"running": {}}))
    found = KubernetesLauncher(config).submit([node_of(config, "sft")], [])
    assert found == {"sft": f"job/{job['metadata']['name']}"}
    assert cluster.calls() == []


def test_submit_replaces_an_ended_job(cluster: Cluster) -> None:
    config = cases.config_of()
    job = job_of("sft", conditions=FAILED)
    cluster.hold(job)
    KubernetesLauncher(config).submit([node_of(config, "sft")], [])
    name = job["metadata"]["name"]
    assert cluster.calls() == [
        f"delete job/{name} --ignore-not-found --cascade=foreground --timeout=180s",
        "apply --filename=-",
    ]


def test_cancel_deletes_without_waiting_for_pods_that_save(cluster: Cluster) -> None:
    launcher = KubernetesLauncher(cases.config_of())
    launcher.cancel([])
    assert cluster.calls() == []
    launcher.cancel([Job("b", "jobset/b", RUNNING), Job("a", "job/a", PENDING)])
    fixed = "--ignore-not-found --cascade=foreground --wait=false"
    assert cluster.calls() == [f"delete job/a jobset/b {fixed}"]


def test_a_node_is_submitted_only_when_its_parents_are_done(cluster: Cluster) -> None:
    config = cases.config_of()
    nodes, launcher = nodes_of(config), open_launcher(config)
    _, submitted = reconcile(nodes, launcher, launcher.poll(), done=set(), held=set())
    assert list(submitted) == ["sft"]
    _, submitted = reconcile(nodes, launcher, launcher.poll(), done={"sft"}, held=set())
    assert list(submitted) == ["round-01/collect"]
    assert launcher.orders_jobs is False


def test_a_kubectl_that_refuses_is_one_clear_error(cluster: Cluster) -> None:
    (cluster.folder / "error").write_text("Error: jobs is forbidden:\n no rights")
    with pytest.raises(LauncherError, match=r"get failed: .*forbidden: no rights; correct"):
        KubernetesLauncher(cases.config_of()).poll()


def test_a_kubectl_that_hangs_is_one_clear_error(cluster: Cluster) -> None:
    (cluster.folder / "slow").touch()
    launcher = KubernetesLauncher(cases.config_of())
    with pytest.raises(LauncherError, match=r"kubectl get gave no answer in 0\.3 s"):
        launcher._kubectl("get", seconds=0.3)


def test_without_kubectl_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LauncherError, match="kubectl is not installed here"):
        KubernetesLauncher(cases.config_of()).poll()


# --- files to apply ------------------------------------------------------------------------------


def test_the_controller_may_do_what_the_launcher_does_and_no_more() -> None:
    account, role, binding = file_of("rbac")
    allowed = {
        (resource, verb)
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    applied = {"get", "create", "patch"}
    deleted = {"list", "watch", "delete"}
    wanted = {("pods", "list")} | {("services", verb) for verb in applied}
    wanted |= {(kind, verb) for kind in ("jobs", "jobsets") for verb in applied | deleted}
    assert allowed == wanted
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (subject,) = binding["subjects"]
    (controller,) = file_of("controller")
    names = {account["metadata"]["name"], subject["name"]}
    assert names == {controller["spec"]["template"]["spec"]["serviceAccountName"]}
    assert subject["namespace"] == Kubernetes().namespace


def test_the_controller_follows_a_run_with_settings_that_match_the_files() -> None:
    (controller,) = file_of("controller")
    pod = controller["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["rlhf", "launch"]
    config = compose.load(container["args"])
    check(config)
    assert config.launcher.follow
    assert config.launcher.kind is LauncherKind.kubernetes
    assert config.launcher.kubernetes == Kubernetes()
    assert container["image"] == config.launcher.kubernetes.image
    assert container["volumeMounts"][0]["mountPath"] == config.launcher.kubernetes.mount_path
    (claim,) = file_of("pvc")
    names = {claim["metadata"]["name"], pod["volumes"][0]["persistentVolumeClaim"]["claimName"]}
    assert names == {config.launcher.kubernetes.claim}
    (kustomization,) = file_of("kustomization")
    assert {Path(name).stem for name in kustomization["resources"]} == set(FILES)
    assert kustomization["namespace"] == config.launcher.kubernetes.namespace
    (image,) = kustomization["images"]
    assert f"{image['name']}:{image['newTag']}" == config.launcher.kubernetes.image


def test_object_ids_name_the_kind() -> None:
    config = cases.config_of(JOBSET, "resources.ppo.nodes=2")
    ids = [object_id(config, node_of(config, name)) for name in ("sft", "round-02/ppo")]
    assert ids[0].startswith("job/rlhf-sft-")
    assert ids[1].startswith("jobset/rlhf-round-02-ppo-")
