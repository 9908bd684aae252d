"""`rlhf serve`: open the state, listen, and work until a signal asks for the end."""

from __future__ import annotations

import logging
import socket
from contextlib import closing, suppress
from pathlib import Path

import uvicorn
from rich.console import Console
from sqlalchemy import select

from rlhf.config import Config, Service
from rlhf.errors import ConfigError
from rlhf.service.access import token_counts
from rlhf.service.annotation.journal import restore
from rlhf.service.app import create_app
from rlhf.service.database.models import Token, User
from rlhf.service.state import State, open_state
from rlhf.service.watch import Watcher, watching

KEEP_ALIVE_SECONDS = 15
"""A browser's idle connection is closed after this time."""
GRACE_SECONDS = 20
"""Longest wait for answers under way when the service is asked to end."""
BACKLOG = 256
"""Connections that may wait to be accepted."""


def serve(config: Config) -> int:
    """Serve until SIGINT, or a SIGTERM that raises KeyboardInterrupt; returns 0.

    Raises ConfigError for an address that cannot be used, and for one beyond this machine while
    nobody has an operator's token.
    """
    state = open_state(config)
    try:
        check_access(state)
        if config.service.watch:
            # What is wrong with the inbox is said before anything listens.
            Watcher(state)
        restore(state)
        with closing(listen(config)) as listener:
            _announce(state, listener)
            _serve(state, listener)
    finally:
        state.engine.dispose()
    return 0


def check_access(state: State) -> None:
    """Refuse to serve where a token is needed and no operator has one that counts."""
    if not state.config.service.needs_tokens:
        return
    operators = (
        select(Token.id).join(Token.user).where(User.role == "operator", token_counts()).limit(1)
    )
    with state.reading() as session:
        if session.scalars(operators).first() is not None:
            return
    raise ConfigError(
        f"{_why_tokens(state.config.service)} needs a token from everybody, and no operator has "
        "one: make one with `rlhf token NAME role=operator`, with the same service settings"
    )


def _why_tokens(service: Service) -> str:
    """Return the setting because of which tokens are needed."""
    if not service.is_local:
        return f"service.host={service.host}"
    if service.tokens:
        return "service.tokens=true"
    return f"service.allowed_hosts=[{','.join(service.allowed_hosts)}]"


def listen(config: Config) -> socket.socket:
    """Return the socket that listens; raises ConfigError where the address cannot be used."""
    service = config.service
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            service.host, service.port, type=socket.SOCK_STREAM
        )
        # Without the protocol's number asyncio leaves Nagle's delay on: 40 ms for every answer.
        listener = socket.socket(family, kind, protocol)
        # Right after a kill the port's old connections linger.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"service.host={service.host} service.port={service.port} cannot be used "
            f"({error.strerror}): end what listens there, or give another service.port (0 takes "
            "a free one)"
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(state: State, listener: socket.socket) -> None:
    # Whoever watches the terminal sees what the inbox brought.
    logging.getLogger("rlhf.service").setLevel(logging.INFO)
    service = state.config.service
    out = Console(soft_wrap=True)
    say = "sign in with a token" if service.needs_tokens else "open it in a browser"
    out.print(
        f"rlhf serves {address_of(listener)}: {say}; Ctrl-C ends it", highlight=False, markup=False
    )
    out.print(f"runs: {state.runs}, store: {state.store}", highlight=False, markup=False)
    database = state.engine.url.render_as_string(hide_password=True)
    out.print(f"state: {Path(service.folder)}, {database}", highlight=False, markup=False)
    inbox = state.inbox if service.watch else "not watched (service.watch=false)"
    out.print(f"inbox: {inbox}", highlight=False, markup=False)


def _serve(state: State, listener: socket.socket) -> None:
    app = create_app(state, beside=watching if state.config.service.watch else None)
    settings = uvicorn.Config(
        app,
        # Who asks is who connects: a header that says otherwise could be anybody's.
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    # uvicorn ends in order and then repeats the signal to this process.
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listener])
