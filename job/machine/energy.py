"""Energy that this machine's devices took, where they count it: GPUs by NVIDIA's NVML, CPU packages by Linux."""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_POWERCAP = Path("/sys/class/powercap")
# A package's counter begins anew after 65 to 262 kJ (max_energy_range_uj): less than three minutes at 400 W.
_SECONDS_BETWEEN_READINGS = 30.0
_SUCCESS = 0
_BUS_ID_BYTES = 32


class _SilentError(Exception):
    """A device does not tell. The message says why."""


@dataclass
class _Counter:
    """A device's counter. read: joules, growing. range: where it begins anew, None if nowhere."""

    name: str
    read: Callable[[], float]
    range: float | None = None
    last: float = 0.0

    def __post_init__(self) -> None:
        self.last = self.read()

    def step(self) -> float:
        """Return the joules since the last reading. Raises _SilentError."""
        now = self.read()
        grown = now - self.last
        if grown < 0:
            if self.range is None:
                raise _SilentError(f"the counter of {self.name} went back, as after a reset")
            grown += self.range
        self.last = now
        return grown


class Meter:
    """A counter of the joules that this machine's devices took, whoever used them.

    Counted are, for a run on GPUs, those that CUDA lets this process see (``nvmlDeviceGetTotalEnergyConsumption``,
    Volta and later), and the CPU's packages (Linux's powercap, ``intel-rapl``, Intel and AMD: readable by root only on
    most systems). A GPU that is divided (MIG) counts for all its parts together, so it does not tell. Neither does a
    run on GPUs of which one does not tell: the CPU's share alone would mislead. Memory, disks and fans are never
    counted.
    """

    def __init__(self, gpu: bool, powercap: Path = _POWERCAP, seconds: float = _SECONDS_BETWEEN_READINGS) -> None:
        """Begin to count.

        gpu: whether the run is on GPUs. powercap: Linux's folder of power zones. seconds: between readings by a thread,
        which ends with the meter, so that a counter begins anew at most once between two of them.
        """
        self._lock = threading.Lock()
        self._joules = 0.0
        self._counters: list[_Counter] = []
        try:
            gpus = _gpus() if gpu else []
            packages = _packages(powercap)
            self._counters = [*gpus, *packages]
        except _SilentError as why:
            logger.debug("energy is not counted: %s", why)
        if self._counters:
            logger.info("energy is counted of %s", ", ".join(self.devices), extra={"devices": list(self.devices)})
        if any(counter.range is not None for counter in self._counters):
            reading = threading.Thread(
                target=_keep_reading, args=(weakref.ref(self), seconds), name="energy", daemon=True
            )
            reading.start()

    @property
    def devices(self) -> tuple[str, ...]:
        """Return the devices that are counted; none where nothing tells."""
        return tuple(counter.name for counter in self._counters)

    def joules(self) -> float | None:
        """Return the joules since construction, never less than before; None where nothing tells, or no longer."""
        with self._lock:
            if not self._counters:
                return None
            try:
                self._joules += sum(counter.step() for counter in self._counters)
            except _SilentError as why:
                logger.info("energy is no longer counted: %s", why)
                self._counters = []
                return None
            return self._joules


def _keep_reading(reference: weakref.ref[Meter], seconds: float) -> None:
    pause = threading.Event()
    while not pause.wait(seconds):
        meter = reference()
        if meter is None or meter.joules() is None:
            return
        del meter


def _packages(powercap: Path) -> list[_Counter]:
    """Return the counters of the CPU's packages; none where one of them does not tell."""
    found = []
    try:
        for zone in sorted(powercap.glob("intel-rapl:*")):
            # the other zones are parts of a package, or the whole machine
            name = (zone / "name").read_text().strip()
            if name.startswith("package"):
                size = int((zone / "max_energy_range_uj").read_text()) / 1e6
                found.append(_Counter(f"CPU {name}", _zone_reader(zone / "energy_uj"), size))
    except (OSError, ValueError, _SilentError) as error:
        logger.debug("energy of the CPU is not counted: %s", error)
        return []
    return found


def _zone_reader(path: Path) -> Callable[[], float]:
    def read() -> float:
        try:
            return int(path.read_text()) / 1e6
        except (OSError, ValueError) as error:
            raise _SilentError(f"{path} cannot be read ({error})") from error

    return read


def _gpus() -> list[_Counter]:
    """Return the counters of the GPUs that CUDA lets this process see. Raises _SilentError."""
    import pynvml

    try:
        pynvml.nvmlInit()
        found = []
        for bus_id in _bus_ids():
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
            name = f"GPU {pynvml.nvmlDeviceGetName(handle)} at {bus_id}"
            if _is_divided(pynvml, handle):
                raise _SilentError(f"{name} is divided (MIG), and counts for all its parts together")
            found.append(_Counter(name, _gpu_reader(pynvml, handle, name)))
    except pynvml.NVMLError as error:
        raise _SilentError(f"NVML: {error}") from error
    if not found:
        raise _SilentError("CUDA lists no GPU")
    return found


def _bus_ids() -> list[str]:
    """Return where the GPUs are that CUDA lists: it heeds CUDA_VISIBLE_DEVICES, and has an order of its own."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise _SilentError(f"CUDA's driver cannot be loaded ({error})") from error
    count, bus_ids = ctypes.c_int(), []
    if driver.cuInit(0) != _SUCCESS or driver.cuDeviceGetCount(ctypes.byref(count)) != _SUCCESS:
        raise _SilentError("CUDA's driver does not start")
    for number in range(count.value):
        text = ctypes.create_string_buffer(_BUS_ID_BYTES)
        if driver.cuDeviceGetPCIBusId(text, _BUS_ID_BYTES, number) != _SUCCESS:
            raise _SilentError(f"CUDA does not tell where GPU {number} is")
        bus_ids.append(text.value.decode())
    return bus_ids


def _is_divided(pynvml: Any, handle: Any) -> bool:
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError_NotSupported:
        return False
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def _gpu_reader(pynvml: Any, handle: Any, name: str) -> Callable[[], float]:
    def read() -> float:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        except pynvml.NVMLError as error:
            raise _SilentError(f"{name} does not count its energy ({error})") from error

    return read
