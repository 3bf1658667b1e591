"""Standard error, held back while TensorFlow is loaded, and shown where that fails, ends the process or hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from job import stopping
from job.machine import standard_error_holder

# Longer than TensorFlow takes to be loaded and to find a GPU.
_LONGEST_SECONDS = 30.0


@contextmanager
def held_back(seconds: float = _LONGEST_SECONDS) -> Iterator[None]:
    """Hold back what the block writes to file descriptor 2, and drop it if the block ends well within ``seconds``.

    TensorFlow's native code prints notices there while it is loaded and when it first looks for devices, some of them
    before any setting of its own could silence them: ten lines about instructions and drivers around our first line.
    But there, too, it says why it ends the process, or what it waits for. So another process holds the text, and passes
    on all of it if the block raises, if this process ends in it in whatever way, and when ``seconds`` are over.

    A process with PID 1 takes all others of its container with it. By a fault of its own (SIGABRT, SIGSEGV, SIGILL,
    SIGBUS, SIGFPE) it does not end before its text is out; where it is killed or native code calls exit, it may.

    Nothing is held back where no process or descriptor is to be had. A process that the block started and left behind
    must not write to its standard error any more, which nobody reads then.
    """
    holder = None
    # without standard error, descriptor 2 is something else
    if sys.stderr is not None:
        # a signal that is raised in here would leave half of it behind
        with stopping.deferred(), suppress(OSError):
            holder = _Holder(seconds)
    if holder is None:
        yield
        return
    try:
        stopping.stop_if_asked()
        yield
    except BaseException:
        holder.end(release=False)
        raise
    holder.end(release=True)


class _Holder:
    """The process that reads what is written to descriptor 2 from now on.

    Raises:
        OSError: there is no standard error, or no process or descriptor is to be had.
    """

    def __init__(self, seconds: float) -> None:
        with ExitStack() as kept, ExitStack() as passed_on:
            _flush()
            self._standard_error = os.dup(2)
            kept.callback(os.close, self._standard_error)
            reading, writing = os.pipe()
            for descriptor in (reading, writing):
                passed_on.callback(os.close, descriptor)
            self._line, its_end = socket.socketpair()
            kept.callback(self._line.close)
            passed_on.callback(its_end.close)
            # the smallest that there is: a traceback does not fit it, so its writer waits for the reader
            self._line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            self._process = _started(reading, its_end.fileno(), seconds)
            os.dup2(writing, 2)
            # what Python would print on a fatal signal; whoever asked for that already has it on standard error
            self._tells_faults = not faulthandler.is_enabled()
            if self._tells_faults:
                faulthandler.enable(self._line.fileno())
            self._opened = kept.pop_all()

    def end(self, *, release: bool) -> None:
        """Give descriptor 2 back; drop what is held if ``release``, else wait until it is written."""
        with stopping.deferred():
            if self._tells_faults:
                faulthandler.disable()
            _flush()
            os.dup2(self._standard_error, 2)
            if release:
                with suppress(OSError):  # somebody has killed it
                    self._line.send(standard_error_holder.RELEASE)
            self._opened.close()
            self._process.wait()


def _started(reading: int, line: int, seconds: float) -> subprocess.Popen[bytes]:
    """Start the process, which no signal to a whole group or container may end before this one.

    It gets its mask of signals from this thread. It is not forked only: this process has threads.
    """
    command = [sys.executable, "-I", "-S", standard_error_holder.__file__, str(line), str(seconds)]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        return subprocess.Popen(command, stdin=reading, stdout=subprocess.DEVNULL, pass_fds=[line])  # noqa: S603
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _flush() -> None:
    with suppress(OSError, ValueError):  # whoever read it has gone
        sys.stderr.flush()
