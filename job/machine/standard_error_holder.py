"""The process that holds what another one writes to its standard error; started and described by standard_error.py.

It is run by its path in a bare interpreter, so that it is up in 10 ms: no import of the job or of a package will do.
"""

import os
import select
import sys
import time

# Not a byte of any text.
RELEASE = b"\0"
# More than a pipe holds: one call reads all that was written before it.
_ALL = 1 << 20


def hold(line: int, seconds: float) -> None:
    """Hold what comes on standard input; write it to standard error unless ``RELEASE`` comes over ``line`` first.

    It is written out when ``seconds`` are over, when ``line`` brings the traceback of a fault or when ``line`` ends, as
    it does with the other process. What comes later is passed on as it comes, until ``line`` ends.
    """
    os.set_blocking(0, False)
    arrivals = select.poll()
    for descriptor in (0, line):
        arrivals.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + seconds
    held, holds, word = b"", True, None
    while word != b"":
        left = max(0.0, deadline - time.monotonic())
        arrived = {descriptor for descriptor, _ in arrivals.poll(1000 * left if holds else None)}
        # after the look at the line: the other process wrote its text before its word
        text = _read_all()
        if 0 in arrived and text == b"":
            arrivals.unregister(0)
        held += text or b""
        # the line is so narrow that who writes a traceback to it waits until it is read: after the held text is out
        word = os.read(line, 1 if holds else _ALL) if line in arrived else None
        if holds and word == RELEASE:
            return
        holds = holds and word is None and time.monotonic() < deadline
        if not holds:
            _write(held + (word or b"").removesuffix(RELEASE))
            held = b""


def _read_all() -> bytes | None:
    """Return what there is: None if nothing, and no bytes if nobody can write any more."""
    try:
        return os.read(0, _ALL)
    except BlockingIOError:
        return None


def _write(text: bytes) -> None:
    try:
        while text:
            text = text[os.write(2, text) :]
    except OSError:  # nobody reads it; the other process must not have to wait for that
        return


if __name__ == "__main__":
    hold(int(sys.argv[1]), float(sys.argv[2]))
