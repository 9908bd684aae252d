"""A real PostgreSQL of the tests' own: its folder, its socket, its process, gone afterwards."""

from __future__ import annotations

import ctypes
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

ROLE = "rlhf"
PASSWORD = "correct horse"
START_SECONDS = 60
PACKAGE = "postgresql"
UNSAFE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
"""Faster, and enough where no test pulls the plug of the database itself."""


def programs() -> Path | None:
    """Return the folder of initdb and postgres; None where PostgreSQL is not installed."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    if found:
        return max(found, key=lambda path: int(path.parent.name))
    program = shutil.which("postgres")
    return Path(program).resolve().parent if program else None


def install() -> str:
    """Install Debian's PostgreSQL where it is missing; returns why that is impossible, or ""."""
    if programs() is not None:
        return ""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "PostgreSQL is not installed, and this is not root on a Debian machine"
    # Debian's package would start a server of its own.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", PACKAGE]):
        done = subprocess.run(
            ["apt-get", "--quiet", *command],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            return f"Debian's PostgreSQL cannot be installed: {done.stderr.strip()[-200:]}"
    return ""


@dataclass(frozen=True)
class Server:
    """A running server; URLs go through its socket, which needs no password."""

    folder: Path
    port: int

    def url(self, name: str) -> str:
        """Return the URL of a database."""
        return f"postgresql+psycopg://{ROLE}@/{name}?host={self.folder}&port={self.port}"

    def tcp_url(self, name: str) -> str:
        """Return the URL over the network, where the password is asked for."""
        return f"postgresql+psycopg://{ROLE}@127.0.0.1:{self.port}/{name}"

    def connect(self, name: str = "postgres") -> psycopg.Connection:
        """Open a connection outside a transaction."""
        return psycopg.connect(
            host=str(self.folder), port=self.port, dbname=name, user=ROLE, autocommit=True
        )

    @contextmanager
    def database(self, template: str = "template0") -> Iterator[str]:
        """Create a database from a template, and drop it afterwards; gives its name."""
        name = f"test_{secrets.token_hex(8)}"
        with closing(self.connect()) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        yield name
        with closing(self.connect()) as connection:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@contextmanager
def running(*, safe: bool = False) -> Iterator[Server]:
    """Start a server and end it afterwards; `safe` keeps what a crash must not lose."""
    bin_folder = programs()
    assert bin_folder is not None
    # pytest's own folders are closed to other users, and a socket's path has to be short.
    folder = Path(tempfile.mkdtemp(prefix="rlhf-pg-", dir="/tmp"))
    user = _unprivileged()
    try:
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        _initialise(bin_folder, folder, user)
        server = Server(folder, _free_port())
        process = _start(bin_folder, server, user, {} if safe else UNSAFE)
        try:
            _wait(server, process)
            yield server
        finally:
            # "Fast": sessions that are still open are ended.
            process.send_signal(signal.SIGINT)
            process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unprivileged() -> pwd.struct_passwd | None:
    """Return whom to run as; None is this user. PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    return names.get("postgres") or names["nobody"]


def _as(user: pwd.struct_passwd | None) -> dict[str, object]:
    if user is None:
        return {}
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _initialise(bin_folder: Path, folder: Path, user: pwd.struct_passwd | None) -> None:
    secret = folder / "password"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    command = [str(bin_folder / "initdb"), "--pgdata", str(folder / "data"), "--username", ROLE]
    command += ["--auth-local=trust", "--auth-host=scram-sha-256", "--pwfile", str(secret)]
    command += ["--encoding=UTF8", "--locale=C", "--no-sync"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, **_as(user)
    )
    assert done.returncode == 0, done.stderr


def _start(
    bin_folder: Path, server: Server, user: pwd.struct_passwd | None, settings: dict[str, str]
) -> subprocess.Popen[bytes]:
    options = {
        "listen_addresses": "127.0.0.1",
        "port": str(server.port),
        "unix_socket_directories": str(server.folder),
        "max_connections": "200",
        **settings,
    }
    words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    library = ctypes.CDLL(None)
    set_death_signal = 1
    with (server.folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [str(bin_folder / "postgres"), "-D", str(server.folder / "data"), *words],
            cwd=server.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # A test run that is killed leaves no server behind.
            preexec_fn=lambda: library.prctl(set_death_signal, signal.SIGINT),
            **_as(user),
        )


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server takes connections."""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            server.connect().close()
            return
        except psycopg.OperationalError:
            log = (server.folder / "log.txt").read_text(errors="replace")
            assert process.poll() is None, log
            assert time.monotonic() < end, log
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
