"""The other workers, as real listeners and processes: met, missed and watched."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from job.machine.peers import Address, Places, answering, meet
from job.settings.cluster import Cluster
from tests.support.group import start, tf_config
from tests.support.running import python
from tests.support.servers import free_port

# A lost worker ends the others within so many seconds, whatever they are doing.
LONGEST = 30
LONGEST_TO_JOIN = 100


@contextmanager
def listeners(alive: int, dead: int, silent: int) -> Iterator[tuple[list[Address], list[Address]]]:
    """Yield the addresses of those that answer, and of those that refuse (dead) or never answer (silent)."""
    with ExitStack() as opened:
        here = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(alive)]
        gone = [("127.0.0.1", free_port()) for _ in range(dead)]
        for _ in range(silent):
            listener = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            gone.append(listener.getsockname())
            # nobody takes them out of a queue that has room for one
            for _ in range(3):
                caller = opened.enter_context(socket.socket())
                caller.setblocking(False)
                caller.connect_ex(listener.getsockname())
        yield [each.getsockname() for each in here], gone


def places_of(addresses: Sequence[Address]) -> dict[Address, Places]:
    return {address: [(socket.AF_INET, address)] for address in addresses}


def test_of_64_those_that_answer_are_found_in_the_time_that_one_may_take() -> None:
    with listeners(alive=34, dead=10, silent=20) as (alive, gone):
        begin = time.monotonic()
        assert answering(places_of([*gone, *alive]), 3.0) == set(alive)
        # one after the other the silent ones alone would take 60 s
        assert time.monotonic() - begin < 30


def test_a_name_that_stands_for_several_places_answers_at_any_of_them() -> None:
    with listeners(alive=1, dead=1, silent=1) as (alive, gone):
        places = {("name", 1): [(socket.AF_INET, place) for place in [*gone, *alive]], ("none", 1): []}
        assert answering(places, 300.0) == {("name", 1)}


_WITHOUT_DESCRIPTORS = """
import os, resource, socket
from job.machine.peers import answering
with socket.create_server(("127.0.0.1", 0)) as peer:
    places = {("peer", 1): [(socket.AF_INET, peer.getsockname())]}
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")), 4096))
    try:
        answering(places, 3.0)
    except OSError as error:
        print(error.strerror)
"""


def test_what_is_wanting_on_this_side_is_not_held_against_the_others() -> None:
    assert python(_WITHOUT_DESCRIPTORS).stdout == "Too many open files\n"


_WATCHED = """
import sys
from job import stopping
from job.machine import peers
stopping.heed()
import socket, time
addresses = [("127.0.0.1", int(port)) for port in sys.argv[1:]]
watch = peers.Watch({{address: [(socket.AF_INET, address)] for address in addresses}})
try:
    watch.start()
    {waits}
except stopping.Stopped as stop:
    stopping.leave(74 if watch.lost else stop.exit_code)
"""


def test_a_lost_worker_is_found_among_64_of_which_many_are_slow() -> None:
    with listeners(alive=33, dead=1, silent=30) as (alive, gone):
        ports = [port for _, port in [*gone[1:], *alive, gone[0]]]
        done = python(_WATCHED.format(waits="time.sleep(600)"), *ports, ends=74, seconds=LONGEST + 5)
    assert "gone, so this worker ends too: " in done.stderr
    assert "and 26 more" in done.stderr


@pytest.mark.slow
def test_a_lost_worker_is_noticed_in_native_code_too() -> None:
    # a mutex that its own thread locks again is waited for in native code for ever
    lock = "ctypes.CDLL(None).pthread_mutex_lock"
    waits = f"mutex = ctypes.create_string_buffer(128); {lock}(mutex); {lock}(mutex)"
    code = "import ctypes\n" + _WATCHED.format(waits=waits)
    done = python(code, free_port(), ends=74, seconds=LONGEST + 5)
    assert "gone, so this worker ends too: 127.0.0.1:" in done.stderr
    assert "ended without saving more" in done.stderr


def cluster(index: int, ports: Sequence[int]) -> Cluster:
    return Cluster(tuple(f"127.0.0.1:{port}" for port in ports), index)


def test_all_wait_for_all() -> None:
    ports = [free_port() for _ in range(4)]
    found: dict[int, set[Address]] = {}

    def worker(index: int) -> None:
        found[index] = set(meet(cluster(index, ports)))
        # as TensorFlow does, so that those find this one that have not seen it yet
        with socket.create_server(("127.0.0.1", ports[index])):
            ended.wait()

    ended = threading.Event()
    threads = [threading.Thread(target=worker, args=[index], daemon=True) for index in range(4)]
    for thread in threads[:3]:
        thread.start()
    for thread in threads[:3]:
        thread.join(2.0)
    assert not found
    threads[3].start()
    deadline = time.monotonic() + LONGEST
    while len(found) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    ended.set()
    assert found == {index: set(cluster(index, ports).others) for index in range(4)}


def test_who_waits_answers_more_callers_than_the_queue_of_its_port_holds() -> None:
    ports = [free_port(), free_port()]
    waiting = threading.Thread(target=meet, args=[cluster(0, ports)], daemon=True)
    waiting.start()
    places = places_of([("127.0.0.1", ports[0])])
    deadline = time.monotonic() + LONGEST
    answers = 0
    while answers < 300:
        answers += len(answering(places, 10.0))
        assert time.monotonic() < deadline + LONGEST, answers
    with socket.create_server(("127.0.0.1", ports[1])):
        waiting.join(LONGEST)
    assert not waiting.is_alive()


_SHORT_SIGHT = """
import sys, threading
from job.machine import peers
from job.settings.cluster import Cluster
import socket
peers._SECONDS_BETWEEN_SIGHTS, peers._SECONDS_IN_SIGHT = 1.0, 4.0
cluster = Cluster(tuple(f"127.0.0.1:{port}" for port in sys.argv[1:]), 0)
_, second, third = map(int, sys.argv[1:])
waiting = threading.Thread(target=peers.meet, args=[cluster])
waiting.start()
with socket.create_server(("127.0.0.1", second)) as listener:
    listener.accept()
waiting.join(6.0)
with socket.create_server(("127.0.0.1", third)) as listener:
    listener.accept()
    waiting.join(6.0)
    print("waits" if waiting.is_alive() else "went on", flush=True)
    with socket.create_server(("127.0.0.1", second)):
        waiting.join()
print("met")
"""


@pytest.mark.slow
def test_a_worker_that_was_seen_and_has_gone_is_waited_for_again() -> None:
    done = python(_SHORT_SIGHT, *(free_port() for _ in range(3)), seconds=60)
    assert done.stdout == "waits\nmet\n"


# The command, where one of the job's bounds is of three seconds.
_IMPATIENT = """
from job import stopping
stopping.heed()
from job import __main__
from job.machine import {module}
{module}.{bound} = 3.0
stopping.leave(__main__.main([]))
"""


def test_workers_that_do_not_come_are_named_and_end_those_that_wait() -> None:
    ports = [free_port() for _ in range(3)]
    told = tf_config(ports, 1)
    with socket.create_server(("127.0.0.1", ports[0])):
        code = _IMPATIENT.format(module="peers", bound="_LONGEST_SECONDS")
        done = python(code, ends=74, seconds=120, TF_CONFIG=told, TRANSFER_DATASET="/nowhere")
    assert "1 of 3 workers were not there within" in done.stdout
    assert f"127.0.0.1:{ports[2]};" in done.stdout
    assert f"127.0.0.1:{ports[0]}" not in done.stdout.splitlines()[-1]


@contextmanager
def joined_by_nobody() -> Iterator[dict[str, str]]:
    """Yield the settings of a worker whose two peers are there, and answer nothing."""
    ports = [free_port() for _ in range(3)]
    with ExitStack() as opened:
        for port in ports[1:]:
            opened.enter_context(socket.create_server(("", port)))
        yield {"TF_CONFIG": tf_config(ports, 0), "TRANSFER_DATASET": "/nowhere"}


def test_a_worker_that_tensorflow_does_not_join_to_others_ends() -> None:
    with joined_by_nobody() as settings:
        code = _IMPATIENT.format(module="replicas", bound="_LONGEST_JOIN")
        done = python(code, ends=1, seconds=120, **settings)
    assert "all 3 workers are there" in done.stdout
    assert "Timeout (0:00:03)!" in done.stderr


@pytest.mark.slow
def test_a_stop_while_tensorflow_joins_the_others_is_heeded() -> None:
    with joined_by_nobody() as settings:
        worker = start(settings)
        assert worker.until("all 3 workers are there")
        time.sleep(3.0)
        worker.process.terminate()
        # not at once: TensorFlow holds Python's lock, until it gives up
        assert worker.end(LONGEST_TO_JOIN).code == 143
