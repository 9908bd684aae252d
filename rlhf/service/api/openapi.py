"""What the OpenAPI description says of every operation alike: errors, tokens, idempotency keys."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from rlhf.service.problems import MEDIA_TYPE

PREFIX = "/api/v1/"
OPEN = ("/healthz", "/readyz")
"""Addresses for which nobody signs in."""
KEY_HEADER = "Idempotency-Key"
MAX_KEY = 200
KEY_PATTERN = r"^[!-~]+$"
"""Printable ASCII, which every database stores."""
SCHEMA = "#/components/schemas/Problem"


class ProblemModel(BaseModel):
    """An error as RFC 9457 problem details."""

    model_config = ConfigDict(title="Problem", extra="allow")

    type: str = Field(description="Always about:blank: the status says what kind of error it is.")
    title: str = Field(description="The status in words.")
    status: int = Field(description="HTTP status.")
    detail: str = Field(description="What is wrong, and what to do about it.")


def problems(**said: str) -> dict[int | str, dict[str, Any]]:
    """Return descriptions of error answers, given as `s404="..."`; any other is a problem, too."""
    found: dict[int | str, dict[str, Any]] = {
        int(name.removeprefix("s")): _answer(text) for name, text in said.items()
    }
    return {**found, "default": _answer("Any other error.")}


def _answer(description: str) -> dict[str, Any]:
    return {"description": description, "content": {MEDIA_TYPE: {"schema": {"$ref": SCHEMA}}}}


def describe(app: FastAPI) -> None:
    """Add to an application's description what holds for all of its operations."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            _complete(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(schema: dict[str, Any]) -> None:
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas["Problem"] = ProblemModel.model_json_schema()
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    components["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "`rlhf token NAME` makes one."}
    }
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            _describe_operation(path, method, operation)


def _describe_operation(path: str, method: str, operation: dict[str, Any]) -> None:
    answers = operation["responses"]
    answers.setdefault("default", _answer("Any other error."))
    if path not in OPEN:
        # Without service.tokens nobody on this machine needs one.
        operation["security"] = [{"token": []}, {}]
        answers.setdefault("401", _answer("No token, or none that counts."))
        answers.setdefault("403", _answer("The caller's role does not suffice."))
    if "application/json" in answers.get("422", {}).get("content", {}):
        answers["422"] = _answer("A value cannot be used; `errors` lists the fields.")
    if method == "post" and path.startswith(PREFIX):
        operation.setdefault("parameters", []).append(
            {
                "name": KEY_HEADER,
                "in": "header",
                "required": False,
                "description": "A new random text for every write that is meant: the same request "
                "with the same key again gets the same answer and does nothing a second time.",
                "schema": {"type": "string", "maxLength": MAX_KEY, "pattern": KEY_PATTERN},
            }
        )
        answers.setdefault("409", _answer("The first request with this key is still under way."))
        answers.setdefault("422", _answer("The key belongs to another request, or a value is bad."))
