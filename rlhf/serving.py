"""`rlhf serve` and `rlhf token`; the service's libraries are an extra, so imported late."""

from __future__ import annotations

import importlib
from datetime import timedelta

from rich.console import Console

from rlhf.config import Config
from rlhf.errors import ConfigError

LIBRARIES = ("alembic", "fastapi", "fsspec", "plotly", "prometheus_client", "sqlalchemy", "uvicorn")

TERMINAL = "(terminal)"
"""Name under which the audit log has what the command line did."""


def serve(config: Config) -> int:
    """Serve until a signal ends it; returns the exit code."""
    _check_libraries()
    from rlhf.service import server

    return server.serve(config)


def token(config: Config, name: str, *, role: str, days: str, revoke: str) -> int:
    """Print a new token of a user, or end all that they have."""
    _check_libraries()
    from rlhf.service.access import clean_name, new_token, revoke_tokens
    from rlhf.service.database.models import Audit
    from rlhf.service.state import open_state

    if revoke not in ("true", "false"):
        raise ConfigError(f"revoke={revoke} is not true or false: write revoke=true")
    if days and not (days.isdecimal() and 0 < int(days) <= timedelta.max.days // 1000):
        raise ConfigError(f"days={days} is no number of days: write days=90, or leave it out")
    name = clean_name(name)
    state = open_state(config)
    out = Console(soft_wrap=True)
    row = Audit(user=TERMINAL, role="", action="token", target=name, status=200)
    with state.transaction() as session:
        session.add(row)
        if revoke == "true":
            number = revoke_tokens(session, name=name)
            row.detail = {"revoked": number}
            out.print(f"{number} tokens of {name} revoked; their sessions are over", markup=False)
            return 0
        if not role:
            raise ConfigError(
                f"token {name} needs a role: add role=viewer, role=annotator or role=operator"
            )
        secret = new_token(session, name=name, role=role, days=int(days) if days else None)
        row.detail = {"role": role, "days": int(days) if days else None}
    out.print(secret, markup=False, highlight=False)
    Console(stderr=True).print(
        f"the token of {name} ({role}), shown this once: keep it secret", markup=False
    )
    return 0


def _check_libraries() -> None:
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"the service needs {name}, which is missing: pip install 'rlhf[service]'"
            ) from error
