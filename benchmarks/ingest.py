"""Ingest a million comparisons: rows per second and memory, beside bare reads of the same file.

    python benchmarks/ingest.py --rows 1000000 --folder /tmp/ingest --rounds 3

The file is generated (its seed is fixed) and read in turn by pyarrow.json, by polars and by ingest,
each in a process of its own; medians over the rounds are printed. A few rows in a thousand are
damaged or repeat others, all of them valid JSON, so that the bare readers can read them. With
`--history K` the store holds K earlier batches of as many rows, each from a file of its own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

SOURCES = ("vendor-a", "vendor-b", "open-set", "red-team")
STRENGTHS = ("significantly_better", "better", "slightly_better", "negligibly_better")
SYLLABLES = [first + last for first in "bdfgklmnprst" for last in ("a", "e", "i", "o", "un")]
RARE = (
    "caf\u00e9",
    "na\u00efve",
    "\u201cquoted\u201d",
    "it\u2019s",
    "\u4f60\u597d\u4e16\u754c",
    "\u041f\u0440\u0438\u0432\u0435\u0442",
    "\U0001f600",
    "x \u2264 y\u2026",
)
"""Words outside ASCII; every tenth row has some."""
READERS = ("pyarrow.json", "polars", "ingest")


class Writer:
    """Comparisons as vendors send them, about 950 characters a line."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        words = ["".join(self.random.choices(SYLLABLES, k=1 + i % 4)) for i in range(4000)]
        weights = list(accumulate(1 / (rank + 2) for rank in range(len(words))))
        sentences = [
            " ".join(self.random.choices(words, cum_weights=weights, k=5 + i % 14)).capitalize()
            + self.random.choice(".....?!:\n")
            for i in range(50_000)
        ]
        self.prose = " ".join(sentences)

    def text(self, chars: int) -> str:
        """Return so many characters of prose, from anywhere."""
        start = int(self.random.random() * (len(self.prose) - chars))
        return self.prose[start : start + chars]

    def row(self, number: int, prefix: str) -> dict[str, Any]:
        """Return a sound row; every fifth has three turns."""
        pick = self.random.random
        prompt = [{"role": "user", "content": f"{prefix} {number}: {self.text(90)}"}]
        if number % 5 == 0:
            prompt.append({"role": "assistant", "content": self.text(120)})
            prompt.append({"role": "user", "content": self.text(40)})
        axis = "safety" if number % 4 == 0 else "helpfulness"
        tail = f" {RARE[number // 10 % len(RARE)]}" if number % 10 == 0 else ""
        return {
            "id": f"{prefix}-{number}",
            "prompt": prompt,
            "chosen": self.text(int(40 + 360 * pick())) + tail,
            "rejected": self.text(int(40 + 360 * pick())),
            "strength": STRENGTHS[number % 4],
            "axis": axis,
            "chosen_safe": True if axis == "safety" else None,
            "rejected_safe": pick() < 0.5 if axis == "safety" else None,
            "source": SOURCES[number % len(SOURCES)],
            "annotator": f"a{number % 211}",
            "meta": {
                "raters": number % 5 + 1,
                "score": round(pick(), 3),
                "topic": f"t{number % 40}",
            },
        }


def damage(row: dict[str, Any], old: dict[str, Any], number: int) -> tuple[str, dict[str, Any]]:
    """Return a row that ingest leaves out, made from a sound one or from an earlier one."""
    kinds: tuple[tuple[str, Callable[[], dict[str, Any]]], ...] = (
        ("refused", lambda: row | {"strength": "much_better"}),
        ("refused", lambda: row | {"axis": "honesty"}),
        ("refused", lambda: row | {"prompt": None}),
        ("refused", lambda: row | {"prompt": [{"role": "assistant", "content": "Hi"}]}),
        ("refused", lambda: old | {"strength": None}),
        ("empty_text", lambda: row | {"chosen": " \n"}),
        ("over_long", lambda: row | {"chosen": row["chosen"] * 200}),
        ("identical_responses", lambda: row | {"rejected": row["chosen"] + " "}),
        (
            "unsafe_chosen",
            lambda: row | {"axis": "safety", "chosen_safe": False, "rejected_safe": True},
        ),
        ("duplicate_in_file", lambda: old),
        (
            "near_duplicate_in_file",
            lambda: old | {"id": row["id"], "chosen": old["chosen"].upper()},
        ),
        (
            "contradicting",
            lambda: (
                old
                | {"id": row["id"], "chosen": old["rejected"], "rejected": old["chosen"]}
                | {"chosen_safe": None, "rejected_safe": None}
            ),
        ),
    )
    name, make = kinds[number % len(kinds)]
    return name, make()


def generate(num_rows: int, *, seed: int, prefix: str, per_mille: int = 4) -> Iterator[str]:
    """Yield the lines of a file; `per_mille` rows in a thousand are damaged or repeated."""
    writer = Writer(seed)
    old: dict[str, Any] = {}
    every = 1000 // per_mille
    for number in range(num_rows):
        row = writer.row(number, prefix)
        if number % every == every - 1:
            _, row = damage(row, old, number // every)
        elif number % every == 0:
            old = row
        yield json.dumps(row, ensure_ascii=number % 2 == 0) + "\n"


def write_file(path: Path, num_rows: int, *, seed: int, prefix: str) -> None:
    """Write the generated rows as the ending of the path says."""
    lines = generate(num_rows, seed=seed, prefix=prefix)
    if path.suffix == ".parquet":
        import pyarrow.json as pj
        import pyarrow.parquet as pq

        plain = path.with_suffix(".jsonl")
        if not plain.exists():
            write_file(plain, num_rows, seed=seed, prefix=prefix)
        pq.write_table(pj.read_json(plain), path)
        return
    with gzip.open(path, "wb", 6) if path.suffix == ".gz" else path.open("wb") as file:
        file.writelines(line.encode() for line in lines)


def peak_megabytes() -> float:
    """Return the largest resident size of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmHWM in /proc/self/status")


def measure(reader: str, path: Path, store: Path) -> dict[str, Any]:
    """Read the file in this process: seconds, processor time, peak memory and counts."""
    counts: dict[str, int] = {}
    if reader == "pyarrow.json":
        import pyarrow.json as pj
        import pyarrow.parquet as pq

        start = time.perf_counter()
        (pq.read_table if path.suffix == ".parquet" else pj.read_json)(path)
    elif reader == "polars":
        import polars as pl

        start = time.perf_counter()
        (pl.read_parquet if path.suffix == ".parquet" else pl.read_ndjson)(path)
    else:
        from rlhf.config import OnBadRow
        from rlhf.data.ingest import ingest_file
        from rlhf.data.ledger import Store

        start = time.perf_counter()
        report = ingest_file(
            path,
            Store(store, "weekly"),
            kind=None,
            on_bad_row=OnBadRow.quarantine,
            heldout_share=0.05,
            heldout_salt="benchmark",
        )
        counts = report.counts
    seconds = time.perf_counter() - start
    cpu = time.process_time()
    return {"seconds": seconds, "cpu": cpu, "megabytes": peak_megabytes(), "counts": counts}


def in_a_process(reader: str, path: Path, store: Path) -> dict[str, Any]:
    """Measure in a process of its own, whose memory nothing else has touched."""
    command = [sys.executable, __file__, "--measure", reader, str(path), str(store)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(path: Path, folder: Path, *, num_rows: int, rounds: int, history: int) -> None:
    """Run all readers in turn and print the medians."""
    base = folder / "store-earlier"
    shutil.rmtree(base, ignore_errors=True)
    for number in range(history):
        earlier = folder / f"earlier-{number}.jsonl"
        if not earlier.exists():
            write_file(earlier, num_rows, seed=100 + number, prefix=f"earlier-{number}")
        found = in_a_process("ingest", earlier, base)
        print(f"earlier batch {number}: {found['seconds']:.1f} s, {found['megabytes']:.0f} MB")
    results: dict[str, list[dict[str, Any]]] = {reader: [] for reader in READERS}
    for number in range(rounds):
        for reader in READERS:
            store = folder / "store"
            shutil.rmtree(store, ignore_errors=True)
            if history and reader == "ingest":
                shutil.copytree(base, store)
            found = in_a_process(reader, path, store)
            results[reader].append(found)
            rate = num_rows / found["seconds"]
            print(f"round {number} {reader}: {found['seconds']:.1f} s, {rate:,.0f} rows/s")
    size = path.stat().st_size / 1e6
    print(f"\n{path.name}: {num_rows:,} rows, {size:,.0f} MB, medians of {rounds} rounds")
    medians, work = (
        {name: statistics.median(r[key] for r in found) for name, found in results.items()}
        for key in ("seconds", "cpu")
    )
    for reader, seconds in medians.items():
        peak = max(found["megabytes"] for found in results[reader])
        ratio = medians["ingest"] / seconds
        print(
            f"{reader:13} {seconds:7.1f} s {num_rows / seconds:10,.0f} rows/s "
            f"{size / seconds:6.0f} MB/s  ingest takes {ratio:.1f}x its time, "
            f"{work['ingest'] / work[reader]:.1f}x its processor time ({work[reader]:.0f} s)  "
            f"peak {peak:,.0f} MB"
        )
    print(json.dumps({name: n for name, n in results["ingest"][-1]["counts"].items() if n}))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("ingest-benchmark"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--format", choices=("jsonl", "jsonl.gz", "parquet"), default="jsonl")
    parser.add_argument("--history", type=int, default=0)
    parser.add_argument("--measure", nargs=3, metavar=("READER", "FILE", "STORE"))
    options = parser.parse_args()
    if options.measure:
        reader, path, store = options.measure
        print(json.dumps(measure(reader, Path(path), Path(store))))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"comparisons-{options.rows}.{options.format}"
    if not path.exists():
        write_file(path, options.rows, seed=0, prefix="week")
    compare(
        path,
        options.folder,
        num_rows=options.rows,
        rounds=options.rounds,
        history=options.history,
    )


if __name__ == "__main__":
    main()
