"""A GPU that was asked for and cannot be used is refused with the reason, which a driver of our own has caused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tensorflow as tf

from job.machine.gpu_diagnosis import missing
from tests.support.running import compile_driver, python, run_job

BUILD = tf.sysconfig.get_build_info()
# The driver's functions that are asked, as in CUDA's cuda.h.
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuGetErrorName(int code, const char **name) { *name = "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? MAJOR : MINOR; return 0; }
"""
ASK = """
import json, sys
from pathlib import Path
from job.machine.gpu_diagnosis import missing
problem, asked = missing(sys.argv[1] or None, None, Path(sys.argv[2]))
print(json.dumps([problem.variable, problem.message, asked]))
"""


def ask(folder: Path, driver: dict[str, int] | None, asked: str = "all") -> tuple[str, str, bool]:
    """Return what is found out in a process for which the machine has a GPU's device file and this driver."""
    (folder / "dev").mkdir()
    (folder / "dev" / "nvidia0").touch()
    if driver is not None:
        compile_driver(folder / "libcuda.so.1", DRIVER, driver)
    done = python(ASK, asked, folder / "dev", cwd=folder, LD_LIBRARY_PATH=str(folder))
    variable, message, was_asked = json.loads(done.stdout.splitlines()[-1])
    return variable, message, was_asked


GOOD = {"INIT": 0, "COUNT": 1, "VERSION": 13000, "MAJOR": 9, "MINOR": 0}


@pytest.mark.parametrize(
    ("driver", "reason", "mend"),
    [
        (None, "driver's library cannot be loaded", "NVIDIA Container Toolkit"),
        pytest.param(
            GOOD | {"INIT": 803}, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "update its driver", marks=pytest.mark.slow
        ),
        pytest.param(GOOD | {"COUNT": 0}, "lists no GPU", "CUDA_VISIBLE_DEVICES", marks=pytest.mark.slow),
        # the suite's TensorFlow has no CUDA of its own
        pytest.param(GOOD, "CUDA's libraries are not installed", "[gpu]", marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a GPU with a driver of its own is attached")
def test_what_is_wrong_between_a_gpu_and_tensorflow_is_told_with_the_mend(
    driver: dict[str, int] | None, reason: str, mend: str, tmp_path: Path
) -> None:
    variable, message, asked = ask(tmp_path, driver)
    assert (variable, asked) == ("NVIDIA_VISIBLE_DEVICES", True)
    assert reason in message
    assert mend in message
    assert "CUDA_VISIBLE_DEVICES=-1" in message


def with_cuda(folder: Path) -> None:
    """Give the process a package of the name under which CUDA's libraries are installed."""
    (folder / "nvidia").mkdir()
    (folder / "nvidia" / "__init__.py").touch()


@pytest.mark.parametrize(
    ("driver", "reason", "mend"),
    [
        (
            GOOD | {"VERSION": 11040},
            f"for CUDA 11.4 at most, and this TensorFlow needs CUDA {BUILD['cuda_version']}",
            "driver",
        ),
        pytest.param(
            GOOD | {"MAJOR": 5, "MINOR": 2},
            "compute capability is 5.2, and this TensorFlow needs 6.0",
            "newer GPU",
            marks=pytest.mark.slow,
        ),
        pytest.param(GOOD, "CUDA or cuDNN cannot be loaded", "anew", marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(not BUILD["is_cuda_build"], reason="this TensorFlow is built for CPUs alone")
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a GPU with a driver of its own is attached")
def test_a_driver_or_a_gpu_that_is_too_old_is_told(
    driver: dict[str, int], reason: str, mend: str, tmp_path: Path
) -> None:
    with_cuda(tmp_path)
    _, message, _ = ask(tmp_path, driver)
    assert reason in message
    assert mend in message


def test_a_gpu_that_nobody_asked_for_is_only_spoken_of(tmp_path: Path) -> None:
    _, message, asked = ask(tmp_path, None, asked="")
    assert not asked
    assert "/dev/nvidia0" in message


def test_without_a_gpu_and_a_wish_for_one_nothing_is_said(tmp_path: Path) -> None:
    for wish in (None, "", "void", "none"):
        assert missing(wish, None, tmp_path) is None
    assert missing("all", "-1", tmp_path) is None


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a GPU is attached")
@pytest.mark.parametrize("verb", ["run", pytest.param("plan", marks=pytest.mark.slow)])
def test_the_job_is_refused_where_a_gpu_was_asked_for_and_none_is_there(
    small: dict[str, str], tmp_path: Path, verb: str
) -> None:
    wish = {"NVIDIA_VISIBLE_DEVICES": "all", "TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    run = run_job(small | wish, verb)
    assert run.code == 78, run.errors
    assert "NVIDIA_VISIBLE_DEVICES: received 'all', so a GPU was asked for, but none is attached" in run.text
    assert "--gpus all" in run.text
    assert not (tmp_path / "output").exists()
