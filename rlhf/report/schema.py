"""The JSON Schema of report.json, which this package ships, and its text in the documentation."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

SCHEMA: dict[str, Any] = json.loads(
    files("rlhf.report").joinpath("report.schema.json").read_text(encoding="utf-8")
)


def derivations() -> dict[str, str]:
    """Return every `how` of the schema with its meaning."""
    return {item["const"]: item["description"] for item in SCHEMA["$defs"]["how"]["oneOf"]}


def schema_table() -> str:
    """Return docs/metrics.md's table of the fields, in the schema's order."""
    lines = ["| field | content |", "|---|---|"]
    for name, field in SCHEMA["properties"].items():
        if name not in ("from", "how"):
            suffix = "[]" if field.get("type") == "array" else ""
            lines.append(f"| `{name}{suffix}` | {field['description']} |")
    return "\n".join(lines) + "\n"
