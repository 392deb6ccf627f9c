"""Energy: sums of meters, what survives crashes and resumes, and that an estimate is called one."""

import json
import time

import pytest

from slmjax.track import energy
from slmjax.track.energy import Energy, ProcessorTime, grid, meters

pytestmark = pytest.mark.fast


class Constant:
    """A meter of so many watts."""

    detail = "a test"

    def __init__(self, method, part, watts):
        self.method, self.part, self.watts = method, part, watts

    def kwh(self, seconds):
        return self.watts * seconds / 3.6e6


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(energy.time, "monotonic", lambda: now[0])
    return now


def test_power_times_time_by_part_with_pue_and_grid(tmp_path, clock):
    using = [Constant("nvml", "gpu", 3600.0), Constant("rapl", "cpu", 360.0)]
    meter = Energy(tmp_path / "energy.json", using=using, pue=1.5, country="FRA", interval=1e6)
    clock[0] += 1000.0
    meter.finish("complete")
    said = json.loads((tmp_path / "energy.json").read_text())
    assert said["parts"]["gpu"]["kwh"] == pytest.approx(1.0)
    assert said["parts"]["cpu"]["kwh"] == pytest.approx(0.1)
    assert (said["it_kwh"], said["kwh"]) == (pytest.approx(1.1), pytest.approx(1.65))
    assert said["co2e_kg"] == pytest.approx(1.65 * said["grid"]["g_per_kwh"] / 1000)
    assert said["method"] == "nvml + rapl"
    assert said["estimate"] is False
    assert said["seconds"] == 1000.0


def test_attempts_add_up_and_the_file_counts_what_a_crash_lost(tmp_path, clock):
    path = tmp_path / "energy.json"
    first = Energy(path, using=[Constant("rapl", "cpu", 3600.0)], interval=1e6)
    saved = first.state()
    clock[0] += 1000.0
    first.finish("failed")
    assert saved["seconds"] == 0.0
    second = Energy(path, using=[Constant("rapl", "cpu", 3600.0)], interval=1e6)
    second.restore(saved)
    clock[0] += 500.0
    second.finish("complete")
    assert json.loads(path.read_text())["it_kwh"] == pytest.approx(1.5)


def test_without_the_file_the_checkpoint_counts(tmp_path, clock):
    state = {"parts": {"cpu": {"kwh": 2.0, "method": "rapl", "detail": ""}}, "seconds": 7.0}
    meter = Energy(tmp_path / "energy.json", using=[Constant("rapl", "cpu", 3600.0)], interval=1e6)
    meter.restore(state)
    clock[0] += 1000.0
    meter.finish("complete")
    assert json.loads((tmp_path / "energy.json").read_text())["it_kwh"] == pytest.approx(3.0)
    assert meter.state()["seconds"] == pytest.approx(1007.0)


def test_a_damaged_file_starts_anew(tmp_path):
    (tmp_path / "energy.json").write_text('{"parts": ')
    Energy(tmp_path / "energy.json", using=[], interval=1e6).finish("complete")
    assert json.loads((tmp_path / "energy.json").read_text())["parts"] == {}


def test_readings_are_kept_while_it_runs(tmp_path):
    meter = Energy(tmp_path / "energy.json", using=[Constant("rapl", "cpu", 1.0)], interval=0.01)
    deadline = time.monotonic() + 10
    while not (tmp_path / "energy.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    meter.finish("complete")


def test_an_estimate_is_processor_time_times_watts_and_says_so(tmp_path, monkeypatch):
    spent = [5.0]
    monkeypatch.setattr(energy.time, "process_time", lambda: spent[0])
    meter = ProcessorTime(since=5.0)
    spent[0] = 5.0 + 3600.0
    assert meter.kwh(1.0) == pytest.approx(meter.watts / 1000)
    assert meter.kwh(1.0) == 0.0
    whole = Energy(tmp_path / "energy.json", using=[meter], interval=1e6)
    whole.finish("complete")
    assert whole.summary()["estimate"] is True
    assert whole.summary()["method"] == "tdp-estimate"


def test_a_known_processor_shares_its_design_power_among_its_threads(monkeypatch):
    """Not on a virtual machine, which sees a part of the chip."""
    info = "model name : Intel(R) Xeon(R) Gold 6248 CPU @ 2.50GHz\nsiblings : 40\nflags : fpu {}\n"
    monkeypatch.setattr(energy, "cpu_name", lambda: "Intel(R) Xeon(R) Gold 6248 CPU @ 2.50GHz")
    read = energy.Path.read_text
    for flag, watts in (("", 150 / 40), ("hypervisor", energy.DEFAULT_WATTS)):
        text = info.format(flag)
        monkeypatch.setattr(
            energy.Path,
            "read_text",
            lambda self, *a, text=text, **k: text if "cpuinfo" in str(self) else read(self, *a, **k),
        )
        assert energy.watts_per_thread()[0] == watts


def test_counters_of_the_processor_packages(tmp_path):
    """A tree as Linux has it, with two sockets."""
    for socket, joules in ((0, 1000), (1, 5000)):
        domain = tmp_path / f"intel-rapl:{socket}"
        domain.mkdir()
        (domain / "name").write_text(f"package-{socket}\n")
        (domain / "max_energy_range_uj").write_text("262143328850\n")
        (domain / "energy_uj").write_text(f"{joules}000000\n")
    meter = energy.Rapl(str(tmp_path))
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("37000000000\n")  # 36 kJ more
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("77000000000\n")  # 72 kJ more
    assert meter.kwh(100.0) == pytest.approx(0.01 + 0.02)
    assert meter.kwh(100.0) == pytest.approx(0.0)


def test_no_counter_no_meter(tmp_path):
    with pytest.raises(OSError, match="no readable RAPL counter"):
        energy.Rapl(str(tmp_path))


@pytest.mark.parametrize(("visible", "kwh"), [("", 0.6), ("1", 0.2), ("0,2", 0.4), ("GPU-8f3a", 0.6)])
def test_counters_of_the_visible_gpus(monkeypatch, visible, kwh):
    from codecarbon.core import gpu, gpu_nvidia
    from codecarbon.core.units import Energy as Kwh

    class Three:
        device_count = 3

        def start(self): ...

        def get_delta(self, duration):
            return [{"gpu_index": i, "delta_energy_consumption": Kwh(0.1 * (i + 1))} for i in range(3)]

    monkeypatch.setattr(gpu, "AllGPUDevices", Three)
    monkeypatch.setattr(gpu_nvidia, "is_nvidia_system", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter = energy.Gpus()
    assert meter.method == "nvml"
    assert meter.kwh(1.0) == pytest.approx(kwh)


def test_this_machine_has_exactly_one_meter_of_the_processor(capfd):
    found = meters()
    assert [m.part for m in found].count("cpu") == 1
    assert all(m.method in ("rapl", "nvml", "amdsmi", "tdp-estimate") for m in found)
    assert all(m.kwh(1e-3) >= 0 for m in found)
    assert capfd.readouterr() == ("", "")


def test_grid_of_a_country_of_the_world_and_of_none():
    assert 10 < grid("FRA").grams < 120
    assert grid("fra") == grid("FRA")
    assert grid("FRA").year >= 2020
    assert grid("") == grid("XYZ")
    assert (grid("").grams, grid("").zone, grid("").year) == (475.0, "world average", 2019)
