"""Why a GPU that was to be had cannot be used, and how to mend it: asked of the driver itself."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import tensorflow as tf

from job.errors import Problem

# Where the device files of NVIDIA GPUs are, nvidia0 and so on, whether or not TensorFlow can use them.
_DEVICES = Path("/dev")
# What the container runtime takes for no GPU.
_NONE = ("", "void", "none")
_SUCCESS = 0
# CUDA driver API, cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR, _MINOR = 75, 76
_ON_THE_CPU = "or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU"


def missing(
    nvidia_visible: str | None, cuda_visible: str | None, devices: Path = _DEVICES
) -> tuple[Problem, bool] | None:
    """Return why TensorFlow sees no GPU and the mend, and whether one was asked for; None if there is none to be had.

    A container asks for one by ``NVIDIA_VISIBLE_DEVICES``, which images for GPUs and the device plugins of clusters
    set. On a machine without containers a device file says that there is one, but nobody asked.

    For use where ``tf.config.list_physical_devices("GPU")`` is empty.
    """
    attached = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    asked = (nvidia_visible or "") not in _NONE
    if cuda_visible == "-1" or not (attached or asked):
        return None
    if not attached:
        message = (
            f"received {nvidia_visible!r}, so a GPU was asked for, but none is attached (there is no /dev/nvidia0). "
            "Start the container with one (docker: --gpus all, with the NVIDIA Container Toolkit; Kubernetes: a limit "
            f"of nvidia.com/gpu; Vertex AI: an acceleratorType), {_ON_THE_CPU}"
        )
        return Problem("NVIDIA_VISIBLE_DEVICES", message), True
    reason, mend = _fault()
    message = f"a GPU is attached (/dev/{attached[0]}), but TensorFlow can use none: {reason}. {mend}, {_ON_THE_CPU}"
    return Problem("NVIDIA_VISIBLE_DEVICES" if asked else "CUDA_VISIBLE_DEVICES", message), asked


def _fault() -> tuple[str, str]:
    """Return the reason and the mend, the first that is found on the way from the driver to TensorFlow."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        mend = (
            "Install the NVIDIA driver on the machine; in a container, the NVIDIA Container Toolkit brings it in, for "
        )
        return f"the driver's library cannot be loaded ({error})", mend + "docker run --gpus all"
    if (code := driver.cuInit(0)) != _SUCCESS:
        return f"the driver does not start ({_name(driver, code)})", "Restart the machine, or update its driver"
    count, version = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    driver.cuDriverGetVersion(ctypes.byref(version))
    if not count.value:
        return "the driver lists no GPU", "Let the process see one (CUDA_VISIBLE_DEVICES, NVIDIA_VISIBLE_DEVICES)"
    build = tf.sysconfig.get_build_info()
    if not build["is_cuda_build"]:
        return "this TensorFlow is a build for CPUs", "Install the job with its extra [gpu], or use its GPU image"
    if importlib.util.find_spec("nvidia") is None:
        return "CUDA's libraries are not installed", "Install the job with its extra [gpu], or use its GPU image"
    needed = str(build["cuda_version"])
    had = version.value // 1000, version.value % 1000 // 10
    if had[0] < int(needed.partition(".")[0]):
        return (
            f"its driver is for CUDA {had[0]}.{had[1]} at most, and this TensorFlow needs CUDA {needed}",
            "Update the driver",
        )
    capability = tuple(_attribute(driver, each) for each in (_MAJOR, _MINOR))
    lowest = min(_capability(str(each)) for each in build["cuda_compute_capabilities"])
    if capability < lowest:
        its, least = (".".join(map(str, each)) for each in (capability, lowest))
        return f"its compute capability is {its}, and this TensorFlow needs {least} at least", "Take a newer GPU"
    return "its libraries of CUDA or cuDNN cannot be loaded", "Install the job's extra [gpu] anew, or use its GPU image"


def _attribute(driver: ctypes.CDLL, which: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), which, 0)
    return value.value


def _capability(name: str) -> tuple[int, int]:
    """Return major and minor of a name such as ``sm_60``, ``compute_90`` or ``8.9``."""
    digits = name.rpartition("_")[2]
    major, _, minor = digits.partition(".") if "." in digits else (digits[:-1], "", digits[-1])
    return int(major), int(minor)


def _name(driver: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {code}"
