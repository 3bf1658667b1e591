"""Ports of this machine at which there is no answer, of each kind that a network has."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager


@contextmanager
def refusing_port() -> Iterator[int]:
    """Yield a port of this machine that refuses connections: held meanwhile, so that nobody else listens at it."""
    with closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])


@contextmanager
def silent_port() -> Iterator[int]:
    """Yield a port of this machine that accepts connections, and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=128)) as listening:
        yield int(listening.getsockname()[1])


@contextmanager
def lost_port() -> Iterator[int]:
    """Yield a port of this machine that does not answer at all, as behind a firewall that drops packets."""
    with ExitStack() as stack:
        listening = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0), backlog=0)))
        address = listening.getsockname()
        for _ in range(3):  # one is taken in, and the queue is full: Linux drops the first packet of all others
            waiting = stack.enter_context(closing(socket.socket()))
            waiting.setblocking(False)
            waiting.connect_ex(address)
        yield int(address[1])
