"""Requests to stop (SIGTERM, SIGINT), heeded from the first line of the process to its last.

Nothing is imported here that takes time: a signal can come while TensorFlow is being imported.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final, NoReturn

from job.errors import Stopped

# Kubernetes and Vertex AI give 30 s between SIGTERM and SIGKILL.
GRACE_SECONDS: Final = 25.0
# Kept for the way out: the process has ended when the grace period has.
_MARGIN_SECONDS = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# By the first the main thread learns of a request, and leaves a call of the system; by the second the process asks
# itself, which is no second request to one from outside. Nothing else is known to use them.
_TO_MAIN = signal.SIGRTMIN + 9
_FROM_WITHIN = signal.SIGRTMIN + 10
_SECONDS_TO_HEAR = 0.25

# Not an Event: a second signal's handler would wait for the lock that the first one's holds while it sets it.
_asked = False
_heard = False  # by the main thread
_code = Stopped.exit_code
_deferrals = 0
_hooks: list[Callable[[], None]] = []


def heed() -> None:
    """Turn the first SIGTERM or SIGINT into Stopped; call once, in the main thread, before any other is started.

    Whatever the process does then, it ends with exit code 143 within the grace period; a second signal ends it at
    once. Both are the work of a thread: Python runs a signal's handler between two of its own instructions, and native
    code can take minutes. Nor can this be left to the kernel's default action, which spares a process with PID 1.

    That thread takes the signals, which are blocked in all others, and no handler of theirs runs: TensorFlow sets one
    for SIGTERM when it joins other workers, which does not end. Processes that are started inherit the block.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (*_SIGNALS, _FROM_WITHIN))
    for number in (*_SIGNALS, _TO_MAIN):
        signal.signal(number, _stop)
    threading.Thread(target=_watch, name="signals", daemon=True).start()


def _stop(_number: int, _frame: FrameType | None) -> None:
    global _asked, _heard
    _asked = _heard = True
    if not _deferrals:
        stop_if_asked()


def _watch() -> None:
    global _asked
    signal.sigwait((*_SIGNALS, _FROM_WITHIN))
    _asked = True
    _end_after(GRACE_SECONDS - _MARGIN_SECONDS, "the grace period is over")
    for hook in tuple(_hooks):
        _thread.start_new_thread(hook, ())
    second = None
    while second is None:
        # again and again: a signal that comes just before a call of the system does not end it
        if not _heard:
            signal.pthread_kill(threading.main_thread().ident or 0, _TO_MAIN)
        second = signal.sigtimedwait(_SIGNALS, _SECONDS_TO_HEAR)
    _end("asked a second time")


def ask(why: str, seconds: float, code: int = Stopped.exit_code) -> None:
    """Ask this process to stop, from any of its threads, and have it ended after ``seconds`` at the latest.

    Where it has been asked before, that stop goes on: this is no second signal.

    Args:
        why: is written where the process has to be ended.
        seconds: that it has to end by itself.
        code: the exit code where it has to be ended.
    """
    global _code
    _end_after(seconds, why)
    if not _asked:
        _code = code
        os.kill(os.getpid(), _FROM_WITHIN)


def _end_after(seconds: float, why: str) -> None:
    def wait() -> None:
        time.sleep(seconds)
        _end(why)

    # not threading.Thread: it waits for a lock, which an exception from the handler may have left held
    _thread.start_new_thread(wait, ())


def _end(why: str) -> None:
    # no lock is taken on this way, not even that of the log: whoever holds it may be what does not end
    with contextlib.suppress(OSError, ValueError):
        # nor is anything waited for: a full pipe that nobody reads takes nothing more
        if select.select([], [2], [], 0)[1]:
            os.write(2, f"{why}: ended without saving more\n".encode())
    os._exit(_code)


def leave(code: int) -> NoReturn:
    """End the process with ``code``, whatever is asked of it meanwhile.

    While the interpreter takes itself down, which takes TensorFlow a while, it gives signals back to the system: a
    SIGTERM then ended a job that had published as if it had been killed.
    """
    global _deferrals
    _deferrals += 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
            stream.flush()
    os._exit(code)


def stop_if_asked() -> None:
    """Raise Stopped where a request has come.

    The handler raises it too, wherever Python happens to be; but that can be a place that drops exceptions: a bare
    ``except:`` in Keras's layer calls, a destructor or a callback from native code. So every loop asks again.
    """
    if _asked:
        stop()


def asked_to_stop() -> bool:
    """Return whether a request has come."""
    return _asked


def stop() -> NoReturn:
    """Raise Stopped, since this process was asked to stop, or another that cannot go on without this one."""
    raise Stopped("asked to stop: run it again with the same settings, and it goes on")


@contextlib.contextmanager
def when_asked(hook: Callable[[], None]) -> Iterator[None]:
    """Call ``hook`` in a thread of its own as soon as a request comes, as long as the block runs.

    It may be all that is done within the grace period, where the main thread is in native code.
    """
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.remove(hook)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Raise Stopped only where :func:`stop_if_asked` is called, as long as the block runs.

    For code whose state is whole at some places only: the steps of training.
    """
    global _deferrals
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
