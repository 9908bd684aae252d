"""Energy of nodes: counters, shares, suspension, several processes and starts."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest

from rlhf import compose
from rlhf.cost import energy
from rlhf.cost.counters import (
    Gpu,
    Rapl,
    busy_seconds,
    gpu_counters,
    own_gpus,
    own_seconds,
    processor_counters,
)
from rlhf.cost.energy import FOLDER, Meter, Reading, device_watts, node_usage, processor_share


def zone(root: Path, name: str, label: str, joules: float) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(label + "\n")
    (folder / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (folder / "max_energy_range_uj").write_text("1000000000\n")
    return folder


def config_of(*overrides: str):
    return compose.load(["recipe=quickstart", *overrides])


class Scripted:
    """A counter whose readings are given; None cannot be read."""

    name = "scripted"

    def __init__(self, *joules: float | None) -> None:
        self.joules = list(joules)

    def read(self) -> float:
        value = self.joules.pop(0)
        if value is None:
            raise OSError("gone")
        return value

    def since(self, before: float, now: float) -> float:
        return now - before


def clock(*moments: float):
    left = list(moments)
    return lambda: left.pop(0)


@pytest.fixture(autouse=True)
def whole_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process all of the machine's processor energy, and no heartbeats."""
    monkeypatch.setattr(energy, "busy_seconds", lambda: None)
    monkeypatch.setattr(energy, "BEAT_SECONDS", 1e6)


def test_packages_and_memory_are_read_and_their_parts_are_not(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5.0)
    zone(tmp_path, "intel-rapl:0:0", "core", 3.0)
    zone(tmp_path, "intel-rapl:0:1", "dram", 1.5)
    zone(tmp_path, "intel-rapl:1", "package-1", 7.0)
    found, text = processor_counters(tmp_path)
    assert [counter.read() for counter in found] == pytest.approx([5.0, 1.5, 7.0])
    assert text == "RAPL (package-0, dram, package-1)"


def test_a_machine_without_counters_says_why(tmp_path: Path) -> None:
    found, text = processor_counters(tmp_path / "none")
    assert found == []
    assert "has no RAPL zone" in text
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 5.0)
    (folder / "energy_uj").unlink()
    found, text = processor_counters(tmp_path)
    assert found == []
    assert "energy_uj" in text
    assert gpu_counters(["0"], library="libno-such-library.so.1") == (
        [],
        "libno-such-library.so.1 is not there (no NVIDIA driver)",
    )


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    rapl = Rapl("package-0", tmp_path, wrap=1000.0)
    assert rapl.since(990.0, 15.0) == 25.0
    assert rapl.since(15.0, 20.0) == 5.0


class FakeNvml:
    """The three calls of NVML that are made, over given millijoules."""

    def __init__(self, millijoules: int, code: int = 0) -> None:
        self.millijoules, self.code = millijoules, code

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, pointer) -> int:
        pointer._obj.value = self.millijoules
        return self.code


def test_nvml_counts_in_millijoules_and_says_when_it_cannot() -> None:
    gpu = Gpu(FakeNvml(12_500), ctypes.c_void_p(), "GPU 0")
    assert gpu.read() == 12.5
    assert gpu.since(12.5, 2.0) == 0.0
    with pytest.raises(OSError, match="cannot read the energy of GPU 0"):
        Gpu(FakeNvml(0, code=3), ctypes.c_void_p(), "GPU 0").read()


def test_each_process_owns_one_gpu() -> None:
    assert own_gpus({}, rank=2) == ["2"]
    assert own_gpus({"CUDA_VISIBLE_DEVICES": "4,6"}, rank=1) == ["6"]
    assert own_gpus({"CUDA_VISIBLE_DEVICES": "GPU-ab, GPU-cd"}, rank=0) == ["GPU-ab"]
    assert own_gpus({"CUDA_VISIBLE_DEVICES": ""}, rank=0) == []


def test_processor_seconds_are_those_of_work(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    #                 user nice system idle iowait irq softirq steal
    stat.write_text("cpu  100 20 30 9000 500 4 6 70 0 0\ncpu0 1 2 3\n")
    assert busy_seconds(stat) == pytest.approx(160 / 100)
    assert busy_seconds(tmp_path / "none") is None
    before = own_seconds()
    sum(range(2_000_000))
    assert own_seconds() > before


def test_nodes_side_by_side_share_a_machine_by_processor_time() -> None:
    before = Reading(0.0, (), own=10.0, busy=100.0)
    assert processor_share(before, Reading(1.0, (), own=13.0, busy=104.0)) == 0.75
    assert processor_share(before, Reading(1.0, (), own=10.0, busy=100.0)) == 0.0
    assert processor_share(before, Reading(1.0, (), own=19.0, busy=104.0)) == 1.0


def test_a_process_measures_seconds_and_joules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "peak_memory_mb", lambda: 123.5)
    monkeypatch.setattr(energy, "peak_gpu_memory_mb", lambda: 2048.0)
    counter = Scripted(100.0, 160.0, 190.0)
    meter = Meter(
        tmp_path, has_gpu=False, clock=clock(0.0, 10.0, 15.0), processor=([counter], "RAPL (x)")
    )
    meter.update()
    assert json.loads(meter.path.read_text()) == {
        "seconds": 10.0,
        "joules": 60.0,
        "source": "RAPL (x)",
        "peak_memory_mb": 123.5,
        "peak_gpu_memory_mb": 2048.0,
    }
    meter.stop()
    meter.stop()
    assert (meter.used.seconds, meter.used.joules) == (15.0, 90.0)


def test_a_gpu_is_owned_and_processors_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, own = iter([0.0, 100.0]), iter([0.0, 25.0])
    monkeypatch.setattr(energy, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(energy, "own_seconds", lambda: next(own))
    meter = Meter(
        tmp_path,
        has_gpu=True,
        clock=clock(0.0, 10.0),
        processor=([Scripted(0.0, 40.0)], "RAPL"),
        gpus=([Scripted(0.0, 3000.0)], "NVML"),
    )
    meter.stop()
    assert meter.used.joules == 3000.0 + 0.25 * 40.0
    assert meter.used.source == "RAPL; NVML"


def test_a_gpu_without_counter_is_not_measured_by_its_processor(tmp_path: Path) -> None:
    meter = Meter(
        tmp_path,
        has_gpu=True,
        clock=clock(0.0, 10.0),
        processor=([Scripted(0.0, 40.0)], "RAPL"),
        gpus=([], "no NVIDIA driver"),
    )
    meter.stop()
    assert (meter.used.joules, meter.used.seconds) == (None, 10.0)


def test_suspended_time_is_not_counted(tmp_path: Path) -> None:
    counter = Scripted(0.0, 50.0, 9050.0, 9100.0)
    moments = (0.0, 5.0, 3605.0, 3610.0)
    meter = Meter(tmp_path, has_gpu=False, clock=clock(*moments), processor=([counter], "RAPL"))
    for _ in range(2):
        meter.update()
    meter.stop()
    assert (meter.used.seconds, meter.used.joules) == (10.0, 100.0)


def test_a_reading_that_fails_once_costs_its_interval_only(tmp_path: Path) -> None:
    counter = Scripted(0.0, None, 70.0, 80.0)
    meter = Meter(
        tmp_path, has_gpu=False, clock=clock(0.0, 10.0, 15.0), processor=([counter], "RAPL")
    )
    meter.update()
    meter.update()
    meter.stop()
    assert (meter.used.seconds, meter.used.joules) == (5.0, 10.0)


def write_reading(folder: Path, name: str, seconds: float, joules: float | None) -> None:
    (folder / FOLDER).mkdir(exist_ok=True)
    row = {"seconds": seconds, "joules": joules, "source": "RAPL (package-0)"}
    (folder / FOLDER / f"{name}.json").write_text(json.dumps(row))


def test_processes_and_starts_add_up(tmp_path: Path) -> None:
    config = config_of("cost.pue=1.5", "cost.kg_co2_per_kwh=0.4")
    for name, joules in (("first-start", 1.8e6), ("rank-0", 3.6e6), ("rank-1", 1.8e6)):
        write_reading(tmp_path, name, 600.0, joules)
    found = node_usage(tmp_path, config, watts=999.0)
    # 7.2 MJ are 2 kWh.
    assert found["device_seconds"] == 1800.0
    assert found["energy_kwh"] == found["energy"]["kwh"] == pytest.approx(2.0)
    assert found["energy"]["co2_kg"] == pytest.approx(2.0 * 1.5 * 0.4)
    assert (found["energy"]["method"], found["energy"]["source"]) == (
        "measured",
        "RAPL (package-0)",
    )


def test_one_unmeasured_process_makes_the_node_an_estimate(tmp_path: Path) -> None:
    write_reading(tmp_path, "rank-0", 1800.0, 5.0)
    write_reading(tmp_path, "rank-1", 1800.0, None)
    found = node_usage(tmp_path, config_of(), watts=20.0)
    assert found["energy"]["kwh"] == pytest.approx(0.02)
    assert found["energy"]["method"] == "estimated"
    assert found["energy"]["source"].startswith("20 W per device; not measured: RAPL")


def test_watts_of_a_device() -> None:
    config = config_of("compute.num_threads=4", "cost.watts_per_core=8", "cost.watts_per_gpu=350")
    assert device_watts(config, has_gpu=False) == 32.0
    assert device_watts(config, has_gpu=True) == 350.0


def test_memory_is_that_of_the_largest_process_of_all_starts(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    used = {"seconds": 1.0, "joules": None, "source": ""}
    peaks = [(700.5, None), (900.0, 2048.0), (100.0, 4096.5)]
    for number, (memory, on_gpu) in enumerate(peaks):
        row = {**used, "peak_memory_mb": memory, "peak_gpu_memory_mb": on_gpu}
        (folder / f"{number}.json").write_text(json.dumps(row))
    (folder / "of-an-older-version.json").write_text(json.dumps(used))
    found = node_usage(tmp_path, config_of(), watts=100.0)
    assert (found["peak_memory_mb"], found["peak_gpu_memory_mb"]) == (900.0, 4096.5)
    for number in (1, 2):
        (folder / f"{number}.json").unlink()
    found = node_usage(tmp_path, config_of(), watts=100.0)
    assert (found["peak_memory_mb"], found["peak_gpu_memory_mb"]) == (700.5, None)
