"""Job templates: files that users may copy and edit, with a few marks for rlhf to fill in."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf.errors import ConfigError

MARK = re.compile(r"@([a-z]+)@")


def jobs_dir() -> Path:
    """Find the job files: beside the package in a checkout, inside it in a wheel."""
    packaged = Path(__file__).parents[1] / "_jobs"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "jobs"


def template(path: str | None, default: str) -> str:
    """Read the user's template, or ours where there is none."""
    return (Path(path) if path is not None else jobs_dir() / default).read_text(encoding="utf-8")


def fill(text: str, **values: str) -> str:
    """Put each value where its mark stands, as in `@command@`.

    Raises ConfigError for a mark that nothing fills and for a value that has no mark.
    """
    marks = set(MARK.findall(text))
    if marks != set(values):
        odd = ", ".join(f"@{name}@" for name in sorted(marks ^ set(values)))
        raise ConfigError(
            f"the job template has to hold each of {', '.join(f'@{n}@' for n in sorted(values))} "
            f"and no other mark ({odd} is wrong): compare it with the template in jobs/"
        )
    return MARK.sub(lambda match: values[match.group(1)], text)
