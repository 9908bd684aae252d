"""What the head of a request says about its body."""

from __future__ import annotations

import re

from starlette.datastructures import Headers

FORM_TYPE = "application/x-www-form-urlencoded"
UPLOAD_TYPE = "application/octet-stream"
UPLOADS = re.compile(r"/api/v1/streams/[^/]+/batches")
"""Addresses that take uploads."""


def media_type(headers: Headers) -> str:
    """Return the kind of a body without its parameters, in lower case; "" where it is not said."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def is_upload(method: str, path: str) -> bool:
    """Tell whether a body is a file, which is streamed to the disk under a limit of its own.

    The address decides: a kind of body can be claimed anywhere, and other bodies are read whole.
    """
    return method == "POST" and UPLOADS.fullmatch(path) is not None
