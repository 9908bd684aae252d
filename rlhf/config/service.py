"""The service: address, state, access, inbox and annotation. No node reads any of it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from rlhf.config.base import execution, require


@dataclass
class Annotation:
    """How the pairs of a week reach annotators."""

    overlap_share: float = execution(0.1)
    """Share of a week's pairs that several annotators judge, for agreement."""
    overlap: int = execution(2)
    """Annotators who judge each of those pairs."""
    assignment_minutes: float = execution(60.0)
    """A pair that its annotator has left alone for so long goes to somebody else."""
    qualification: str | None = execution(None)
    """JSONL file of pairs with known answers; every annotator begins with them."""
    qualification_share: float = execution(0.8)
    """Share of right answers from which on an annotator gets other pairs."""
    guideline_helpfulness: str | None = execution(None)
    """Text file that the annotation page shows on the helpfulness axis; null shows ours."""
    guideline_safety: str | None = execution(None)
    """The same on the safety axis."""

    def __post_init__(self) -> None:
        for name in ("overlap_share", "qualification_share"):
            value = getattr(self, name)
            remedy = "give a share between 0 and 1"
            require(0 <= value <= 1, f"service.annotation.{name}", value, remedy)
        require(self.overlap >= 2, "service.annotation.overlap", self.overlap, "give at least 2")
        require(
            self.assignment_minutes > 0,
            "service.annotation.assignment_minutes",
            self.assignment_minutes,
            "give more than 0 minutes",
        )


@dataclass
class Service:
    """Settings of `rlhf serve`."""

    host: str = execution("127.0.0.1")
    """Address to listen on; beyond this machine everybody needs a token."""
    port: int = execution(8400)
    """Port to listen on; 0 takes a free one."""
    tokens: bool = execution(False)
    """Ask for tokens on this machine, too."""
    allowed_hosts: list[str] = execution([])
    """Names under which browsers reach the service, besides `host` and this machine's own; with
    one of them everybody needs a token, since a proxy passes on whoever comes."""
    folder: str = execution("service")
    """Folder of the embedded database, the annotations' journals, uploads and the inbox."""
    database: str | None = execution(None)
    """URL such as postgresql+psycopg://USER@HOST/NAME; null is SQLite in `folder`. A password
    belongs into RLHF_DATABASE_PASSWORD."""
    inbox: str | None = execution(None)
    """Folder or fsspec URL whose files are ingested; null is `inbox` in `folder`."""
    watch: bool = execution(True)
    """Watch the inbox."""
    poll_seconds: float = execution(5.0)
    """Time between two looks into the inbox."""
    settle_seconds: float = execution(5.0)
    """A file that has not changed for so long is complete."""
    autolaunch: bool = execution(False)
    """Launch the runs of a stream when its inbox brought them a batch."""
    max_upload_mb: int = execution(1024)
    """Largest upload in MiB."""
    session_hours: float = execution(12.0)
    """Time after which a browser has to sign in again, where tokens are needed."""
    annotation: Annotation = field(default_factory=Annotation)

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "service.port", self.port, "give a port, or 0 for any")
        for name in ("poll_seconds", "max_upload_mb", "session_hours"):
            value = getattr(self, name)
            require(value > 0, f"service.{name}", value, "give more than 0")
        require(
            self.settle_seconds >= 0,
            "service.settle_seconds",
            self.settle_seconds,
            "give 0 or more",
        )
        require(
            not _has_password(self.database or ""),
            "service.database",
            "(hidden)",
            "a password in it would be written to files: put it into RLHF_DATABASE_PASSWORD",
        )

    @property
    def is_local(self) -> bool:
        """Tell whether only this machine can reach the service."""
        return is_loopback(self.host)

    @property
    def needs_tokens(self) -> bool:
        """Tell whether a request without a token is refused."""
        return self.tokens or not self.is_local or bool(self.allowed_hosts)


def is_loopback(host: str) -> bool:
    """Tell whether an address reaches this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _has_password(url: str) -> bool:
    """Tell whether a URL holds a password: between the scheme and the last @, or in its query."""
    user = url.partition("://")[2].rpartition("@")[0]
    keys = (key.lower() for key, _ in parse_qsl(url.partition("?")[2], keep_blank_values=True))
    return ":" in user or any(key.endswith("password") for key in keys)
