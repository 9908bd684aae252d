"""Rows of a file as JSON objects: JSON lines, plain or gzipped, and Parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.errors import DataError

PARQUET_MAGIC = b"PAR1"
GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_VALUE_CHARS = 80
"""Length of a value that is quoted in a message."""


class RowError(DataError):
    """A row that cannot be read as what its file holds: why, and the value that was there."""

    def __init__(self, reason: str, value: object) -> None:
        super().__init__(reason)
        self.reason = reason
        self.value = value


def quote(value: object) -> str:
    """Return a value as it is shown in messages, on one line and shortened."""
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."


def file_format(path: Path) -> str:
    """Return jsonl, jsonl.gz or parquet, by the first bytes; DataError when there is no file."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from error
    if not magic:
        raise DataError(f"{path} is empty; give a file with at least one row")
    if magic == PARQUET_MAGIC or path.suffix == ".parquet":
        return "parquet"
    return "jsonl.gz" if magic.startswith(GZIP_MAGIC) else "jsonl"


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Yield line number (from 1) and object of every row, or why the line is none.

    Blank lines are passed over. Raises DataError when the file as a whole is damaged.
    """
    found = file_format(path)
    try:
        if found == "parquet":
            yield from _read_parquet(path)
        else:
            with path.open("rb") if found == "jsonl" else gzip.open(path) as file:
                for number, line in enumerate(file, start=1):
                    text = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
                    if text.strip():
                        yield number, _read_object(text.rstrip(b"\r\n"))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({_one_line(error)}); fetch it again") from error


def _read_object(line: bytes) -> dict[str, Any] | RowError:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(
            f"not UTF-8 ({error.reason} at byte {error.start})", line[:200].decode("latin-1")
        )
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
        return RowError(reason, line[:200].decode(errors="replace"))
    except RecursionError:
        return RowError("not valid JSON (nested too deeply)", line[:200].decode(errors="replace"))
    if not isinstance(value, dict):
        return RowError(f"a {type(value).__name__} where a JSON object is needed", quote(value))
    return value


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, json.loads(json.dumps(row, default=str))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a complete Parquet file ({_one_line(error)}); fetch it again"
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
