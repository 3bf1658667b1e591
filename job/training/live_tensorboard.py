"""What TensorBoard is shown while a run trains, below AIP_TENSORBOARD_LOG_DIR."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from job.errors import JobError
from job.manifest import Epoch, Result
from job.results import event_files
from job.settings.environment import hyperparameters
from job.storage.local import LocalStore
from job.storage.store import Store

logger = logging.getLogger(__name__)

Hparams = dict[str, bool | int | float | str]


class Told(Protocol):
    """What is called with a result's history so far, and with its record when it is finished."""

    def __call__(self, history: Sequence[Epoch], record: Result | None = None, /) -> None:
        """Show it."""


def hparams(settings: Mapping[str, Any], arm: str, fraction: float, seed: int) -> Hparams:
    """Return what TensorBoard's table shows of one result, from the resolved ``settings``."""
    found: Hparams = {"arm": arm, "train_fraction": fraction, "seed": seed}
    for name in hyperparameters():
        value = settings[name]
        if value is not None:
            found[name] = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
    return found


class Board:
    """The event files of a run's results, stored anew while they grow: object storage cannot append.

    A file is a function of the whole history, so a resumed run replaces what it had written, and nothing is told twice.
    """

    def __init__(
        self, store: Store | None, settings: Mapping[str, Any], folder: Path, seconds_between: float = 10.0
    ) -> None:
        """Take the run's place there, None where nobody watches; the resolved settings; and local scratch space.

        seconds_between: how often epochs are told at most. A head's take milliseconds, and TensorBoard's page is drawn
        anew every 30 seconds.
        """
        self._store = store
        self._settings = settings
        self._folder = folder / "tensorboard"
        self._seconds_between = seconds_between
        self._told = -math.inf  # monotonic clocks may have begun a minute ago
        self._pool: ThreadPoolExecutor | None = None
        self._future: Future[None] | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Store in a thread of its own meanwhile: training does not wait for storage."""
        with ThreadPoolExecutor(1, thread_name_prefix="tensorboard") as self._pool:
            yield

    def result(self, where: str, arm: str, fraction: float, seed: int) -> Told:
        """Return what to tell of one result: its history so far, and its record when it is finished.

        where: its place in the run's folder, ``arms/{arm}/...``.
        """
        chosen, started = hparams(self._settings, arm, fraction, seed), time.time()
        place = PurePosixPath(where).relative_to("arms")

        def tell(history: Sequence[Epoch], record: Result | None = None) -> None:
            if self._store is None or self._pool is None:
                return
            busy = self._future is not None and not self._future.done()
            if record is None and (busy or time.monotonic() - self._told < self._seconds_between):
                return
            self._told = time.monotonic()
            # in place where that can be: TensorBoard reads on in the file that it has open, and sees none in its stead
            local = isinstance(self._store, LocalStore)
            folder = Path(self._store.uri) if local else self._folder
            try:
                path = event_files.write(folder / place, str(place), chosen, history, started, record)
            except OSError as error:
                logger.warning("TensorBoard is not shown %s: %s", place, error)
                return
            if not local:
                self._future = self._pool.submit(self._put, self._store, f"{place}/{path.name}", path.read_bytes())

        return tell

    def _put(self, store: Store, name: str, content: bytes) -> None:
        try:
            store.put_bytes(name, content)
        except JobError as error:
            logger.warning("TensorBoard is not shown %s: %s", name, error)
