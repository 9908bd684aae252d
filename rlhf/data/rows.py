"""Rows of a batch as quality needs them, read column by column, without the texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK_ROWS = 4096
PLAIN = ("id", "strength", "axis", "annotator", "tie", "source")


def verdict_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield id, annotator, source, axis, strength, tie, prompt (its cluster), and the characters of
    both responses of every comparison in a batch's folder."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    columns = [*PLAIN, "chosen", "rejected", "key_prompt"]
    with pq.ParquetFile(folder / "rows.parquet", pre_buffer=False) as file:
        for chunk in file.iter_batches(batch_size=CHUNK_ROWS, columns=columns):
            found = {name: chunk.column(name).to_pylist() for name in PLAIN}
            found["prompt"] = chunk.column("key_prompt").to_pylist()
            for side in ("chosen", "rejected"):
                found[f"{side}_chars"] = pc.utf8_length(chunk.column(side)).to_pylist()
            for values in zip(*found.values(), strict=True):
                yield dict(zip(found, values, strict=True))
