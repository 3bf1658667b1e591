"""The machine: devices, precision, XLA, determinism and seeds."""

from __future__ import annotations

import logging
import os
import platform
import signal
import statistics
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import keras
import numpy as np
import tensorflow as tf

from job.errors import Stopped
from job.settings import RuntimeSettings

logger = logging.getLogger(__name__)

# The probe's repeats differ by some percent, and half precision costs digits: it must be clearly faster.
_WORTHWHILE_GAIN = 1.2


@dataclass(frozen=True)
class Runtime:
    """What was decided about the machine.

    devices: a readable name each. precision: float32, mixed_float16 or mixed_bfloat16. xla: whether steps are
    compiled by XLA. deterministic: whether every op repeats bit for bit. gpu: whether it trains on one. cores: of the
    CPU, that this process may use.
    """

    devices: tuple[str, ...]
    precision: str
    xla: bool
    deterministic: bool
    gpu: bool = False
    cores: int = 1


def start(settings: RuntimeSettings) -> Runtime:
    """Claim the device and set precision and determinism for the whole process.

    On a CPU, auto means float32 without XLA: XLA was 11 times slower there for MobileNetV2's forward pass and 6 times
    for training, and bfloat16 gained nothing. On a GPU it means XLA where it compiles, and half precision where a
    short probe is faster in it: depthwise convolutions can be slower.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if len(gpus) > 1:
        logger.warning("%d GPUs are attached; this version trains on the first", len(gpus))
        tf.config.set_visible_devices(gpus[:1], "GPU")
    device = "GPU:0" if gpus else "CPU:0"
    xla = settings.xla == "on" or (settings.xla == "auto" and bool(gpus) and xla_compiles(device))
    precision = settings.precision
    if precision == "auto":
        precision = "mixed_float16" if gpus and half_precision_gain(device) >= _WORTHWHILE_GAIN else "float32"
    keras.config.set_dtype_policy(precision)
    if settings.deterministic:
        tf.config.experimental.enable_op_determinism()
    cores = len(os.sched_getaffinity(0))
    return Runtime(_device_names(gpus[:1]), precision, xla, settings.deterministic, bool(gpus), cores)


def _device_names(gpus: list[tf.config.PhysicalDevice]) -> tuple[str, ...]:
    if not gpus:
        return (f"CPU ({platform.machine()}, {len(os.sched_getaffinity(0))} cores)",)
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    return tuple(f"GPU ({detail.get('device_name', 'unknown')})" for detail in details)


def xla_compiles(device: str) -> bool:
    """Return whether XLA can compile for ``device``, by compiling a convolution: ptxas or libdevice may be missing."""
    try:
        with tf.device(device):
            convolve = tf.function(lambda x: tf.nn.conv2d(x, x[0, :3, :3, :, None], 1, "SAME"), jit_compile=True)
            convolve(tf.ones([1, 8, 8, 4])).numpy()
    except tf.errors.OpError as error:
        logger.warning("XLA cannot compile on %s, so steps run without it: %s", device, str(error).splitlines()[0])
        return False
    return True


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


def derived_seed(seed: int, purpose: str, *counters: int) -> int:
    """Return a 31-bit seed that depends on all arguments and on nothing else.

    All randomness is a function of (seed, purpose, step), so that a resumed run draws what the undisturbed one drew.
    """
    entropy = (seed, zlib.crc32(purpose.encode()), *counters)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)


_asked_to_stop = threading.Event()


@contextmanager
def heed_sigterm() -> Iterator[None]:
    """Turn the first SIGTERM inside the block into Stopped; a second one ends the process at once."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _asked_to_stop.set()
        stop_if_asked()

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        _asked_to_stop.clear()


def stop_if_asked() -> None:
    """Raise Stopped where SIGTERM was received before.

    The handler raises it too, wherever Python happens to be; but that can be a place that drops exceptions: a bare
    ``except:`` in Keras's layer calls, a destructor or a callback from native code. So every loop asks again.
    """
    if _asked_to_stop.is_set():
        raise Stopped("SIGTERM was received: nothing has been published")
