"""Rows of a file in blocks: JSON lines, plain or gzipped, and Parquet, in bounded memory."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import ArtifactError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET_MAGIC = b"PAR1"
GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_VALUE_CHARS = 80
"""Length of a value that is quoted in a message."""
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What a wrong path leads to; any other trouble with a file is the machine's."""

BLOCK_BYTES = 4 << 20
"""Part of a text file that is held at a time; lines are never cut."""
BLOCK_ROWS = 4_096
"""The same for the rows of a Parquet file."""
MAX_LINE_BYTES = 16 << 20
"""A longer line is no row, so that no file is read as a whole: it is refused by its beginning."""
PARQUET_BUFFER = 1 << 20
"""Bytes of a Parquet column that are read at a time, however large its row groups are."""


class RowError(DataError):
    """A row that cannot be read as what its file holds: why, and the value that was there."""

    def __init__(self, reason: str, value: object) -> None:
        super().__init__(reason)
        self.reason = reason
        self.value = value


@dataclass(frozen=True, slots=True)
class Lines:
    """Whole lines of a text file; `first` is the first line's number, `done` the bytes so far.

    `is_cut` marks the beginning of one line of more than MAX_LINE_BYTES.
    """

    first: int
    data: bytes
    done: int
    is_cut: bool = False

    def texts(self) -> list[bytes]:
        """Return the lines; several carriage returns at an end may be left."""
        lines = self.data.replace(b"\r\n", b"\n").split(b"\n")
        if not lines[-1]:
            lines.pop()
        return lines


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a Parquet file; `first` is the first row's number, `done` the bytes so far."""

    first: int
    batch: pa.RecordBatch
    done: int


Block = Lines | Rows


def quote(value: object) -> str:
    """Return a value as it is shown in messages, on one line and shortened."""
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."


def storable(text: str) -> str:
    """Return a text that can be written: half characters, which JSON can hold, are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def file_format(path: Path) -> str:
    """Return jsonl, jsonl.gz or parquet, by the first bytes; DataError when there is no file.

    Raises ArtifactError where the machine cannot read it.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except NO_FILE as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); try again") from error
    if not magic:
        raise DataError(f"{path} is empty; give a file with at least one row")
    if magic == PARQUET_MAGIC or path.suffix == ".parquet":
        return "parquet"
    return "jsonl.gz" if magic.startswith(GZIP_MAGIC) else "jsonl"


def read_blocks(path: Path) -> Iterator[Block]:
    """Yield the file in blocks, in order. Raises DataError when it is damaged as a whole.

    Raises ArtifactError where the machine cannot read what may be whole.
    """
    found = file_format(path)
    try:
        if found == "parquet":
            yield from _read_parquet(path)
            return
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if found == "jsonl.gz" else raw
            yield from _read_lines(file.read, raw.tell)
    except (OSError, EOFError, zlib.error) as error:
        # Errors with a number are the system's; a damaged gzip file has none.
        if isinstance(error, OSError) and error.errno is not None:
            raise ArtifactError(f"{path} cannot be read ({_one_line(error)}); try again") from error
        raise DataError(f"{path} is damaged ({_one_line(error)}); fetch it again") from error


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Yield line number (from 1) and object of every row, or why the line is none.

    Blank lines are passed over. Raises DataError when the file as a whole is damaged.
    """
    for block in read_blocks(path):
        if isinstance(block, Rows):
            for index in range(block.batch.num_rows):
                yield block.first + index, plain_row(block.batch, index)
        elif block.is_cut:
            yield block.first, cut_line(block)
        else:
            for number, line in enumerate(block.texts(), start=block.first):
                if line.strip():
                    yield number, read_object(line)


def read_object(line: bytes) -> dict[str, Any] | RowError:
    """Return the JSON object of a line, or why it is none."""
    line = line.rstrip(b"\r\n")
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
    except ValueError:
        # Python reads no integer of more than 4300 digits.
        return RowError("not valid JSON (a number is too long)", line[:200].decode())
    if not isinstance(value, dict):
        return RowError(f"a {type(value).__name__} where a JSON object is needed", quote(value))
    return value


def cut_line(block: Lines) -> RowError:
    """Return why a line of more than MAX_LINE_BYTES is no row."""
    reason = f"a line of more than {MAX_LINE_BYTES >> 20} MiB, which is no row"
    return RowError(reason, block.data[:200].decode(errors="replace"))


def plain_row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | RowError:
    """Return a row of a Parquet file as the JSON object that it stands for."""
    try:
        (row,) = batch.slice(index, 1).to_pylist()
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 ({error.reason} at byte {error.start})", quote(error.object))
    except ValueError as error:
        return RowError(f"a value that cannot be read ({_one_line(error)})", "")
    found: dict[str, Any] = json.loads(json.dumps(row, default=str))
    return found


def _read_lines(read: Callable[[int], bytes], tell: Callable[[], int]) -> Iterator[Lines]:
    number, rest, is_first = 1, b"", True
    while chunk := read(BLOCK_BYTES):
        if is_first:
            chunk, is_first = chunk.removeprefix(BYTE_ORDER_MARK), False
        data = rest + chunk
        end = data.rfind(b"\n") + 1
        if end == 0 and len(data) > MAX_LINE_BYTES:
            yield Lines(number, data[:200], tell(), is_cut=True)
            # The rest of that line is read and dropped.
            while chunk and b"\n" not in chunk:
                chunk = read(BLOCK_BYTES)
            rest = chunk[chunk.find(b"\n") + 1 :]
            number += 1
            continue
        if end:
            yield Lines(number, data[:end], tell())
            number += data.count(b"\n", 0, end)
        rest = data[end:]
    if rest:
        yield Lines(number, rest, tell())


def _read_parquet(path: Path) -> Iterator[Rows]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = path.stat().st_size
    first = 1
    try:
        with pq.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False) as file:
            total = file.metadata.num_rows
            for batch in file.iter_batches(batch_size=BLOCK_ROWS, use_threads=False):
                done = size * (first - 1 + batch.num_rows) // max(total, 1)
                yield Rows(first, batch, done)
                first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{path} is not a complete Parquet file ({_one_line(error)}); fetch it again"
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
