"""Settings of the Kubernetes launcher: checked, and as Kubernetes writes them."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rlhf.config import Config
from rlhf.config.base import require
from rlhf.errors import ConfigError
from rlhf.launch.templates import jobs_dir

TEMPLATE = "kubernetes/job.yaml"

DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
DNS_NAME = re.compile(rf"(?=.{{1,253}}$){DNS_LABEL.pattern}(\.{DNS_LABEL.pattern})*")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
LABEL_KEY = re.compile(rf"({DNS_NAME.pattern}/)?(?=.){LABEL_VALUE.pattern}")
PATH = re.compile(r"(/[A-Za-z0-9_][A-Za-z0-9._-]*)+")


def check(config: Config) -> None:
    """Refuse what no cluster can run, before anything is applied; raises ConfigError."""
    settings = config.launcher.kubernetes
    key = "launcher.kubernetes"
    mount = settings.mount_path
    require(
        PATH.fullmatch(mount) is not None, f"{key}.mount_path", mount, "give a path such as /data"
    )
    for name in ("runs", "store"):
        path = getattr(config.paths, name)
        inside = (
            PATH.fullmatch(path) is not None and PurePosixPath(mount) in PurePosixPath(path).parents
        )
        remedy = f"pods see the volume {key}.claim={settings.claim} only: give a path below {mount}"
        require(inside, f"paths.{name}", path, remedy)
    image = settings.image
    ok = bool(image) and not re.search(r"\s", image)
    require(ok, f"{key}.image", image, "name a container image, such as registry/rlhf:cuda")
    label = (DNS_LABEL, "lower-case letters, digits and dashes, 63 at most")
    dns = (DNS_NAME, "lower-case letters, digits, dashes and dots")
    names = [
        ("namespace", settings.namespace, *label),
        ("claim", settings.claim, *dns),
        ("gpu_resource", settings.gpu_resource, LABEL_KEY, "a name such as nvidia.com/gpu"),
        *(("secrets", secret, *dns) for secret in settings.secrets),
    ]
    if settings.queue is not None:
        names.append(("queue", settings.queue, *dns))
    for field, value, pattern, words in names:
        require(pattern.fullmatch(value) is not None, f"{key}.{field}", value, f"use {words}")
    for text in settings.tolerations:
        toleration(text)
    for text in settings.node_selector:
        selector(text)
    read_template(config.launcher.template)


def toleration(text: str) -> dict[str, Any]:
    """Return KEY or KEY=VALUE as a toleration; raises ConfigError."""
    name, equals, value = text.partition("=")
    require(
        _is_label(name, value),
        "launcher.kubernetes.tolerations",
        text,
        "write KEY or KEY=VALUE, such as nvidia.com/gpu or pool=training",
    )
    if equals:
        return {"key": name, "operator": "Equal", "value": value}
    return {"key": name, "operator": "Exists"}


def selector(text: str) -> tuple[str, str]:
    """Split KEY=VALUE of a node selector; raises ConfigError."""
    name, equals, value = text.partition("=")
    require(
        bool(equals) and _is_label(name, value),
        "launcher.kubernetes.node_selector",
        text,
        "write KEY=VALUE, such as pool=training",
    )
    return name, value


def _is_label(name: str, value: str) -> bool:
    return LABEL_KEY.fullmatch(name) is not None and LABEL_VALUE.fullmatch(value) is not None


def read_template(path: str | None) -> dict[str, Any]:
    """Read the Job that everything is laid over; raises ConfigError for one that is none."""
    file = Path(path) if path is not None else jobs_dir() / TEMPLATE
    remedy = f"copy jobs/{TEMPLATE} and edit it"
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"launcher.template={path} cannot be read ({reason}): {remedy}"
        ) from error
    ok = isinstance(found, dict) and found.get("kind") == "Job"
    require(ok, "launcher.template", file, f"it holds no single Job; {remedy}")
    template: dict[str, Any] = found
    return template


def quantity(memory: str) -> str:
    """Return Slurm's memory as Kubernetes writes it: 64G is 64 GiB, a bare number MiB."""
    return f"{memory}Mi" if memory.isdigit() else f"{memory}i"


def seconds(limit: str | None) -> int | None:
    """Return Slurm's time limit in seconds; None for no limit.

    Minutes, minutes:seconds, hours:minutes:seconds, days-hours, and so on.
    """
    if limit is None:
        return None
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        parts += [0] * (3 - len(parts))
    else:
        parts = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    hours, minutes, rest_seconds = parts
    total = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest_seconds
    return total or None
