"""Rows on their way into the store, on disk: parsed, hashed, and not yet judged.

The files have no name, so a refusal or a kill leaves nothing behind, and nothing reads them later.
"""

from __future__ import annotations

import bisect
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa


def _nameless(folder: Path) -> IO[bytes]:
    return tempfile.TemporaryFile(dir=folder)


class Staging:
    """An append-only table of any size, with the list of what was refused; a context manager."""

    def __init__(self, beside: Path) -> None:
        """Use the file system of `beside`, which need not exist yet."""
        self.num_rows = 0
        self.num_refused = 0
        folder = next(path for path in (beside, *beside.absolute().parents) if path.is_dir())
        self._rows, self._refused = (_nameless(folder) for _ in range(2))
        self._starts: list[int] = []
        self._writer: Any = None

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()
        self._refused.close()

    def add(self, table: pa.Table, refused: Sequence[dict[str, Any]]) -> None:
        """Append the rows of a block, which all have the same columns, and its refused rows."""
        import pyarrow as pa

        if self._writer is None:
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._writer = pa.ipc.new_file(self._rows, table.schema, options=options)
        for batch in table.combine_chunks().to_batches():
            self._starts.append(self.num_rows)
            self._writer.write_batch(batch)
            self.num_rows += batch.num_rows
        for row in refused:
            self._refused.write(json.dumps(row).encode() + b"\n")
        self.num_refused += len(refused)

    def finish(self) -> None:
        """End the writing, once."""
        if self._writer is not None:
            self._writer.close()
        self._refused.flush()

    def has(self, name: str) -> bool:
        """Tell whether the rows have a column."""
        import pyarrow as pa

        return self.num_rows > 0 and name in pa.ipc.open_file(self._rows).schema.names

    def refused(self) -> Iterator[dict[str, Any]]:
        """Yield the refused rows in the order they came."""
        self._refused.seek(0)
        for line in self._refused:
            yield json.loads(line)

    def scan(self, names: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield some columns in pieces, each with the number of its first row."""
        reader = self._reader(names)
        for index, start in enumerate(self._starts):
            yield start, reader.get_batch(index)

    def take(self, names: Sequence[str], rows: npt.NDArray[np.int64]) -> pa.Table:
        """Return some columns of some rows, which are given in order."""
        import pyarrow as pa

        reader = self._reader(names)
        pieces = []
        at = 0
        while at < len(rows):
            index = bisect.bisect_right(self._starts, rows[at]) - 1
            more = self._starts[index + 1] if index + 1 < len(self._starts) else self.num_rows
            end = int(np.searchsorted(rows, more))
            pieces.append(
                reader.get_batch(index).take(pa.array(rows[at:end] - self._starts[index]))
            )
            at = end
        return pa.Table.from_batches(pieces, schema=reader.schema)

    def _reader(self, names: Sequence[str]) -> Any:
        import pyarrow as pa

        schema = pa.ipc.open_file(self._rows).schema
        fields = [schema.get_field_index(name) for name in names]
        options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        return pa.ipc.open_file(self._rows, options=options)
