"""Energy is counted where devices tell, as a driver of our own and a folder of power zones make them tell."""

from __future__ import annotations

import gc
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from job.machine.energy import Meter
from tests.support.running import compile_driver, python

# As in CUDA's cuda.h: the GPUs that this process may see, in CUDA's own order.
CUDA = """
#include <stdio.h>
static const char *places[] = {PLACES};
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int *count) { *count = sizeof places / sizeof *places; return 0; }
int cuDeviceGetPCIBusId(char *text, int size, int device) { snprintf(text, size, "%s", places[device]); return 0; }
"""
# As in NVIDIA's nvml.h: the GPU at 0000:0N:00.0 takes N joules between two readings; 3 is not supported.
NVML = """
#include <string.h>
static unsigned long long millijoules[10];
static int calls;
int nvmlInitWithFlags(unsigned flags) { return INIT; }
const char *nvmlErrorString(int code) { return code == 3 ? "Not Supported" : "Unknown Error"; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *place, void **handle) {
  *handle = millijoules + (place[6] - '0');
  return 0;
}
int nvmlDeviceGetName(void *handle, char *name, unsigned size) { strncpy(name, "H200", size); return 0; }
int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
  *current = *pending = MIG == 1;
  return MIG < 0 ? 3 : 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *value) {
  unsigned long long *counter = handle;
  *counter += 1000 * (counter - millijoules);
  *value = 1000000 + *counter;
  return ++calls > LIMIT ? 3 : 0;
}
"""
ASK = """
import json, logging, sys
from pathlib import Path
logging.basicConfig(level=logging.DEBUG, format="%(message)s", filename=sys.argv[2])
from job.machine.energy import Meter
assert not {"pynvml", "tensorflow"} & set(sys.modules)
meter = Meter(True, Path(sys.argv[1]))
print(json.dumps([meter.devices, meter.joules(), meter.joules()]))
"""
GOOD: dict[str, Any] = {"INIT": 0, "MIG": 0, "LIMIT": 1000, "PLACES": ["0000:02:00.0", "0000:01:00.0"]}


def ask(folder: Path, *libraries: str, **faults: Any) -> tuple[list[str], list[float | None], str]:
    """Return the devices, two readings and the log of a process that has these of the driver's libraries."""
    defined = GOOD | faults
    defined["PLACES"] = ",".join(f'"{place}"' for place in defined["PLACES"])
    for name, source in (("libcuda.so.1", CUDA), ("libnvidia-ml.so.1", NVML)):
        if name in libraries:
            compile_driver(folder / name, source, defined)
    done = python(ASK, folder / "powercap", folder / "log", LD_LIBRARY_PATH=str(folder), PYTHONWARNINGS="error")
    devices, *readings = json.loads(done.stdout)
    return devices, readings, (folder / "log").read_text()


def zone(powercap: Path, name: str, kind: str, microjoules: int, largest: int = 262_143_328_850) -> Path:
    """Make a power zone as Linux shows it, and return its counter."""
    folder = powercap / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "max_energy_range_uj").write_text(f"{largest}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_the_gpus_that_cuda_lists_are_counted(tmp_path: Path) -> None:
    devices, readings, log = ask(tmp_path, "libcuda.so.1", "libnvidia-ml.so.1")
    assert devices == ["GPU H200 at 0000:02:00.0", "GPU H200 at 0000:01:00.0"]
    assert readings == [3, 6]
    assert log.splitlines() == [f"energy is counted of {', '.join(devices)}"]


def test_a_gpu_that_cuda_does_not_list_is_not_counted(tmp_path: Path) -> None:
    devices, readings, _ = ask(tmp_path, "libcuda.so.1", "libnvidia-ml.so.1", PLACES=["0000:02:00.0"])
    assert devices == ["GPU H200 at 0000:02:00.0"]
    assert readings == [2, 4]


def test_gpus_and_packages_are_added_up(tmp_path: Path) -> None:
    zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 5)
    devices, readings, _ = ask(tmp_path, "libcuda.so.1", "libnvidia-ml.so.1", MIG=-1)
    assert devices[-1] == "CPU package-0"
    assert len(devices) == 3
    assert readings == [3, 6]


@pytest.mark.parametrize(
    ("libraries", "faults", "reason"),
    [
        ((), {}, "NVML: NVML Shared Library Not Found"),
        (("libnvidia-ml.so.1",), {}, "CUDA's driver cannot be loaded"),
        (("libnvidia-ml.so.1", "libcuda.so.1"), {"INIT": 999}, "NVML: Unknown Error"),
        (("libnvidia-ml.so.1", "libcuda.so.1"), {"MIG": 1}, "is divided (MIG)"),
        (("libnvidia-ml.so.1", "libcuda.so.1"), {"LIMIT": 0}, "does not count its energy (Not Supported)"),
    ],
)
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a GPU with a driver of its own is attached")
def test_a_gpu_that_does_not_tell_is_no_error_and_packages_alone_do_not_stand_for_it(
    libraries: tuple[str, ...], faults: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 5)
    devices, readings, log = ask(tmp_path, *libraries, **faults)
    assert devices == []
    assert readings == [None, None]
    assert len(log.splitlines()) == 1
    assert reason in log


def test_a_gpu_that_stops_to_tell_is_no_longer_counted(tmp_path: Path) -> None:
    _, readings, log = ask(tmp_path, "libcuda.so.1", "libnvidia-ml.so.1", PLACES=["0000:04:00.0"], LIMIT=2)
    assert readings == [4, None]
    assert "energy is no longer counted: GPU H200 at 0000:04:00.0 does not count" in log


def test_packages_are_counted_and_neither_their_parts_nor_the_machine(tmp_path: Path) -> None:
    counters = [
        zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000),
        zone(tmp_path, "intel-rapl:0:0", "core", 7),
        zone(tmp_path, "intel-rapl:1", "package-1", 2_000_000),
        zone(tmp_path, "intel-rapl:2", "psys", 7),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 7),
    ]
    meter = Meter(False, tmp_path)
    assert meter.devices == ("CPU package-0", "CPU package-1")
    assert meter.joules() == 0
    for counter in counters:
        counter.write_text(str(int(counter.read_text()) + 2_500_000))
    assert meter.joules() == pytest.approx(5)
    assert meter.joules() == pytest.approx(5)


def test_a_counter_that_begins_anew_goes_on(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 90_000_000, 100_000_000)
    meter = Meter(False, tmp_path)
    counter.write_text("5000000")
    assert meter.joules() == pytest.approx(15)


def test_a_counter_that_begins_anew_twice_between_two_questions_is_read_meanwhile(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0, 100_000_000)
    meter = Meter(False, tmp_path, seconds=0.01)
    # whoever opens the pipe to write waits until the meter's thread opens it to read
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "next").write_text("20000000")
    (tmp_path / "pipe").rename(counter)
    with counter.open("w") as reading:
        (tmp_path / "next").rename(counter)
        reading.write("60000000")
    assert meter.joules() == pytest.approx(60 + 60)


def test_the_thread_ends_with_its_meter(tmp_path: Path) -> None:
    def reading() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "energy"]

    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    others = set(reading())
    meter = Meter(False, tmp_path, seconds=0.01)
    (thread,) = set(reading()) - others
    del meter
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("fault", ["no zones", "unreadable", "no number"])
def test_packages_that_do_not_tell_are_no_error(fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if fault != "no zones":
        counter = zone(tmp_path, "intel-rapl:0", "package-0", 5)
        counter.unlink()
        # root may read every file, but no folder as if it were one
        counter.mkdir() if fault == "unreadable" else counter.write_text("")
    with caplog.at_level(logging.INFO):
        meter = Meter(False, tmp_path)
    assert meter.devices == ()
    assert meter.joules() is None
    assert not caplog.records


def test_a_package_that_stops_to_tell_is_no_longer_counted(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 5)
    meter = Meter(False, tmp_path)
    assert meter.joules() == 0
    counter.unlink()
    assert meter.joules() is None
    assert meter.devices == ()
