"""How much of a GPU's own memory a step takes: counted before anything is built, and tried where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import tensorflow as tf

from job.errors import ConfigError, Problem, first_line
from job.machine.limits import gigabytes

# What libraries take to work in: cuDNN tries kernels with up to a gigabyte. With it, MobileNetV2's step on 256 images
# of 160 px was counted as 9.8 GB, and held 9.8 GB on an H100.
_WORKSPACE = 10**9
# After the largest power of two that fits, the largest batch is sought in steps of an eighth of it.
_HALVINGS = 3


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of a GPU's memory.

    fixed: weights, their gradient and the optimizer's slots, and what libraries work in. per_image: of a training step,
    for each of the ``batch`` images of one device. limit: what may be used; 0 where there is no GPU. devices: that
    share a batch.
    """

    fixed: int = 0
    per_image: int = 0
    batch: int = 0
    limit: int = 0
    devices: int = 1

    @property
    def needed(self) -> int:
        """Return what is needed when most is."""
        return self.fixed + self.per_image * self.batch

    @property
    def for_rows(self) -> int:
        """Return how much rows may take that stay on the GPU: half of what no step needs."""
        return max(0, self.limit - self.needed) // 2

    def problem(self) -> Problem | None:
        """Return what to change where there is too little of it; None where there is enough, or no GPU."""
        if not self.limit or self.needed <= self.limit:
            return None
        fitting = max(0, self.limit - self.fixed) // max(1, self.per_image)
        said = (
            f"a training step of {self.batch} images on one GPU needs about {gigabytes(self.needed)} of its memory, of "
            f"which {gigabytes(self.limit)} may be used"
        )
        if fitting < 2:
            return Problem(
                "TRANSFER_IMAGE_SIZE",
                f"{said}, and one of two images does not fit. Give smaller images, a smaller network "
                "(TRANSFER_BACKBONE), TRANSFER_PRECISION=mixed_float16, or a GPU with more memory",
            )
        return Problem("TRANSFER_BATCH_SIZE", f"{said}. {_advice(fitting * self.devices)}")


def gpu_memory(
    weights: int, trained: int, slots: int, per_image: int, batch: int, limit: int, devices: int
) -> GpuMemory:
    """Return the memory that a training step takes on each GPU.

    Args:
        weights: bytes of the network's.
        trained: of them, bytes of those that train.
        slots: that the optimizer keeps of each.
        per_image: bytes that a step keeps for an image (``memory``).
        batch: images of a step, over all devices.
        limit: bytes that may be used on each; 0 without one.
        devices: GPUs of this worker.
    """
    # a flat copy, its gradient, and what an update computes in
    fixed = weights + (3 + slots) * trained + _WORKSPACE
    return GpuMemory(fixed, per_image, -(-batch // devices), limit, devices)


@contextmanager
def too_large(batch: int, largest: Callable[[], int] | None = None) -> Iterator[None]:
    """Have a step on ``batch`` images that finds no memory end as a setting that is wrong.

    largest: finds the largest batch that fits, 0 where none does.

    Raises:
        ConfigError: TensorFlow found no memory for a tensor.
    """
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        fitting = largest() if largest else 0
        advice = _advice(fitting) if fitting else f"{_advice(batch // 2)} `plan` finds the largest that fits."
        raise ConfigError.of(
            "TRANSFER_BATCH_SIZE",
            f"received {batch}, but there is no memory for a training step of so many images "
            f"({first_line(error)[:200]}). {advice}",
        ) from error


def largest_batch(fits: Callable[[int], bool], batch: int) -> int:
    """Return the largest batch below ``batch`` of which ``fits`` is true, to an eighth of it; 0 where none is."""
    found = batch // 2
    while found and not fits(found):
        found //= 2
    step = found
    for _ in range(_HALVINGS):
        step //= 2
        if step and found + step < batch and fits(found + step):
            found += step
    return found


def _advice(batch: int) -> str:
    return f"Give at most {batch}, a smaller TRANSFER_IMAGE_SIZE, TRANSFER_PRECISION=mixed_float16, or more memory."
