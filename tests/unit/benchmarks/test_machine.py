"""The machine's load from the texts of /proc."""

from __future__ import annotations

import os

import pytest

from benchmarks.machine import (
    Ticks,
    field,
    foreign_share,
    parse_process,
    parse_stat,
    peak_megabytes,
    read_ticks,
    tree_ticks,
    wait_until_quiet,
)

STAT = "cpu  100 10 30 800 50 1 2 7 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
PROCESS = "42 (a (b) c) S 7 42 42 0 -1 4194304 100 0 0 0 30 12 5 3 20 0 4 0 100 1 2"


def test_busy_is_everything_but_idle_and_waiting() -> None:
    # 100 + 10 + 30 + 1 + 2 + 7 (stolen) busy; 800 idle and 50 waiting for disks.
    assert parse_stat(STAT) == (1000, 150)


def test_a_process_has_its_own_and_its_children_s_ticks() -> None:
    assert parse_process(PROCESS) == (7, 30 + 12 + 5 + 3)


def test_a_tree_is_the_root_and_all_its_descendants() -> None:
    processes = {1: (0, 1000), 10: (1, 5), 11: (10, 7), 12: (11, 9), 20: (1, 100)}
    assert tree_ticks(processes, 10) == 21
    assert tree_ticks(processes, 99) == 0


def test_foreign_is_busy_without_own() -> None:
    before, after = Ticks(1000, 100, 40), Ticks(1200, 220, 140)
    assert foreign_share(before, after) == pytest.approx((120 - 100) / 200)
    # Ticks are coarse: own may seem more than all.
    assert foreign_share(Ticks(0, 0, 0), Ticks(100, 5, 6)) == 0


def test_this_machine_can_be_read() -> None:
    ticks = read_ticks(os.getpid())
    assert ticks.total > ticks.busy > 0
    assert peak_megabytes(os.getpid()) > 5
    assert 0 <= wait_until_quiet(max_share=1.0, seconds=0) <= 1


def test_a_field_of_the_processor() -> None:
    text = "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nflags\t\t: fpu avx512f\n"
    assert field(text, "model name") == "A CPU @ 2 GHz"
    assert field(text, "bugs") == ""
