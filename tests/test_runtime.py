"""The machine: here, being asked to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from job.errors import Stopped
from job.runtime import heed_sigterm, stop_if_asked


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
