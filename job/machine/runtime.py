"""The machine: devices, precision, XLA and determinism."""

from __future__ import annotations

import logging
import platform as machine
import time
from dataclasses import dataclass, field
from typing import Literal

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.client import device_lib

from job.errors import ConfigError, first_line
from job.machine import gpu_diagnosis, limits
from job.machine.replicas import Replicas, connect
from job.settings.groups import PlatformSettings, RuntimeSettings

logger = logging.getLogger(__name__)

# From this compute capability on, a GPU multiplies float32 with TF32's 10 bits unless it is told not to.
_TF32_SINCE = (8, 0)
# From this one on, it has units for half precision; before, float16 is slower than float32 and bfloat16 emulated.
_HALF_SINCE = (7, 0)
# The largest error accepted of sums whose deviation is 1: a GPU multiplies with TF32's 10 bits and errs by 0.003.
_PROOF_TOLERANCE = 0.02


@dataclass(frozen=True)
class Runtime:
    """What was decided about the machine.

    devices: a readable name each. precision: float32, mixed_float16 or mixed_bfloat16. xla: whether steps are
    compiled by XLA; auto where that is found out in training. deterministic: whether every op repeats bit for bit.
    gpu: whether it trains on one. gpu_bytes: of memory that TensorFlow may take on the smallest; 0 without one. tf32:
    whether products of float32 are taken of 10 bits. cores: of the CPU, that this process may use. proof: what the
    device was seen to compute, as a sentence. replicas: the devices that train together.
    """

    devices: tuple[str, ...]
    precision: str
    xla: Literal["off", "auto", "on"]
    deterministic: bool
    gpu: bool = False
    gpu_bytes: int = 0
    tf32: bool = False
    cores: int = 1
    proof: str = ""
    replicas: Replicas = field(default_factory=Replicas)

    @property
    def arithmetic(self) -> str:
        """Return what products are taken in: the precision, or tf32."""
        return "tf32" if self.tf32 and self.precision == "float32" else self.precision


def start(settings: RuntimeSettings, platform: PlatformSettings | None = None, *, alone: bool = False) -> Runtime:
    """Claim the devices, join the other workers, and set precision and determinism for the whole process.

    Precision auto means float32, in which a GPU that has TF32 multiplies by it. It is a rule, not a probe: the
    fingerprint holds the precision, and what is decided by a race could come out differently when a killed run goes on.
    Half precision is for those who ask for it; ``plan``, which takes real steps, tells what it would gain.

    XLA auto means none on a CPU: it was 11 times slower there for MobileNetV2's forward pass and 6 times for training.
    On a GPU training finds out (``training.compilation``), but not with several devices, where XLA cannot compile what
    exchanges values between them, nor where results are to be reproducible.

    Args:
        settings: of the machine.
        platform: what names the other workers and the GPUs to be had.
        alone: whether the other workers are left alone.

    Raises:
        ConfigError: a device does not compute what NumPy does, a GPU was to be had and cannot be used, XLA or half
            precision is asked for and cannot be had, or the workers do not fit each other.
        UnavailableError: a worker was missing, or went away while they met.
        Stopped: this worker was asked to stop, or another that had met the others.
    """
    platform = platform or PlatformSettings()
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus and (found := gpu_diagnosis.missing(platform.nvidia_visible_devices, platform.cuda_visible_devices)):
        problem, asked_for = found
        if asked_for:
            raise ConfigError([problem])
        logger.warning("%s", problem.message)
    for each in gpus:
        tf.config.experimental.set_memory_growth(each, True)
    cluster = None if alone else platform.cluster
    devices = () if cluster else _logical_devices()
    replicas = connect(cluster, devices)
    with replicas.ending_alike():
        return _prepared(settings, platform, gpus, replicas)


def _prepared(
    settings: RuntimeSettings, platform: PlatformSettings, gpus: list[tf.config.PhysicalDevice], replicas: Replicas
) -> Runtime:
    kind = "GPU" if gpus else "CPU"
    several = replicas.count > 1 or platform.cluster is not None
    proofs = [prove(f"{kind}:{number}") for number in range(replicas.local)]
    device = f"{kind}:0"
    xla: Literal["off", "auto", "on"] = settings.xla
    if xla == "auto" and (not gpus or several or settings.deterministic):
        xla = "off"
    if xla != "off" and (fault := "several devices train together" if several else xla_fault(device)) is not None:
        if xla == "on":
            raise ConfigError.of(
                "TRANSFER_XLA",
                f"received 'on', but XLA cannot compile for {device}: {fault}. Use auto or off, or add what is missing "
                "(for a GPU, ptxas and libdevice: the job's extra [gpu] brings them)",
            )
        logger.warning("XLA cannot compile for %s, so steps run without it: %s", device, fault)
        xla = "off"
    proof = proofs[0] if xla == "off" else f"{proofs[0]}, compiled by XLA too"
    precision, tf32 = arithmetic_of(settings.precision, _capability(gpus), platform.nvidia_tf32_override)
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    keras.config.set_dtype_policy(precision)
    if settings.deterministic:
        tf.config.experimental.enable_op_determinism()
    told = replicas.gather("\n".join(_device_names(gpus, replicas.local)).encode())
    names = tuple(name for names in told for name in names.decode().split("\n"))
    return Runtime(
        devices=names,
        precision=precision,
        xla=xla,
        deterministic=settings.deterministic,
        gpu=bool(gpus),
        gpu_bytes=_gpu_bytes() if gpus else 0,
        tf32=tf32,
        cores=limits.cpus(),
        proof=proof,
        replicas=replicas,
    )


def arithmetic_of(
    asked_for: str, capability: tuple[int, int] | None, tf32_override: str | None = None
) -> tuple[str, bool]:
    """Return the precision, and whether products of float32 are taken of TF32's 10 bits.

    Args:
        asked_for: the setting.
        capability: of the GPUs, the lowest; None on a CPU.
        tf32_override: the driver's own switch, which every library of NVIDIA's heeds; 0 switches TF32 off.

    Raises:
        ConfigError: half precision is asked for, and the GPU has no units for it.
    """
    precision = "float32" if asked_for == "auto" else asked_for
    if capability is None:
        return precision, False
    if precision != "float32" and capability < _HALF_SINCE:
        raise ConfigError.of(
            "TRANSFER_PRECISION",
            f"received '{precision}', but the GPU's compute capability is {capability[0]}.{capability[1]}, and half "
            f"precision needs {_HALF_SINCE[0]}.{_HALF_SINCE[1]}; accepted here: auto, float32",
        )
    return precision, capability >= _TF32_SINCE and tf32_override != "0"


def _capability(gpus: list[tf.config.PhysicalDevice]) -> tuple[int, int] | None:
    """Return the lowest compute capability among the GPUs; None without one, (0, 0) of one that does not tell."""
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    return min((detail.get("compute_capability", (0, 0)) for detail in details), default=None)


def _gpu_bytes() -> int:
    """Return the bytes that TensorFlow may take on the GPU with the fewest."""
    limits = [each.memory_limit for each in device_lib.list_local_devices() if each.device_type == "GPU"]
    return int(min(limits, default=0))


def _logical_devices() -> tuple[str, ...]:
    """Return the devices that train: all GPUs, else the CPU, which is one unless TensorFlow was told to divide it."""
    found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tuple(device.name for device in found)


def _device_names(gpus: list[tf.config.PhysicalDevice], devices: int) -> tuple[str, ...]:
    if not gpus:
        return (f"CPU ({machine.machine()}, {limits.cpus()} cores)",) * devices
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    return tuple(f"GPU ({detail.get('device_name', 'unknown')})" for detail in details)


def prove(device: str) -> str:
    """Return what ``device`` computes as NumPy does, and how fast: a matrix product and a convolution.

    A GPU can be listed that computes nothing: its driver too old, cuDNN missing, its memory taken by another process.

    Raises:
        ConfigError: it fails, or gives other values.
    """
    begin = time.perf_counter()
    random = np.random.default_rng(0)
    left, right = (random.standard_normal((64, 64), np.float32) for _ in range(2))
    image = random.standard_normal((1, 16, 16, 8), np.float32)
    kernel = random.standard_normal((3, 3, 8, 8), np.float32)
    patches = np.lib.stride_tricks.sliding_window_view(image, (3, 3), axis=(1, 2))
    expected = {
        "matrix product": left @ right / 8.0,
        "convolution": np.einsum("bijcyx,yxco->bijo", patches, kernel) / np.sqrt(72.0),
    }
    try:
        with tf.device(device):
            found = {
                "matrix product": tf.linalg.matmul(left, right) / 8.0,
                "convolution": tf.nn.conv2d(image, kernel, 1, "VALID") / np.sqrt(72.0),
            }
            off = {name: float(np.abs(values.numpy() - expected[name]).max()) for name, values in found.items()}
    except tf.errors.OpError as error:
        raise _useless(device, f"it fails: {first_line(error)}") from error
    for name, values in found.items():
        if not values.device.endswith(device):  # TensorFlow takes another one without a word
            raise _useless(device, f"the {name} was computed on {values.device}")
        if not off[name] <= _PROOF_TOLERANCE:
            raise _useless(device, f"its {name} is {off[name]:.2g} away from NumPy's, more than {_PROOF_TOLERANCE}")
    return f"{' and '.join(expected)} computed in {1000 * (time.perf_counter() - begin):.0f} ms"


def _useless(device: str, why: str) -> ConfigError:
    if device.startswith("CPU"):
        return ConfigError.of(
            "TF_ENABLE_ONEDNN_OPTS", f"the CPU cannot compute: {why}; try 0, and if that does not help another machine"
        )
    advice = "update its driver, install the job with its extra [gpu], end what else uses it"
    return ConfigError.of("CUDA_VISIBLE_DEVICES", f"{device} cannot compute: {why}; {advice}, or give -1: the CPU")


def xla_fault(device: str) -> str | None:
    """Return why XLA cannot compile for ``device``; None where it can.

    It is tried with a convolution, and its values are held against those computed without: ptxas or libdevice may be
    missing.
    """
    image = tf.random.stateless_normal([1, 8, 8, 4], [0, 1])

    def convolve() -> tf.Tensor:
        return tf.nn.conv2d(image, image[0, :3, :3, :, None], 1, "SAME")

    try:
        with tf.device(device):
            compiled = tf.function(convolve, jit_compile=True)()
            off = float(tf.reduce_max(tf.abs(compiled - convolve())))
    except tf.errors.OpError as error:
        return first_line(error)
    if not compiled.device.endswith(device):
        return f"a convolution for it was computed on {compiled.device}"
    # sums of 36 products, whose deviation is 6
    return None if off <= 6 * _PROOF_TOLERANCE else f"its convolution is {off:.2g} away from the uncompiled one"
