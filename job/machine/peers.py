"""The other workers: waited for before TensorFlow is asked to join them, and watched from then on."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from job import stopping
from job.errors import ConfigError, UnavailableError
from job.settings.cluster import Cluster

logger = logging.getLogger(__name__)

# A lost worker has to end the others within 30 s: it is missed for at most twice _SECONDS_BETWEEN_LOOKS and
# _SECONDS_TO_ANSWER each, and _SECONDS_TO_END are left to save what is held.
_SECONDS_BETWEEN_LOOKS = 4.0
_SECONDS_TO_ANSWER = 3.0
_LOOKS = 2
_SECONDS_TO_END = 10.0
# Until all workers have met: nodes are made and images pulled meanwhile, but who waits may have a GPU that is paid for.
_LONGEST_SECONDS = 1800.0
_SECONDS_BETWEEN_TRIES = 1.0
_SECONDS_BETWEEN_LINES = 60.0
# Who was seen is looked for again, and missed after a time in which any server starts: when a worker has seen all, its
# port is closed until TensorFlow listens there, and it must not be missed by those that have not seen all yet.
_SECONDS_BETWEEN_SIGHTS = 20.0
_SECONDS_IN_SIGHT = 60.0
_NAMED = 5  # of many workers, this many are named in a message
# What a connection fails for that is wanting on this side.
_OUR_OWN = (errno.EAGAIN, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)

Address = tuple[str, int]
# What a name stands for: family and socket address, as the socket module has them.
Places = Sequence[tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]]]


def meet(cluster: Cluster) -> dict[Address, Places]:
    """Wait until all other workers are there; return where each of them was found.

    TensorFlow would wait too, but without a word, and in native code, where a request to stop goes unheard.

    Raises:
        ConfigError: this worker's port cannot be used.
        UnavailableError: some are not there after half an hour.
        Stopped: the process was asked to stop.
    """
    told = {"worker": cluster.index, "workers": len(cluster.addresses)}
    logger.info("this is worker %d of %d", cluster.index, len(cluster.addresses), extra=told)
    with _listener(cluster) as listener:
        search = _Search(cluster.others, listener)
        try:
            begin, line = time.monotonic(), 0.0
            while not search.ended(_SECONDS_BETWEEN_TRIES):
                stopping.stop_if_asked()
                waited, missing = time.monotonic() - begin, search.missing()
                if waited > _LONGEST_SECONDS:
                    raise UnavailableError(
                        f"{len(missing)} of {len(cluster.addresses)} workers were not there within "
                        f"{_LONGEST_SECONDS / 60:.0f} minutes: {_named(missing)}; look why they do not start, or "
                        "whether workers may connect to each other at the addresses of TF_CONFIG, and start all again"
                    )
                if waited >= line:
                    line += _SECONDS_BETWEEN_LINES
                    logger.info(
                        "waiting for %d of %d other workers: %s",
                        len(missing),
                        len(cluster.others),
                        _named(missing),
                        extra=told,
                    )
        finally:
            search.end()
    logger.info("all %d workers are there", len(cluster.addresses), extra=told)
    return search.found


def _listener(cluster: Cluster) -> socket.socket:
    _, port = cluster.own
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        raise ConfigError.of(
            "TF_CONFIG",
            f"port {port} of this worker cannot be used: {error.strerror}; end what uses it, or give another",
        ) from error
    listener.setblocking(False)
    return listener


class _Search:
    """A thread that looks for others until all are in sight; found then tells where.

    It is not the main thread's work: a name server can take half a minute, in which no signal is handled.
    """

    def __init__(self, others: Sequence[Address], listener: socket.socket) -> None:
        self.found: dict[Address, Places] = {}
        self._others = others
        self._listener = listener
        self._seen: dict[Address, float] = {}
        self._all = threading.Event()
        self._over = threading.Event()
        threading.Thread(target=self._look, name="search", daemon=True).start()

    def ended(self, seconds: float) -> bool:
        """Wait for at most ``seconds``; return whether all are in sight."""
        return self._all.wait(seconds)

    def missing(self) -> list[Address]:
        """Return those that are not in sight."""
        return [peer for peer in self._others if self._unseen(peer) >= _SECONDS_IN_SIGHT]

    def end(self) -> None:
        self._over.set()

    def _unseen(self, peer: Address) -> float:
        return time.monotonic() - self._seen.get(peer, -math.inf)

    def _look(self) -> None:
        while not self._over.is_set():
            wanted = [peer for peer in self._others if self._unseen(peer) >= _SECONDS_BETWEEN_SIGHTS]
            places = {peer: _places(peer) for peer in wanted}
            with contextlib.suppress(OSError):  # something is wanting on this side: nobody was seen
                for peer in answering(places, _SECONDS_TO_ANSWER):
                    self._seen[peer] = time.monotonic()
                    self.found[peer] = places[peer]
            if not self.missing():
                self._all.set()
                return
            self._hang_up()
            self._over.wait(_SECONDS_BETWEEN_TRIES)

    def _hang_up(self) -> None:
        """Take the connections by which others saw this worker out of the queue, which has room for 128."""
        with contextlib.suppress(OSError):
            while True:
                self._listener.accept()[0].close()


class Watch:
    """Asks the process to stop once a peer is no longer there, however little is exchanged with it.

    TensorFlow notices within 10 s, but tells only whoever waits for the lost worker. Decoding or publishing can take
    minutes.

    lost: whether that has happened.
    """

    def __init__(self, places: Mapping[Address, Places]) -> None:
        """Take the peers, and where each was found."""
        self.lost = False
        self._places = places
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="peers", daemon=True)

    def start(self) -> None:
        """Begin; to be called once."""
        self._thread.start()

    def end(self) -> None:
        """Let peers go from now on."""
        self._over.set()

    def _look(self) -> None:
        missed = dict.fromkeys(self._places, 0)
        while not self._over.wait(_SECONDS_BETWEEN_LOOKS):
            try:
                here = answering(self._places, _SECONDS_TO_ANSWER)
            except OSError:  # something is wanting on this side: nobody was missed
                continue
            missed = {peer: 0 if peer in here else missed[peer] + 1 for peer in missed}
            gone = [peer for peer, looks in missed.items() if looks >= _LOOKS]
            # who is asked to stop leaves the others in any order
            if self._over.is_set() or stopping.asked_to_stop():
                return
            if gone:
                logger.error("gone, so this worker ends too: %s", _named(gone))
                self.lost = True
                stopping.ask("a worker has gone", _SECONDS_TO_END, UnavailableError.exit_code)
                return


def answering(places: Mapping[Address, Places], seconds: float) -> set[Address]:
    """Return those to which a connection is made within ``seconds``; many that are dead take no longer than one.

    It is closed at once, which gRPC servers do not mind.

    Raises:
        OSError: there is no descriptor or no port left on this side, which says nothing of the others.
    """
    found = set()
    with contextlib.ExitStack() as opened, selectors.DefaultSelector() as waiting:
        for peer, candidates in places.items():
            for family, place in candidates:
                try:
                    connection = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
                except OSError as error:
                    if error.errno == errno.EAFNOSUPPORT:  # a machine without IPv6
                        continue
                    raise
                connection.setblocking(False)
                code = connection.connect_ex(place)
                if code in _OUR_OWN:
                    raise OSError(code, os.strerror(code))
                if code == errno.EINPROGRESS:
                    waiting.register(connection, selectors.EVENT_WRITE, (peer, connection))
                elif code == 0:
                    found.add(peer)
        deadline = time.monotonic() + seconds
        while any(key.data[0] not in found for key in waiting.get_map().values()):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for key, _ in waiting.select(left):
                peer, connection = key.data
                waiting.unregister(connection)
                if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    found.add(peer)
    return found


def _places(address: Address) -> Places:
    """Return what a name stands for; nothing where it is not known, as that of a machine that is not there yet."""
    with contextlib.suppress(OSError, UnicodeError):
        return [(family, place) for family, *_, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM)]
    return []


def _named(peers: Iterable[Address]) -> str:
    named = [f"{host}:{port}" for host, port in peers]
    return ", ".join(named[:_NAMED]) + (f" and {len(named) - _NAMED} more" if len(named) > _NAMED else "")
