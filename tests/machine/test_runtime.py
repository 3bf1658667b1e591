"""The machine: what is probed and proven on it."""

from __future__ import annotations

import pytest
import tensorflow as tf

from job.machine.limits import cpus
from job.machine.runtime import arithmetic_of, prove, start, xla_fault
from job.settings.groups import RuntimeSettings
from tests.support.refusals import refused

NO_DEVICE = "GPU:7"


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="a GPU is attached: auto asks it")
def test_on_a_cpu_auto_means_single_precision_without_xla() -> None:
    machine = start(RuntimeSettings())
    assert (machine.precision, machine.xla, machine.gpu) == ("float32", "off", False)
    assert (machine.gpu_bytes, machine.tf32) == (0, False)
    assert machine.cores == cpus()


def test_the_device_that_trains_is_proven_by_what_it_computes() -> None:
    proof = start(RuntimeSettings()).proof
    assert proof.startswith("matrix product and convolution computed in ")


def test_xla_is_proven_where_it_is_asked_for() -> None:
    machine = start(RuntimeSettings(xla="on"))
    assert machine.xla == "on"
    assert machine.proof.endswith(", compiled by XLA too")


def test_on_a_gpu_the_precision_is_a_rule_of_its_compute_capability() -> None:
    assert arithmetic_of("auto", None) == ("float32", False)
    assert arithmetic_of("mixed_bfloat16", None) == ("mixed_bfloat16", False)
    assert arithmetic_of("auto", (7, 5)) == ("float32", False)
    assert arithmetic_of("auto", (8, 0)) == arithmetic_of("float32", (9, 0)) == ("float32", True)
    assert arithmetic_of("auto", (9, 0), "0") == ("float32", False)
    assert arithmetic_of("mixed_float16", (7, 0))[0] == "mixed_float16"
    with refused("TRANSFER_PRECISION", "mixed_float16", "6.1", "7.0", "float32"):
        arithmetic_of("mixed_float16", (6, 1))


def test_a_device_that_cannot_compute_is_refused() -> None:
    with refused("CUDA_VISIBLE_DEVICES", NO_DEVICE, "[gpu]"):
        prove(NO_DEVICE)


def test_a_device_that_xla_cannot_compile_for_is_found_out() -> None:
    assert xla_fault(NO_DEVICE) is not None


def test_xla_compiles_for_a_device_that_can_compute() -> None:
    assert xla_fault("CPU:0") is None
