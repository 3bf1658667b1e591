"""The cap on what a run may take, in seconds and in money, over all of its lives.

Each life of a run tells its seconds in an object of its own beside the checkpoints, so that lives at the same time add
up too. One that is killed has told them up to the last time.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated

from pydantic import Field, ValidationError

from job import stopping
from job.errors import ConfigError, JobError, Problem, Stopped
from job.machine.replicas import Replicas
from job.manifest import Record, Share
from job.settings.groups import OutputSettings
from job.storage.store import THREADS, Store

logger = logging.getLogger(__name__)

_FOLDER = "spent"
# Object storage takes one change of an object a second.
_SECONDS_BETWEEN = 1.0
# Of the work; after less of it, a pace is no more than a guess.
_LEAST_SHARE = 0.001
# Workers reach the cap at the same time, but for so much: whoever is stopped by another's vote then has reached it too.
_SECONDS_APART = 5.0

_Seconds = Annotated[float, Field(ge=0, le=1e10)]


class Cap(Record):
    """One bound on a run.

    variable: that gives it. value: as given. hourly: the price of an hour, where it is money; None where it is seconds.
    """

    variable: str
    value: float
    hourly: float | None = None

    @property
    def seconds(self) -> float:
        """Return the seconds that it allows."""
        return self.value if self.hourly is None else self.value / self.hourly * 3600

    def problem(self, spent: float, rest: float | None, then: str = "") -> Problem:
        """Return what to tell of it: ``spent`` and ``rest`` in seconds, the rest None where it cannot be told."""
        message = f"received {self.value:.15g}: {self._told(spent)} spent over all restarts, and the rest "
        if rest is None:
            message += "cannot be told before more is trained (`python -m job plan` estimates a whole run); give more"
        else:
            message += (
                f"is estimated at {self._told(rest)}; give {_rounded_up(self._amount(spent + rest)):.15g} or more"
            )
        return Problem(self.variable, message + then)

    def _amount(self, seconds: float) -> float:
        return seconds if self.hourly is None else seconds / 3600 * self.hourly

    def _told(self, seconds: float) -> str:
        if self.hourly is None:
            return f"{seconds:.0f} s"
        amount = self._amount(seconds)
        return f"{amount:.2f} ({seconds:.0f} s)" if amount >= 1 else f"{amount:.2g} ({seconds:.0f} s)"


def _rounded_up(amount: float) -> float:
    """Return ``amount``, at least zero, in three digits, none of them too small."""
    unit = 10.0 ** (math.floor(math.log10(amount)) - 2) if amount else 1.0
    return math.ceil(amount / unit) * unit


class Spent(Record):
    """What lives of a run have taken.

    seconds: from the beginning of each process. opening: of one life's, those before its first result. share: of the
    examples that all results step over, how many were by then.
    """

    seconds: _Seconds = 0.0
    opening: _Seconds = 0.0
    share: Share = 0.0

    @property
    def rest(self) -> float | None:
        """Return about how many seconds another life takes to end the run, at the pace so far; None without one."""
        if self.share < _LEAST_SHARE:
            return None
        return self.opening + max(0.0, self.seconds - self.opening) * (1 - self.share) / self.share


def _in_all(lives: Iterable[Spent]) -> Spent:
    found = [Spent(), *lives]
    return Spent(
        seconds=min(1e10, sum(life.seconds for life in found)),
        opening=max(life.opening for life in found),
        share=max(life.share for life in found),
    )


def caps_of(output: OutputSettings) -> tuple[Cap, ...]:
    """Return the bounds that the settings give."""
    found = []
    if output.max_seconds is not None:
        found.append(Cap(variable="TRANSFER_MAX_SECONDS", value=output.max_seconds))
    if output.max_cost is not None:
        found.append(Cap(variable="TRANSFER_MAX_COST", value=output.max_cost, hourly=output.cost_per_hour))
    return tuple(found)


def problems(caps: Sequence[Cap], spent: float, rest: float | None, then: str = "") -> list[Problem]:
    """Return what to tell of each bound that ``spent`` and ``rest``, in seconds, are above together."""
    return [cap.problem(spent, rest, then) for cap in caps if cap.seconds < spent + (rest or 0.0)]


def spent_before(store: Store, fingerprint: str) -> Spent:
    """Return what earlier lives of a run have taken, as far as they told.

    Args:
        store: of the run's checkpoints.
        fingerprint: of the run; lives of another experiment under its id are not counted.

    Raises:
        ConfigError, UnavailableError: as the store raises them.
    """
    place = store.child(_FOLDER)
    names = [name for name in place.list() if name.startswith(fingerprint[:12])]

    def life(name: str) -> Spent:
        try:
            return Spent.model_validate_json(place.read(name) or b"{}")
        except ValidationError:
            logger.warning("%s/%s is damaged: the seconds that it told of are not counted", place.uri, name)
            return Spent()

    with ThreadPoolExecutor(THREADS) as pool:
        return _in_all(pool.map(life, names))


class _Agreed(Record):
    """What all workers count by. seconds: of the chief's life until now."""

    caps: tuple[Cap, ...]
    before: Spent
    seconds: float


def account(output: OutputSettings, store: Store, fingerprint: str, began: float, replicas: Replicas) -> Account:
    """Return the account of this life, by which all workers count as the chief does.

    Args:
        output: the chief's decides.
        store: of the run's checkpoints.
        fingerprint: of the run.
        began: when the process did, by time.monotonic().
        replicas: the workers, each of which calls this.

    Raises:
        ConfigError: earlier lives have reached the cap.
        UnavailableError: what they took cannot be read.
    """
    caps = caps_of(output)
    # a run without a cap is counted too, as it may get one; but what was before it matters only then
    before = spent_before(store, fingerprint) if caps and replicas.is_chief else Spent()
    mine = _Agreed(caps=caps, before=before, seconds=time.monotonic() - began)
    agreed = _Agreed.model_validate_json(replicas.from_chief(mine.model_dump_json().encode()))
    if any(cap.seconds <= agreed.before.seconds for cap in agreed.caps):
        raise ConfigError(_told(agreed.caps, agreed.before))
    place = store.child(_FOLDER) if replicas.is_chief else None
    name = f"{fingerprint[:12]}-{uuid.uuid4().hex}.json"
    return Account(
        agreed.caps, agreed.before, time.monotonic() - agreed.seconds, place, name, output.checkpoint_seconds
    )


def _told(caps: Sequence[Cap], spent: Spent) -> list[Problem]:
    then = ": the run goes on from what is saved"
    first = min(caps, key=lambda cap: cap.seconds)
    others = [cap for cap in caps if cap is not first]
    return [first.problem(spent.seconds, spent.rest, then), *problems(others, spent.seconds, spent.rest, then)]


class Account:
    """What this life of a run takes, beside those before."""

    def __init__(
        self, caps: tuple[Cap, ...], before: Spent, began: float, place: Store | None, name: str, seconds: float
    ) -> None:
        """Take the caps, what was before, and when this life began, by time.monotonic().

        place, name: where its seconds are told; no place where another worker does it. seconds: between two times.
        """
        self._caps = caps
        self._limit = min((cap.seconds for cap in caps), default=math.inf)
        self._before = before
        self._began = began
        self._place = place
        self._name = name
        self._interval = max(_SECONDS_BETWEEN, seconds)
        self._opening = 0.0
        self._share: Callable[[], float] = lambda: 0.0
        self._reached = False
        self._over = threading.Event()
        self._telling = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Count the block's seconds; at the cap it is stopped as by a signal, and saves what it then would.

        Raises:
            ConfigError: the cap is reached. The message says what the rest would take, where that is known.
        """
        if self._left <= 0:
            self._write()
            raise ConfigError(self._problems())
        threads = [threading.Thread(target=work, name="cap", daemon=True) for work in (self._tell, self._wait)]
        for thread in threads:
            thread.start()
        refused = False
        try:
            try:
                yield
            except ConfigError:
                refused = not self._opening  # before anything was trained: nothing of it is left behind
                raise
            finally:
                with stopping.deferred():
                    self._over.set()
                    for thread in threads:
                        thread.join()
                    if not refused:
                        self._write()
            if self._reached:
                stopping.stop()
        except JobError:
            raise
        except Stopped:
            if self._has_reached():
                raise ConfigError(self._problems()) from None
            raise
        except Exception as error:
            if self._reached:  # native code that calls Python makes other errors of Stopped
                raise ConfigError(self._problems()) from error
            raise

    def follow(self, share: Callable[[], float]) -> None:
        """Take a function that tells how much of all results' training is done, as they begin now."""
        self._opening = time.monotonic() - self._began
        self._share = share

    def close(self) -> None:
        """Tell nothing more: the run is published, and its unfinished work removed."""
        with stopping.deferred(), self._telling:
            self._place = None

    @property
    def _left(self) -> float:
        return self._limit - self._before.seconds - (time.monotonic() - self._began)

    def _life(self) -> Spent:
        seconds, share = time.monotonic() - self._began, self._share()
        return Spent(seconds=seconds, opening=self._opening, share=min(1.0, share))

    def _has_reached(self) -> bool:
        return self._reached or (not stopping.asked_to_stop() and self._left < _SECONDS_APART)

    def _problems(self) -> list[Problem]:
        if self._place is not None:
            return _told(self._caps, _in_all((self._before, self._life())))
        first = min(self._caps, key=lambda cap: cap.seconds)
        return [
            Problem(first.variable, f"received {first.value:.15g}: it is reached; the first worker tells of the rest")
        ]

    def _wait(self) -> None:
        if self._over.wait(min(max(0.0, self._left), threading.TIMEOUT_MAX)) or stopping.asked_to_stop():
            return
        self._reached = True
        logger.warning("the cap is reached: what is done is saved, and the run ends")
        stopping.ask("the cap is reached", stopping.GRACE_SECONDS, ConfigError.exit_code)
        self._write()

    def _tell(self) -> None:
        wait = self._interval - (time.monotonic() - self._began)
        while not self._over.wait(max(0.0, min(wait, threading.TIMEOUT_MAX))):
            self._write()
            wait = self._interval

    def _write(self) -> None:
        with self._telling:
            if self._place is None:
                return
            try:
                self._place.put_bytes(self._name, self._life().model_dump_json().encode())
            except (JobError, Stopped) as error:
                logger.warning("%s/%s does not tell what this run takes: %s", self._place.uri, self._name, error)
