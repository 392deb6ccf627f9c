"""How much energy a run takes: measured where the machine has meters, else estimated; the record says which.

| method | part | what it is |
|---|---|---|
| `nvml`, `amdsmi` | gpu | the energy counters of the visible GPUs |
| `rapl` | cpu | the energy counter of the processor packages: the whole machine, other processes included |
| `tdp-estimate` | cpu | an estimate: watts a thread times the CPU time of this process |

The meters are read through codecarbon's hardware classes, in a background thread: no network, no country look-up.
Emissions are derived: kWh times the PUE of the building times the carbon intensity of a grid.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from slmjax.track.environment import cpu_name
from slmjax.track.tracker import Tracker

DEFAULT_WATTS = 4.0
"""A busy thread of an unknown or virtual processor, as codecarbon 3 assumes"""
WORLD_AVERAGE = 475.0
"""gCO2e a kWh, world average; International Energy Agency, Global Energy & CO2 Status Report 2019"""


@runtime_checkable
class Meter(Protocol):
    """Measures the energy of one part of the machine."""

    method: str
    part: str
    detail: str

    def kwh(self, seconds: float) -> float:
        """The energy since the last call, `seconds` ago."""
        ...


class Rapl:
    """Processor packages. Raises where there is no readable counter."""

    method, part, detail = "rapl", "cpu", "energy counters of the processor packages (whole machine)"

    def __init__(self, folder: str = "/sys/class/powercap/intel-rapl/subsystem"):
        from codecarbon.core.cpu import IntelRAPL, is_rapl_available

        if not is_rapl_available(folder):
            raise OSError("no readable RAPL counter")
        self._rapl = IntelRAPL(folder)
        self._rapl.start()

    def kwh(self, seconds: float) -> float:
        from codecarbon.core.units import Time

        read = self._rapl.get_cpu_details(Time.from_seconds(seconds))
        return sum(float(value) for name, value in read.items() if "Power" not in name)


class Gpus:
    """The GPUs that CUDA_VISIBLE_DEVICES allows. Raises where there is none."""

    part, detail = "gpu", "energy counters of the visible GPUs"

    def __init__(self):
        from codecarbon.core.gpu import AllGPUDevices
        from codecarbon.core.gpu_nvidia import is_nvidia_system

        self._gpus = AllGPUDevices()
        if not self._gpus.device_count:
            raise OSError("no GPU with a meter")
        self.method = "nvml" if is_nvidia_system() else "amdsmi"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        self._visible = {int(i) for i in visible if i.strip().isdigit()}
        self._gpus.start()

    def kwh(self, seconds: float) -> float:
        from codecarbon.core.units import Time

        read = self._gpus.get_delta(Time.from_seconds(seconds))
        wanted = [gpu for gpu in read if not self._visible or gpu["gpu_index"] in self._visible]
        return sum(gpu["delta_energy_consumption"].kWh for gpu in wanted)


class ProcessorTime:
    """An estimate: watts a busy thread times the CPU time of this process, all its threads."""

    method, part = "tdp-estimate", "cpu"

    def __init__(self, since: float):
        """`since`: the value of `time.process_time()` from which CPU time is counted."""
        self.watts, self.detail = watts_per_thread()
        self._last = since

    def kwh(self, seconds: float) -> float:
        now = time.process_time()
        busy, self._last = now - self._last, now
        return self.watts * busy / 3.6e6


def watts_per_thread() -> tuple[float, str]:
    """Watts of one busy hardware thread, and where the number comes from.

    A virtual machine sees neither the whole chip nor its name, so the thermal design power says nothing there.
    """
    name = re.sub(r"\((R|TM|r|tm)\)| CPU| @ .*| \d+-Core Processor", "", cpu_name()).strip()
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    siblings = re.search(r"^siblings\s*:\s*(\d+)", info, re.MULTILINE)
    if siblings and not re.search(r"^flags\s*:.*\bhypervisor\b", info, re.MULTILINE):
        tdp = _tdp(name)
        if tdp:
            return tdp / int(
                siblings[1]
            ), f"{tdp:g} W thermal design power of {name}, spread over {siblings[1]} threads"
    return DEFAULT_WATTS, f"assumed {DEFAULT_WATTS:g} W for each busy thread of an unknown or virtual {name}"


def _tdp(name: str) -> float | None:
    import csv
    from importlib.resources import files

    with files("codecarbon").joinpath("data/hardware/cpu_power.csv").open(encoding="utf-8") as file:
        return next((float(row["TDP"]) for row in csv.DictReader(file) if row["Name"].lower() == name.lower()), None)


def meters(since: float = 0.0) -> list[Meter]:
    """The meters of this machine: every one that works, and an estimate for the processor if none measures it.

    `since`: the value of `time.process_time()` from which the estimate counts CPU time.
    """
    from codecarbon.external.logger import logger

    logger.setLevel(logging.CRITICAL)
    working: list[Meter] = []
    for kind in (Rapl, Gpus):
        try:
            working.append(kind())
        except Exception:  # a missing driver, library, file or permission: each raises in its own way
            continue
    if not any(meter.part == "cpu" for meter in working):
        working.append(ProcessorTime(since))
    return working


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Carbon intensity of the electricity of a country."""

    grams: float
    """gCO2e a kWh"""
    zone: str
    year: int
    source: str


def grid(country: str = "") -> Grid:
    """The carbon intensity of a country (ISO 3166 alpha-3, such as "FRA"), or of the world where it is empty or
    unknown."""
    from importlib.resources import files

    if country:
        table = files("codecarbon").joinpath("data/private_infra/global_energy_mix.json").read_text(encoding="utf-8")
        row = json.loads(table).get(country.upper())
        if row and row.get("carbon_intensity"):
            source = "Our World in Data, as packaged by codecarbon"
            return Grid(grams=row["carbon_intensity"], zone=row["country_name"], year=int(row["year"]), source=source)
    source = "IEA, Global Energy & CO2 Status Report"
    return Grid(grams=WORLD_AVERAGE, zone="world average", year=2019, source=source)


class Energy(Tracker):
    """Meters the run from construction on, and keeps `energy.json`. The metrics of a step hold no energy: those of an
    interrupted run have to be the same, bit for bit.

    Energy is spent even if the steps it paid for are rolled back or lost in a crash, so the file takes
    precedence over the checkpoint, whose copy is used only if the file is gone.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        pue: float = 1.0,
        country: str = "",
        interval: float = 15.0,
        share: float = 1.0,
        using: Sequence[Meter] | None = None,
    ):
        """`pue`: power usage effectiveness, the kWh that the building draws for each kWh of its computers; `interval`:
        seconds between readings; `share`: the part of what the meters tell that this run is charged; `using`: the
        meters, found in the background if None."""
        self.path = Path(path)
        self._pue, self._country, self._interval, self._share = pue, country, interval, share
        self._meters, self._since = using, time.process_time()
        before = _read(self.path)
        self._had_file = before is not None
        self._total = before or {"parts": {}, "seconds": 0.0}
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="energy", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        working = meters(self._since) if self._meters is None else self._meters
        while not self._stop.wait(self._interval):
            self._tick(working)
        self._tick(working)

    def _tick(self, working: Sequence[Meter]) -> None:
        with self._lock:
            now = time.monotonic()
            seconds, self._last = now - self._last, now
            for meter in working:
                part = self._total["parts"].setdefault(meter.part, {"kwh": 0.0})
                part |= {
                    "kwh": part["kwh"] + self._share * meter.kwh(seconds),
                    "method": meter.method,
                    "detail": meter.detail,
                }
            self._total["seconds"] += seconds
            _write(self.path, self.summary())

    def summary(self) -> dict[str, Any]:
        """kWh so far by part and method, what they are multiplied by, and the emissions. JSON."""
        parts, where = self._total["parts"], grid(self._country)
        it = sum(part["kwh"] for part in parts.values())
        return {
            "kwh": it * self._pue,
            "it_kwh": it,
            "pue": self._pue,
            "method": " + ".join(sorted({part["method"] for part in parts.values()})),
            "estimate": any(part["method"] == "tdp-estimate" for part in parts.values()),
            "parts": parts,
            "seconds": self._total["seconds"],
            "grid": {"g_per_kwh": where.grams, "zone": where.zone, "year": where.year, "source": where.source},
            "co2e_kg": it * self._pue * where.grams / 1000,
        }

    def state(self) -> dict[str, Any]:
        return {"parts": {k: dict(v) for k, v in self._total["parts"].items()}, "seconds": self._total["seconds"]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Adds the energy of earlier attempts from the checkpoint, unless energy.json had it."""
        with self._lock:
            if state and not self._had_file:
                for name, part in state["parts"].items():
                    total = self._total["parts"].setdefault(name, {"kwh": 0.0})
                    total |= {**part, "kwh": total["kwh"] + part["kwh"]}
                self._total["seconds"] += state["seconds"]

    def finish(self, status: str) -> None:
        """The last reading, and the file."""
        self._stop.set()
        self._thread.join(timeout=30)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        before = json.loads(path.read_text())
        return {"parts": before["parts"], "seconds": before["seconds"]}
    except (OSError, ValueError, KeyError):
        return None


def _write(path: Path, data: Mapping[str, Any]) -> None:
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(new, path)
    except OSError:  # a full disk stops the run where it matters, at its checkpoint
        new.unlink(missing_ok=True)
