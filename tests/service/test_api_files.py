"""Reading the end of a file that grows."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rlhf.service.facts import files


def test_the_tail_of_a_log_is_what_reading_all_of_it_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK", 7)
    path = tmp_path / "log.txt"
    assert files.tail(path, lines=5) == []
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice(["ab", "\n", " ", "\u00e4\u20ac", "\r\n"]) for _ in range(40))
        path.write_bytes(text.encode())
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        for number in (1, 3, 100):
            assert files.tail(path, lines=number) == lines[-number:], repr(text)


def test_only_the_end_of_a_long_log_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_TAIL", 1000)
    monkeypatch.setattr(files, "BLOCK", 100)
    path = tmp_path / "log.txt"
    path.write_text("x" * 10_000 + "\n" + "y" * 5000, encoding="utf-8")
    assert sum(map(len, files.tail(path, lines=10))) <= 1000
    path.write_text("line\n" * 1000, encoding="utf-8")
    assert files.tail(path, lines=2) == ["line", "line"]
