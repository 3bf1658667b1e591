"""The machine: devices, precision, XLA, determinism and seeds."""

from __future__ import annotations

import logging
import os
import platform
import signal
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import keras
import numpy as np
import tensorflow as tf

from job.errors import Stopped
from job.settings import RuntimeSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """What was decided about the machine.

    devices: a readable name each. precision: float32, mixed_float16 or mixed_bfloat16. xla: whether steps are
    compiled by XLA. deterministic: whether every op repeats bit for bit.
    """

    devices: tuple[str, ...]
    precision: str
    xla: bool
    deterministic: bool


def start(settings: RuntimeSettings) -> Runtime:
    """Claim the device and set precision and determinism for the whole process.

    auto means float32 without XLA: on CPU XLA was 11 times slower for MobileNetV2's forward pass and 6 times for
    training, and bfloat16 gained nothing.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if len(gpus) > 1:
        logger.warning("%d GPUs are attached; this version trains on the first", len(gpus))
        tf.config.set_visible_devices(gpus[:1], "GPU")
    precision = "float32" if settings.precision == "auto" else settings.precision
    keras.config.set_dtype_policy(precision)
    if settings.deterministic:
        tf.config.experimental.enable_op_determinism()
    return Runtime(_device_names(gpus[:1]), precision, settings.xla == "on", settings.deterministic)


def _device_names(gpus: list[tf.config.PhysicalDevice]) -> tuple[str, ...]:
    if not gpus:
        return (f"CPU ({platform.machine()}, {len(os.sched_getaffinity(0))} cores)",)
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    return tuple(f"GPU ({detail.get('device_name', 'unknown')})" for detail in details)


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
