"""Standard error held back, in processes of their own: they end in every way that a process can."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from tests.support.kills import PID_1, with_pid_1
from tests.support.running import ROOT

BEGINNING = """
import ctypes, faulthandler, os, resource, signal, subprocess, sys, time
from job import stopping
from job.errors import Stopped
from job.machine.standard_error import held_back
# a shell's background jobs ignore these, and so would what they start
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
def notices():
    os.write(2, b"native notice\\n")
    print("python notice", file=sys.stderr)
    subprocess.run([sys.executable, "-c", "import os; os.write(2, b'child notice\\\\n')"], check=True)
def say(word):
    os.write(1, (word + "\\n").encode())
def kill(number):
    os.kill(os.getpid(), number)
    time.sleep(60)
def children():
    return [int(child) for child in open(f"/proc/self/task/{os.getpid()}/children").read().split()]
"""
HELD = "native notice\npython notice\nchild notice\n"
# Far more than anything here takes: whoever waits longer waits for something that will not come.
LONGEST = 60.0
FAULTS = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)


@contextmanager
def started(code: str, before: Sequence[str] = (), **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code in a process group of its own, with pipes to it and from it; end it when the block is left."""
    with subprocess.Popen(
        [*before, sys.executable, "-c", BEGINNING + code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Return how it ended, and what it wrote until nobody was left who could write: so nothing outlives it."""
    out, errors = process.communicate(timeout=LONGEST)
    return subprocess.CompletedProcess([], process.returncode, out, errors)


def run(code: str, before: Sequence[str] = (), **variables: str) -> subprocess.CompletedProcess[str]:
    with started(code, before, **variables) as process:
        return ended(process)


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_what_is_written_in_a_good_block_is_not_seen() -> None:
    done = run(
        """
os.write(2, b"before ")
with held_back():
    notices()
    print("a line without its end", end="", file=sys.stderr)
    print("result")
os.write(2, b"after ")
print("end", end="", file=sys.stderr)
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "result\n", "before after end")


# --- the block raises --------------------------------------------------------------------------------------------


def test_it_is_shown_when_the_block_fails_before_the_traceback() -> None:
    done = run("with held_back():\n    notices()\n    raise ValueError('wrong')")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{HELD}Traceback (most recent call last):\n")
    assert done.stderr.endswith("\nValueError: wrong\n")


def test_it_is_shown_when_the_block_exits() -> None:
    done = run("with held_back():\n    notices()\n    sys.exit(3)")
    assert (done.returncode, done.stderr) == (3, HELD)


def test_more_than_a_pipe_holds_is_shown_whole() -> None:
    done = run("with held_back():\n    os.write(2, b'x' * 300_000)\n    sys.exit(3)")
    assert (done.returncode, done.stderr) == (3, "x" * 300_000)


# --- the process ends in the block -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [*FAULTS, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda it: it.name)
def test_it_is_shown_when_a_signal_ends_the_process(number: signal.Signals) -> None:
    done = run(f"with held_back():\n    notices()\n    kill({number:d})")
    assert done.returncode == -number
    assert done.stderr.startswith(HELD)
    # where it happened, too
    assert ("Fatal Python error" in done.stderr) == (number in FAULTS)
    assert ("in kill\n" in done.stderr) == (number in FAULTS)


@pytest.mark.parametrize("end", ["os.abort()", "ctypes.string_at(0)"])
@pytest.mark.parametrize("before", [(), pytest.param(PID_1, marks=with_pid_1)], ids=["any process", "PID 1"])
def test_it_is_shown_when_native_code_ends_the_process(end: str, before: Sequence[str]) -> None:
    done = run(f"with held_back():\n    notices()\n    {end}", before)
    assert done.returncode != 0
    assert done.stderr.startswith(f"{HELD}Fatal Python error: ")


def test_it_is_shown_when_native_code_exits() -> None:
    done = run("with held_back():\n    notices()\n    os._exit(7)")
    assert (done.returncode, done.stderr) == (7, HELD)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda it: it.name)
def test_a_signal_to_the_whole_group_loses_nothing(number: signal.Signals) -> None:
    with started("with held_back():\n    notices()\n    say('ready')\n    time.sleep(60)") as process:
        assert heard(process) == "ready"
        os.killpg(process.pid, number)
        done = ended(process)
    assert done.returncode == -number
    assert done.stderr.startswith(HELD)


def test_what_python_prints_of_a_fault_stays_as_it_was_set() -> None:
    code = """
with held_back():
    pass
say(str(faulthandler.is_enabled()))
with held_back():
    notices()
    os.abort()
"""
    assert run(code).stdout == "False\n"
    already = run(code, PYTHONFAULTHANDLER="1")
    assert (already.returncode, already.stdout) == (-6, "True\n")
    assert already.stderr.startswith(f"{HELD}Fatal Python error: Aborted\n")


# --- the process is asked to stop in the block -------------------------------------------------------------------


def test_a_request_to_stop_ends_the_block_and_shows_it() -> None:
    code = """
stopping.heed()
try:
    with held_back():
        notices()
        kill(signal.SIGTERM)
except Stopped as stop:
    stopping.leave(stop.exit_code)
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (143, HELD)


def test_a_request_that_came_before_the_block_is_heeded_in_it() -> None:
    code = """
stopping.heed()
with stopping.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    while not stopping._heard:
        time.sleep(0.01)
try:
    with held_back():
        say("never")
except Stopped as stop:
    stopping.leave(stop.exit_code)
"""
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


def test_the_second_request_ends_a_block_that_hangs_and_shows_it() -> None:
    code = """
stopping.heed()
with held_back(), stopping.deferred():
    notices()
    say("ready")
    time.sleep(60)
"""
    with started(code) as process:
        assert heard(process) == "ready"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        done = ended(process)
    assert (done.returncode, done.stderr) == (143, f"{HELD}asked a second time: ended without saving more\n")


# --- the block lasts long ----------------------------------------------------------------------------------------


def test_it_is_shown_when_the_time_is_over_and_all_that_follows_as_it_comes() -> None:
    code = """
with held_back(0.2):
    notices()
    input()
    os.write(2, b"later")
    input()
    os.write(2, b"last")
os.write(2, b" end")
"""
    with started(code) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        for text in (HELD, "later"):  # the block goes on only when it was read
            assert process.stderr.read(len(text)) == text
            process.stdin.write("\n")
            process.stdin.flush()
        done = ended(process)
    assert (done.returncode, done.stderr) == (0, "last end")


def test_what_follows_is_not_lost_either_when_a_signal_ends_the_process() -> None:
    with started("with held_back(0):\n    notices()\n    input()\n    os.write(2, b'later')\n    kill(9)") as process:
        assert process.stderr is not None
        assert process.stderr.read(len(HELD)) == HELD
        done = subprocess.CompletedProcess([], 0, *process.communicate("\n", timeout=LONGEST))
    assert (process.returncode, done.stderr) == (-9, "later")


# --- what it needs, and what it leaves ---------------------------------------------------------------------------


def test_nothing_stays_behind_the_block() -> None:
    code = """
def left():
    return sorted(os.listdir("/dev/fd")), children(), signal.pthread_sigmask(signal.SIG_BLOCK, [])
before = left()
for fails in (False, True):
    try:
        with held_back():
            assert len(children()) == 1
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert left() == before, (before, left())
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_holder_has_no_descriptor_of_the_jobs() -> None:
    code = """
ours = os.dup2(os.open("/", os.O_RDONLY), 50, inheritable=True)
standard_error = os.readlink("/proc/self/fd/2")
with held_back():
    has = f"/proc/{children()[0]}/fd"
    assert os.readlink(f"{has}/1") == "/dev/null"
    assert os.readlink(f"{has}/2") == standard_error
    assert not os.path.exists(f"{has}/{ours}")
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_holder_that_is_killed_ends_nothing() -> None:
    done = run("with held_back():\n    notices()\n    os.kill(children()[0], 9)\nos.write(2, b'after')")
    assert (done.returncode, done.stderr) == (0, "after")


def test_where_no_process_is_to_be_had_it_is_shown() -> None:
    code = """
if os.getuid() == 0:  # root may have as many as it likes
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
before = os.listdir("/dev/fd")
with held_back():
    os.write(2, b"notice")
assert os.listdir("/dev/fd") == before
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "notice")


def test_where_no_descriptor_is_to_be_had_it_is_shown() -> None:
    code = """
before = os.listdir("/dev/fd")
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for free in range(6):
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) - 1 + free, hard))  # one of them was for the look itself
    with held_back():
        os.write(2, b"notice ")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.listdir("/dev/fd") == before
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "notice " * 6)


def test_a_process_without_standard_error_keeps_what_it_has_in_its_place() -> None:
    code = """
os.pipe()
before = os.fstat(2)
with held_back():
    assert sys.stderr is None
    assert os.path.samestat(os.fstat(2), before)
say("went on")
"""
    done = run(code, ("sh", "-c", 'exec "$@" 2>&-', "sh"))
    assert (done.returncode, done.stdout) == (0, "went on\n")
