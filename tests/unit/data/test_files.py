"""Reading files: line numbers, encodings, compression and damage."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.data import files
from rlhf.data.files import RowError, file_format, read_objects
from rlhf.errors import ArtifactError, DataError


def read(path: Path) -> list[tuple[int, Any]]:
    return [(n, row.reason if isinstance(row, RowError) else row) for n, row in read_objects(path)]


def test_lines_keep_their_numbers_over_blank_and_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"a": 1}\r\n'
        b"\n"
        b'{"a": 2\n'
        b"[1]\n"
        b'{"a": "\xff"}\n'
        b'{"a": "line\xe2\x80\xa8separator"}\n' + b"[" * 100_000 + b"\n"
        b'{"a": ' + b"7" * 5000 + b'}\n{"a": 3}'
    )
    assert read(path) == [
        (1, {"a": 1}),
        (3, "not valid JSON (Expecting ',' delimiter at column 8)"),
        (4, "a list where a JSON object is needed"),
        (5, "not UTF-8 (invalid start byte at byte 7)"),
        (6, {"a": "line\u2028separator"}),
        (7, "not valid JSON (nested too deeply)"),
        (8, "not valid JSON (a number is too long)"),
        (9, {"a": 3}),
    ]


def test_a_line_without_end_is_refused_by_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    long = b'{"a": "' + b"x" * (3 << 20) + b'"}'
    path.write_bytes(b'{"a": 1}\n' + long + b'\n{"a": 2}\n\n' + long + b"\n" + long)
    found = read(path)
    reason = "a line of more than 1 MiB, which is no row"
    assert found == [(1, {"a": 1}), (2, reason), (3, {"a": 2}), (5, reason), (6, reason)]
    held = max(len(b.data) for b in files.read_blocks(path) if isinstance(b, files.Lines))
    assert held <= 1 << 17


def test_gzip_is_read_and_a_cut_one_is_damage(tmp_path: Path) -> None:
    data = gzip.compress("".join(f'{{"a": {i}}}\n' for i in range(1000)).encode())
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data)
    assert file_format(path) == "jsonl.gz"
    assert [row["a"] for _, row in read(path)] == list(range(1000))
    path.write_bytes(data[:-200])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is damaged .*fetch it again"):
        read(path)


def test_parquet_is_read_by_its_content_with_plain_values(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": [{"role": "user", "content": "hi"}], "c": None, "d": True}] * 3
    path = tmp_path / "a.data"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert file_format(path) == "parquet"
    assert read(path) == [(1, rows[0]), (2, rows[0]), (3, rows[0])]


def test_a_parquet_value_that_is_no_text_is_a_bad_row(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, broken.buffers())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": texts}), path)
    assert [row for _, row in read(path)] == [
        {"a": "good"},
        "not UTF-8 (invalid start byte at byte 0)",
        {"a": "fine"},
    ]


@pytest.mark.parametrize("keep", [0.2, 0.9, -5])
def test_truncated_parquet_is_one_message(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"a": f"text {i}"} for i in range(5000)]), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)] if keep > 0 else data[: int(keep)])
    with pytest.raises(DataError, match=r"not a complete Parquet file .*fetch it again") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_damaged_pages_inside_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"a": f"text {i}"} for i in range(5000)]), path)
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4)
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="not a complete Parquet file"):
        read(path)


def test_missing_empty_and_misnamed_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl cannot be read \(No such file"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        read(tmp_path / "empty.jsonl")
    (tmp_path / "b.parquet").write_text(json.dumps({"a": 1}))
    with pytest.raises(DataError, match="not a complete Parquet file"):
        read(tmp_path / "b.parquet")


def test_what_the_machine_cannot_read_is_no_bad_file() -> None:
    # Nothing lies at the beginning of a process's memory: the system says EIO.
    with pytest.raises(ArtifactError, match=r"cannot be read \(Input/output error\); try again"):
        read(Path("/proc/self/mem"))


def test_a_machine_that_fails_in_the_middle_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')

    def failing(read: Any, tell: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "_read_lines", failing)
    with pytest.raises(ArtifactError, match=r"cannot be read .*; try again"):
        read(path)
