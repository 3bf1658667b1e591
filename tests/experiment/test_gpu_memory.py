"""What a GPU's memory must hold is counted, and a step that finds no memory ends as a setting that is wrong."""

from __future__ import annotations

import pytest
import tensorflow as tf

from job.experiment.gpu_memory import GpuMemory, gpu_memory, largest_batch, too_large
from job.experiment.memory import SLOTS, memory_needed
from job.experiment.network import outline
from job.settings.environment import load
from job.training.stages import phases_of
from tests.support.refusals import refused
from tests.support.running import python


def counted(backbone: str, size: int, batch: int, limit: int, devices: int = 1) -> GpuMemory:
    settings = load(
        {
            "TRANSFER_BACKBONE": backbone,
            "TRANSFER_IMAGE_SIZE": str(size),
            "TRANSFER_ARMS": "scratch",
            "TRANSFER_BATCH_SIZE": str(batch),
        }
    )
    network, first = outline(settings)
    phases = phases_of(settings.training)
    weights = 4 * network.count_params()
    per_image = memory_needed(network, first, phases, "adam", batch, 0, 0).per_image
    return gpu_memory(weights, weights, SLOTS["adam"], per_image, batch, limit, devices)


def test_the_count_is_what_an_h100_held() -> None:
    # tf.config.experimental.get_memory_info, peak of a float32 step without XLA: 9.82 GB
    assert counted("MobileNetV2", 160, 256, 0).needed == pytest.approx(9.82e9, rel=0.05)


def test_a_batch_that_cannot_fit_is_answered_with_one_that_does() -> None:
    found = counted("ResNet152", 512, 4096, limit=80 * 10**9).problem()
    assert found is not None
    assert found.variable == "TRANSFER_BATCH_SIZE"
    assert "needs about 3,847.8 GB of its memory, of which 80.0 GB may be used" in found.message
    largest = int(found.message.partition("Give at most ")[2].partition(",")[0])
    assert 50 < largest < 100
    assert counted("ResNet152", 512, largest, limit=80 * 10**9).problem() is None
    assert counted("ResNet152", 512, largest + 1, limit=80 * 10**9).problem() is not None
    # two devices share a batch
    assert counted("ResNet152", 512, 2 * largest, limit=80 * 10**9, devices=2).problem() is None


def test_a_network_that_fits_at_no_batch_is_told_so() -> None:
    found = counted("ResNet152", 512, 32, limit=2 * 10**9).problem()
    assert found is not None
    assert found.variable == "TRANSFER_IMAGE_SIZE"


def test_without_a_gpu_nothing_is_to_be_counted() -> None:
    assert GpuMemory().problem() is None


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, 1), (2, 2), (3, 3), (7, 7), (100, 96), (129, 128), (500, 480), (959, 896), (1023, 960)]
)
def test_the_largest_batch_that_fits_is_found_to_an_eighth(limit: int, expected: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    assert largest_batch(fits, 1024) == expected
    assert len(tried) <= 13
    assert largest_batch(lambda _: False, 1024) == 0


def test_no_memory_for_a_step_is_the_batchs_fault() -> None:
    exhausted = tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[8192,...]")
    with refused("TRANSFER_BATCH_SIZE", "8192", "Give at most 1536"), too_large(8192, lambda: 1536):
        raise exhausted
    with refused("TRANSFER_BATCH_SIZE", "8192", "Give at most 4096", "`plan` finds"), too_large(8192):
        raise exhausted


# TensorFlow waits ten seconds for memory before it gives up
@pytest.mark.slow
def test_a_step_that_really_finds_no_memory_is_answered_with_the_largest_batch() -> None:
    told = python(
        """
        import resource
        import numpy as np
        import tensorflow as tf
        from job.errors import ConfigError
        from job.experiment.gpu_memory import largest_batch, too_large

        @tf.function(input_signature=[tf.TensorSpec([], tf.int32)])
        def step(batch):
            return tf.reduce_sum(tf.ones([batch, 1024, 1024]) * 2.0)

        def fits(batch):
            try:
                step(batch)
            except tf.errors.ResourceExhaustedError:
                return False
            return True

        assert fits(1)
        taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 500 * 2**20,) * 2)
        try:
            with too_large(160, lambda: largest_batch(fits, 160)):
                step(160)
        except ConfigError as error:
            print(error)
        """
    ).stdout
    assert "TRANSFER_BATCH_SIZE" in told
    largest = int(told.partition("Give at most ")[2].partition(",")[0])
    # 4 MB an image
    assert 40 <= largest < 160
