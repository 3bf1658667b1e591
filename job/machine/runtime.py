"""The machine: devices, precision, XLA, determinism and seeds."""

from __future__ import annotations

import logging
import os
import platform as machine
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import keras
import numpy as np
import tensorflow as tf

from job.errors import ConfigError, first_line
from job.machine import gpu_diagnosis
from job.machine.replicas import Replicas, connect
from job.settings.groups import PlatformSettings, RuntimeSettings

logger = logging.getLogger(__name__)

# The probe's repeats differ by some percent, and half precision costs digits: it must be clearly faster.
_WORTHWHILE_GAIN = 1.2
# The largest error accepted of sums whose deviation is 1: a GPU multiplies with TF32's 10 bits and errs by 0.003.
_PROOF_TOLERANCE = 0.02


@dataclass(frozen=True)
class Runtime:
    """What was decided about the machine.

    devices: a readable name each. precision: float32, mixed_float16 or mixed_bfloat16. xla: whether steps are
    compiled by XLA. deterministic: whether every op repeats bit for bit. gpu: whether it trains on one. cores: of the
    CPU, that this process may use. proof: what the device was seen to compute, as a sentence. replicas: the
    devices that train together.
    """

    devices: tuple[str, ...]
    precision: str
    xla: bool
    deterministic: bool
    gpu: bool = False
    cores: int = 1
    proof: str = ""
    replicas: Replicas = field(default_factory=Replicas)


def start(settings: RuntimeSettings, platform: PlatformSettings | None = None, *, alone: bool = False) -> Runtime:
    """Claim the devices, join the other workers, and set precision and determinism for the whole process.

    On a CPU, auto means float32 without XLA: XLA was 11 times slower there for MobileNetV2's forward pass and 6 times
    for training, and bfloat16 gained nothing. On a GPU it means XLA where it compiles, and half precision where a
    short probe is faster in it: depthwise convolutions can be slower. Several devices take no XLA: it cannot compile
    what exchanges values between them.

    Args:
        settings: of the machine.
        platform: what names the other workers and the GPUs to be had.
        alone: whether the other workers are left alone.

    Raises:
        ConfigError: a device does not compute what NumPy does, a GPU was to be had and cannot be used, XLA is asked for
            and cannot compile, or the workers do not fit each other.
        UnavailableError: a worker went away while they met.
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
    kind = "GPU" if gpus else "CPU"
    several = replicas.count > 1 or platform.cluster is not None
    proofs = [prove(f"{kind}:{number}") for number in range(replicas.local)]
    device = f"{kind}:0"
    xla = settings.xla == "on" or (settings.xla == "auto" and bool(gpus) and not several)
    if xla and (fault := "several devices train together" if several else xla_fault(device)) is not None:
        if settings.xla == "on":
            raise ConfigError.of(
                "TRANSFER_XLA",
                f"received 'on', but XLA cannot compile for {device}: {fault}. Use auto or off, or add what is missing "
                "(for a GPU, ptxas and libdevice: the job's extra [gpu] brings them)",
            )
        logger.warning("XLA cannot compile for %s, so steps run without it: %s", device, fault)
        xla = False
    proof = f"{proofs[0]}, compiled by XLA too" if xla else proofs[0]
    precision: str = settings.precision
    if precision == "auto":
        precision = "mixed_float16" if gpus and half_precision_gain(device) >= _WORTHWHILE_GAIN else "float32"
        # a probe may come out differently on another worker
        precision = replicas.from_chief(precision.encode()).decode()
    keras.config.set_dtype_policy(precision)
    if settings.deterministic:
        tf.config.experimental.enable_op_determinism()
    told = replicas.gather("\n".join(_device_names(gpus, replicas.local)).encode())
    names = tuple(name for names in told for name in names.decode().split("\n"))
    cores = len(os.sched_getaffinity(0))
    return Runtime(names, precision, xla, settings.deterministic, bool(gpus), cores, proof, replicas)


def _logical_devices() -> tuple[str, ...]:
    """Return the devices that train: all GPUs, else the CPU, which is one unless TensorFlow was told to divide it."""
    found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tuple(device.name for device in found)


def _device_names(gpus: list[tf.config.PhysicalDevice], devices: int) -> tuple[str, ...]:
    if not gpus:
        return (f"CPU ({machine.machine()}, {len(os.sched_getaffinity(0))} cores)",) * devices
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


def half_precision_gain(device: str) -> float:
    """Return how many times as fast a training step of separable convolutions is in float16 as in float32."""
    seconds = {}
    for dtype in (tf.float32, tf.float16):
        with tf.device(device):
            x = tf.ones([32, 28, 28, 192], dtype)
            depthwise, pointwise = tf.ones([3, 3, 192, 1], dtype), tf.ones([1, 1, 192, 192], dtype) / 192
        step = _separable_step(x, depthwise, pointwise)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            step().numpy()
            times.append(time.perf_counter() - start)
        seconds[dtype] = statistics.median(times[2:])  # the first ones choose kernels
    return seconds[tf.float32] / seconds[tf.float16]


def _separable_step(x: tf.Tensor, depthwise: tf.Tensor, pointwise: tf.Tensor) -> Callable[[], tf.Tensor]:
    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch([depthwise, pointwise])
            y = x
            for _ in range(4):
                y = tf.nn.depthwise_conv2d(y, depthwise / 9, [1, 1, 1, 1], "SAME")
                y = tf.nn.relu6(tf.nn.conv2d(y, pointwise, 1, "SAME"))
            loss = tf.reduce_mean(tf.cast(y, tf.float32))
        return tf.add_n([tf.reduce_sum(gradient) for gradient in tape.gradient(loss, [depthwise, pointwise])])

    compiled: Callable[[], tf.Tensor] = step
    return compiled
