"""Style sheets and scripts: this package's own, the report's, and Plotly's from where it is."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from functools import cache
from http import HTTPStatus
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

from rlhf.service.problems import Problem

router = APIRouter(include_in_schema=False)

URL = "/static/"
REPORT = "rlhf.report", "templates"
OWN = "rlhf.service.pages", "static"
PLOTLY = "plotly", "package_data"

TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
PLACES = {
    "report.css": (*REPORT, "page.css"),
    "report.js": (*REPORT, "page.js"),
    "plotly.js": (*PLOTLY, "plotly.min.js"),
}
"""Assets of other packages, and where they lie there."""
YEAR = 365 * 24 * 3600


@cache
def content(name: str) -> bytes:
    """Return an asset; raises FileNotFoundError for a name that is none."""
    package, folder, file = PLACES.get(name, (*OWN, name))
    if name not in PLACES and name not in own_names():
        raise FileNotFoundError(name)
    return files(package).joinpath(folder, file).read_bytes()


@cache
def own_names() -> frozenset[str]:
    """Return the names of this package's assets."""
    folder = files(OWN[0]).joinpath(OWN[1])
    return frozenset(item.name for item in folder.iterdir() if item.name.endswith(tuple(TYPES)))


@cache
def address(name: str) -> str:
    """Return the address of an asset, which changes with its content, so that it may be kept."""
    return f"{URL}{name}?v={hashlib.sha256(content(name)).hexdigest()[:12]}"


@cache
def _packed(name: str) -> bytes:
    return gzip.compress(content(name), compresslevel=6)


@router.get(URL + "{name}")
def asset(request: Request, name: str) -> Response:
    """Return a style sheet or a script; whoever sees the login page needs them."""
    read: Callable[[str], bytes] = content
    headers = {"Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("Accept-Encoding", ""):
        read = _packed
        headers["Content-Encoding"] = "gzip"
    try:
        body = read(name)
    except FileNotFoundError as error:
        known = ", ".join(sorted({*PLACES, *own_names()}))
        raise Problem(HTTPStatus.NOT_FOUND, f"no asset {name}: there are {known}") from error
    is_named = request.query_params.get("v") == address(name).rpartition("=")[2]
    age = f"public, max-age={YEAR}, immutable" if is_named else "no-cache"
    kind = TYPES[name.rpartition(".")[2]]
    return Response(body, media_type=kind, headers={**headers, "Cache-Control": age})
