"""The machine: what is probed on it, and being asked to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest
import tensorflow as tf

from job.errors import Stopped
from job.runtime import half_precision_gain, heed_sigterm, start, stop_if_asked, xla_compiles
from job.settings import RuntimeSettings


def _terminate_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def test_sigterm_raises_where_python_happens_to_be() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), heed_sigterm():
        _terminate_this_process()


def _drop_everything() -> None:
    # as a bare "except:" in Keras's layer calls does, during tracing
    with contextlib.suppress(BaseException):
        _terminate_this_process()
    stop_if_asked()


def test_sigterm_is_not_forgotten_where_its_exception_is_dropped() -> None:
    with pytest.raises(Stopped), heed_sigterm():
        _drop_everything()


def test_after_the_block_the_signal_is_forgotten() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), heed_sigterm():
        _terminate_this_process()
    stop_if_asked()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="a GPU is attached: auto asks it")
def test_on_a_cpu_auto_means_single_precision_without_xla() -> None:
    machine = start(RuntimeSettings())
    assert (machine.precision, machine.xla, machine.gpu) == ("float32", False, False)
    assert machine.cores == len(os.sched_getaffinity(0))


def test_the_probes_that_a_gpu_is_put_to_run_on_any_device() -> None:
    assert xla_compiles("CPU:0") is True
    assert half_precision_gain("CPU:0") > 0
