"""Requests to stop, in processes of their own: they change how the whole process takes signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.kills import PID_1, with_pid_1
from tests.support.running import ROOT

# A generous bound for what is to happen at once; the grace period is 24 s, so that the two cannot be confused.
AT_ONCE = 12.0

# A mutex that its own thread locks again is waited for in native code for ever, whatever signals come, and ctypes lets
# go of Python's lock before: so it blocks as TensorFlow does. All zeros are a fresh mutex.
IN_NATIVE_CODE = """
import ctypes
mutex = ctypes.create_string_buffer(128)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
with stopping.deferred():  # a signal that comes before the call is no exception instead of it
    say("ready")
    lock(mutex)
"""

BEFORE = [pytest.param((), id="any process"), pytest.param(PID_1, id="PID 1", marks=with_pid_1)]
BEGINNING = """
import os, signal, sys, time
from job import stopping
from job.errors import Stopped
def say(word):
    os.write(1, (word + "\\n").encode())
"""


@contextmanager
def child(code: str, before: Sequence[str] = (), heeds: bool = True) -> Iterator[subprocess.Popen[str]]:
    """Run Python code that heeds signals; end it when the block is left."""
    whole = BEGINNING + ("stopping.heed()\n" if heeds else "") + code
    with subprocess.Popen(
        [*before, sys.executable, "-c", whole],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            for pid in [*children_of(process.pid), process.pid]:
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def own_pid(process: subprocess.Popen[str], before: Sequence[str]) -> int:
    """Return the process id of the Python code, which behind PID_1 thinks that it is 1."""
    if not before:
        return process.pid
    (inner,) = children_of(process.pid)
    assert re.search(r"^NSpid:.*\s1$", Path(f"/proc/{inner}/status").read_text(), re.MULTILINE)
    return inner


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def run(code: str) -> subprocess.CompletedProcess[str]:
    with child(code) as process:
        out, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, out, errors)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_the_first_signal_raises_stopped_where_python_is(number: signal.Signals) -> None:
    done = run(
        f"""
try:
    os.kill(os.getpid(), {number:d})
    time.sleep(30)
except Stopped as error:
    say(f"stopped {{error}} {{error.exit_code}} {{isinstance(error, Exception)}}")
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("stopped asked to stop")
    assert done.stdout.endswith("143 False\n")


def test_nothing_is_asked_before_a_signal_came() -> None:
    done = run("stopping.stop_if_asked()\nsay('went on')\n")
    assert done.stdout == "went on\n"


def test_an_except_that_swallows_everything_delays_the_stop_to_the_next_question() -> None:
    done = run(
        """
for attempt in range(3):
    try:
        if not attempt:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        stopping.stop_if_asked()
        say("went on")
    except:
        say("swallowed")
try:
    stopping.stop_if_asked()
except Stopped:
    say("stopped")
"""
    )
    assert done.stdout.split("\n")[:-1] == ["swallowed"] * 3 + ["stopped"], done.stderr


def test_a_destructor_that_drops_the_exception_does_not_drop_the_request() -> None:
    done = run(
        """
class Dropping:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
Dropping()
say("alive")
try:
    stopping.stop_if_asked()
except Stopped:
    say("stopped")
"""
    )
    assert done.stdout == "alive\nstopped\n", done.stderr
    assert "Stopped" in done.stderr  # Python tells of the exception that it dropped


def test_a_deferred_stop_waits_for_the_question() -> None:
    done = run(
        """
with stopping.deferred():
    with stopping.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        while not stopping._heard:
            time.sleep(0.01)
        say("inner ended")
    say("outer ended")
    try:
        stopping.stop_if_asked()
    except Stopped:
        say("stopped inside")
try:
    stopping.stop_if_asked()
except Stopped:
    say("stopped after")
"""
    )
    assert done.stdout.splitlines() == ["inner ended", "outer ended", "stopped inside", "stopped after"], done.stderr


def test_after_a_deferral_signals_raise_again() -> None:
    done = run(
        """
with stopping.deferred():
    pass
try:
    with stopping.deferred():
        raise ValueError
except ValueError:
    pass
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
except Stopped:
    say("stopped")
"""
    )
    assert done.stdout == "stopped\n", done.stderr


def test_other_signals_that_python_handles_are_no_request() -> None:
    done = run(
        """
signal.signal(signal.SIGUSR1, lambda *_: say("usr1"))
for _ in range(3):
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.05)
stopping.stop_if_asked()
with stopping.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.5)
    say("alive")
"""
    )
    assert done.stdout.splitlines() == ["usr1"] * 4 + ["alive"], done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)],
    ids=lambda number: number.name,
)
def test_a_second_signal_ends_native_code_at_once(
    first: signal.Signals, second: signal.Signals, before: Sequence[str]
) -> None:
    with child(IN_NATIVE_CODE, before) as process:
        assert said(process) == "ready"
        pid = own_pid(process, before)
        os.kill(pid, first)
        with pytest.raises(subprocess.TimeoutExpired):  # the first waits for what has begun
            process.wait(1)
        os.kill(pid, second)
        assert process.wait(AT_ONCE) == 143
        assert process.stderr is not None
        assert "asked a second time" in process.stderr.read()


def test_a_second_signal_ends_a_loop_that_swallows_the_first() -> None:
    with child(
        "words = ['ready']\nwhile True:\n    try:\n        while words:\n            say(words.pop())\n"
        "        time.sleep(60)\n    except:\n        say('no')\n"
    ) as process:
        assert said(process) == "ready"
        process.send_signal(signal.SIGTERM)
        assert said(process) == "no"
        time.sleep(0.5)  # until it sleeps again: outside the try, the exception would end it
        process.send_signal(signal.SIGTERM)
        assert process.wait(AT_ONCE) == 143


def test_a_second_signal_ends_a_deferral() -> None:
    code = "with stopping.deferred():\n    say('ready')\n    while True:\n        time.sleep(0.01)\n"
    with child(code) as process:
        assert said(process) == "ready"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # two signals that wait together are one
        process.send_signal(signal.SIGTERM)
        assert process.wait(AT_ONCE) == 143


def test_a_signal_that_interrupts_the_handler_of_another_ends_the_process() -> None:
    """A handler that waits for what the handler that it interrupts holds would wait for ever."""
    code = """
def interrupt(frame, event, argument):
    if event == "call" and frame.f_code is not stopping._stop.__code__:
        while frame := frame.f_back:
            if frame.f_code is stopping._stop.__code__:
                os.kill(os.getpid(), signal.SIGINT)
sys.setprofile(interrupt)
with stopping.deferred():
    say("ready")
    while True:
        time.sleep(0.01)
"""
    for _ in range(4):  # the thread that ends it may come first
        with child(code) as process:
            assert said(process) == "ready"
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            assert process.wait(AT_ONCE) == 143


def test_a_second_signal_ends_a_process_whose_standard_error_nobody_reads() -> None:
    code = "os.set_blocking(2, False)\ntry:\n    while True:\n        os.write(2, bytes(512))\n"
    code += "except BlockingIOError:\n    os.set_blocking(2, True)\n"
    with child(code + IN_NATIVE_CODE) as process:
        assert said(process) == "ready"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(AT_ONCE) == 143


def test_a_second_signal_ends_a_process_that_can_start_no_thread_by_threading() -> None:
    with child("import threading\nthreading._active_limbo_lock.acquire()\n" + IN_NATIVE_CODE) as process:
        assert said(process) == "ready"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(AT_ONCE) == 143


def test_what_native_code_makes_of_a_stop_is_no_bug() -> None:
    done = run(
        """
from job import __main__ as command
def work():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    except Stopped:
        raise AttributeError("seen in TensorFlow, where it imports a module to look at an argument") from None
stopping.leave(command._guarded(work))
"""
    )
    assert done.returncode == 143, done.stderr


@pytest.mark.parametrize("first", ["pass", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_a_process_that_asks_itself_twice_goes_on_with_its_stop(first: str) -> None:
    done = run(
        f"""
with stopping.deferred():
    {first}
    for _ in range(2):
        stopping.ask("tested", 30, 78)
    time.sleep(0.5)
    say("alive")
    stopping.leave(0)
"""
    )
    assert (done.stdout, done.returncode) == ("alive\n", 0), done.stderr


@pytest.mark.parametrize(
    ("first", "code"),
    [("pass", 78), ("os.kill(os.getpid(), signal.SIGTERM)\n    while not stopping._asked: time.sleep(0.01)", 143)],
    ids=["nobody", "a signal"],
)
def test_a_process_that_does_not_stop_for_itself_is_ended_with_the_code_of_who_asked_first(
    first: str, code: int
) -> None:
    done = run(
        f"""
with stopping.deferred():
    {first}
    stopping.ask("the test is over", 1, 78)
    time.sleep(60)
"""
    )
    assert (done.returncode, done.stderr) == (code, "the test is over: ended without saving more\n")


@pytest.mark.parametrize("before", BEFORE)
def test_native_code_that_outlasts_the_grace_period_is_ended(before: Sequence[str]) -> None:
    code = "stopping.GRACE_SECONDS = 2.0\nstopping.heed()\n" + IN_NATIVE_CODE
    with child(code, before, heeds=False) as process:
        assert said(process) == "ready"
        os.kill(own_pid(process, before), signal.SIGTERM)
        assert process.wait(AT_ONCE) == 143
        assert process.stderr is not None
        assert "grace period is over" in process.stderr.read()


def test_what_is_to_be_done_at_a_request_is_done_while_native_code_goes_on() -> None:
    code = "hooked = stopping.when_asked(lambda: say('saved'))\nhooked.__enter__()\n" + IN_NATIVE_CODE
    with child(code) as process:
        assert said(process) == "ready"
        process.send_signal(signal.SIGTERM)
        assert said(process) == "saved"
        process.send_signal(signal.SIGTERM)
        assert process.wait(AT_ONCE) == 143


def test_what_was_to_be_done_at_a_request_is_not_once_its_block_was_left() -> None:
    done = run(
        """
with stopping.when_asked(lambda: say("too late")):
    pass
with stopping.deferred(), stopping.when_asked(lambda: say("in time")):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
"""
    )
    assert done.stdout == "in time\n", done.stderr


def test_the_grace_period_ends_before_the_platforms_kill() -> None:
    done = run("say(str(stopping.GRACE_SECONDS))")
    assert float(done.stdout) == 25


@pytest.mark.parametrize("python", [True, False], ids=["in Python", "in native code"])
def test_a_handler_that_native_code_sets_does_not_take_the_signal(python: bool) -> None:
    # as TensorFlow does when it joins other workers
    taken = """
import ctypes
libc = ctypes.CDLL(None)
libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.signal.restype = ctypes.c_void_p
libc.signal(signal.SIGTERM, ctypes.cast(libc.labs, ctypes.c_void_p))
"""
    waiting = """
try:
    say("ready")
    time.sleep(60)
except Stopped as error:
    stopping.leave(error.exit_code)
"""
    with child(taken + (waiting if python else IN_NATIVE_CODE)) as process:
        assert said(process) == "ready"
        process.terminate()
        if not python:
            time.sleep(0.5)  # two that are pending at once are one
            process.terminate()
        assert process.wait(AT_ONCE) == 143


def test_a_request_can_end_the_process_with_another_code() -> None:
    code = "with stopping.deferred():\n    stopping.ask('a worker has gone', 1.0, 74)\n    time.sleep(60)\n"
    with child(code) as process:
        assert process.wait(AT_ONCE) == 74
        assert process.stderr is not None
        assert process.stderr.read() == "a worker has gone: ended without saving more\n"
