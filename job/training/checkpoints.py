"""Checkpoints: how far the training of one result has come, saved so that a killed run goes on from there.

A checkpoint is one file, so that it is whole or not there, and its name carries its SHA-256: one that was cut short or
changed is recognised, and the one before is used. It carries the run's fingerprint too. Whatever lies under such a
name is either gone on from or not used, with a warning; no code in it runs, and no more memory is taken than it has
bytes.
"""

from __future__ import annotations

import io
import logging
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from job import stopping
from job.errors import JobError, Stopped
from job.manifest import Count, Epoch, Seconds, Sha256
from job.storage.documents import parse
from job.storage.store import Store, checksums

logger = logging.getLogger(__name__)

# The one before is for the case that the newest is damaged.
_KEPT = 2
_NAME = re.compile(r"(?P<result>.+)-step-(?P<step>[0-9]{9,18})-(?P<digest>[0-9a-f]{16})\.ckpt")
_RECORD = "record"
_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """How far training has come.

    step: steps taken in all phases. phase: index of the phase that is under way or to begin, at the end the number of
    phases. phase_step: steps taken in it. history: the epochs that were validated. images: examples stepped over.
    seconds: of training, epoch_seconds: of the epoch under way, both wall-clock over all lives of the run. resumed: how
    often a run went on from a checkpoint of this result.
    """

    step: Count = 0
    phase: Count = 0
    phase_step: Count = 0
    history: tuple[Epoch, ...] = ()
    images: Count = 0
    seconds: Seconds = 0.0
    epoch_seconds: Seconds = 0.0
    resumed: Count = 0


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Progress, and every array that training changes, by name: variables, optimizer slots, sums of the epoch."""

    progress: Progress
    arrays: Mapping[str, npt.NDArray[Any]] = field(repr=False)

    def to_bytes(self) -> bytes:
        """Return it as one string of bytes, for another worker."""
        record = np.frombuffer(_PROGRESS.dump_json(self.progress), np.uint8)
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **{_RECORD: record}, **self.arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Checkpoint:
        """Return what :meth:`to_bytes` was called of."""
        arrays = _read(io.BytesIO(content))
        return cls(_PROGRESS.validate_json(arrays.pop(_RECORD).tobytes()), arrays)


@dataclass(frozen=True)
class _Saved:
    """What a checkpoint says of itself."""

    version: int
    fingerprint: Sha256
    progress: Progress


_PROGRESS = TypeAdapter(Progress)
_SAVED = TypeAdapter(_Saved)


class _UnusableError(Exception):
    """A checkpoint is there but may not be used; the message says why."""


class Checkpoints:
    """The checkpoints of one run, in its place for unfinished work.

    Saving is the work of a thread: training waits only while the arrays are copied. Where a checkpoint cannot be
    saved, training goes on, with a warning.

    images: examples stepped over in the result that trains, when its state was last copied.
    """

    def __init__(self, store: Store, fingerprint: str, seconds: float, folder: Path) -> None:
        """Take the place, the run's fingerprint, the seconds of work that may be lost, and local scratch space."""
        self._store = store
        self._fingerprint = fingerprint
        self._seconds = seconds
        self._file = folder / "checkpoint"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        self._took = 0.0
        self._last = time.monotonic()
        self._writing = threading.Lock()
        self._held: tuple[str, Checkpoint] | None = None
        self._names: list[str] = []
        self.images = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """While the block runs, save what is held as soon as the process is asked to stop, and leave with all saved."""
        with stopping.when_asked(self._save_held):
            try:
                yield
            except Stopped:
                with stopping.deferred():  # a request may come now that another worker's has ended the steps
                    self._save_held()
                raise
            finally:
                self._thread.shutdown()

    def newest(self, result: str, phases: int) -> Checkpoint | None:
        """Return the newest checkpoint of ``result`` that can be used, with ``resumed`` counted up; None if none can.

        Args:
            result: names the result, fit for a file's name.
            phases: how many the result's arm has.
        """
        self._last = time.monotonic()
        self._held, self._names, self.images = None, [], 0
        try:
            names = self._names_of(result)
        except JobError as error:
            logger.warning("checkpoints are not used: %s", error)
            return None
        for name in names:
            try:
                found = self._load(name, phases)
            except (_UnusableError, JobError) as error:
                logger.warning("checkpoint %s is not used: %s", name, error, extra={"checkpoint": name})
                continue
            self._names, self.images = [name], found.progress.images
            return replace(found, progress=replace(found.progress, resumed=found.progress.resumed + 1))
        return None

    def _names_of(self, result: str) -> list[str]:
        """Return the names of a result's checkpoints, the newest first."""
        listed = ((name, _NAME.fullmatch(name)) for name in self._store.list())
        mine = [(int(match["step"]), name) for name, match in listed if match and match["result"] == result]
        return [name for _, name in sorted(mine, reverse=True)]

    def _load(self, name: str, phases: int) -> Checkpoint:
        try:
            self._store.download(name, self._file)
        except FileNotFoundError:
            raise _UnusableError("it has gone") from None
        try:
            match = _NAME.fullmatch(name)
            size, digest, _ = checksums(self._file)
            if match is None or not digest.startswith(match["digest"]):
                raise _UnusableError(f"it is damaged: {size:,} bytes, whose SHA-256 is not the one in its name")
            with self._file.open("rb") as file:
                arrays = _read(file)
            saved = _SAVED.validate_python(parse(arrays.pop(_RECORD).tobytes()))
        except _UnusableError:
            raise
        except Exception as error:  # of half a dozen libraries' types, and MemoryError and RecursionError
            raise _UnusableError(f"it is no checkpoint ({type(error).__name__})") from error
        finally:
            self._file.unlink(missing_ok=True)
        if saved.version != _VERSION or saved.fingerprint != self._fingerprint:
            raise _UnusableError(
                f"it belongs to another run or other settings (fingerprint {saved.fingerprint[:12]} "
                f"instead of {self._fingerprint[:12]})"
            )
        if saved.progress.phase > phases:
            raise _UnusableError(f"it is in phase {saved.progress.phase + 1} of {phases}")
        return Checkpoint(saved.progress, arrays)

    def due(self, share: float = 1.0) -> bool:
        """Return whether a checkpoint must be saved now, so that it lies in its place before too much can be lost.

        share: of the seconds of work that may be lost, at which to save.
        """
        if self._saving is not None and not self._saving.done():
            return False
        # work since the last copy is lost until the next one has been written, too
        return time.monotonic() - self._last >= share * max(self._seconds - self._took, self._seconds / 2)

    def save(self, result: str, checkpoint: Checkpoint) -> None:
        """Begin to save ``checkpoint``, whose arrays nobody changes any more."""
        self._last = time.monotonic()
        self.hold(result, checkpoint)
        self._saving = self._thread.submit(self._save_held)

    def hold(self, result: str, checkpoint: Checkpoint) -> None:
        """Keep ``checkpoint`` in memory: it is saved if the process is asked to stop before the next one comes."""
        self._held, self.images = (result, checkpoint), checkpoint.progress.images

    def _save_held(self) -> None:
        with self._writing:
            held, self._held = self._held, None
            if held is None:
                return
            start = time.monotonic()
            result, checkpoint = held
            step = checkpoint.progress.step
            try:
                name = self._write(result, checkpoint)
            except (JobError, OSError) as error:
                logger.warning("no checkpoint at step %d of %s: %s; training goes on", step, result, error)
                return
            self._took = time.monotonic() - start
            logger.info(
                "%s: saved step %d, %.1f s", result, step, self._took, extra={"saved_step": step, "checkpoint": name}
            )

    def _write(self, result: str, checkpoint: Checkpoint) -> str:
        saved = _Saved(_VERSION, self._fingerprint, checkpoint.progress)
        content = np.frombuffer(_SAVED.dump_json(saved), np.uint8)
        try:
            with self._file.open("wb") as file:
                np.savez(file, allow_pickle=False, **{_RECORD: content}, **checkpoint.arrays)
            _, digest, _ = checksums(self._file)
            name = f"{result}-step-{checkpoint.progress.step:09d}-{digest[:16]}.ckpt"
            self._store.put(name, self._file)
        finally:
            self._file.unlink(missing_ok=True)
        if name not in self._names:
            self._names.append(name)
        while len(self._names) > _KEPT:
            self._store.delete(self._names.pop(0))
        return name

    def forget(self, result: str) -> None:
        """Remove the checkpoints of a result that is finished, damaged ones and those of other settings too."""
        if self._saving is not None:
            self._saving.result()
        self._held, self._names, self.images = None, [], 0
        with suppress(JobError):  # they are removed again once the run is published
            for name in self._names_of(result):
                self._store.delete(name)


def _read(file: BinaryIO) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays that ``np.savez`` wrote to ``file``. An Exception of any type where it did not.

    NumPy's own reader believes what a file says: one of a few hundred bytes may have it ask for all memory.
    """
    size = file.seek(0, io.SEEK_END)
    arrays = {}
    with ZipFile(file) as members:
        if sum(each.file_size for each in members.infolist()) > size:
            raise ValueError("its members overlap or are compressed")
        for each in members.infolist():
            if each.compress_type != ZIP_STORED:
                raise ValueError("a member is compressed")
            with members.open(each) as member:
                if np.lib.format.read_magic(member) != (1, 0):
                    raise ValueError("an array is in another format")
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
                told = math.prod(shape) * dtype.itemsize
                if dtype.kind not in "biuf" or min(shape, default=0) < 0 or told != each.file_size - member.tell():
                    raise ValueError("an array has another size than it says")
                member.seek(0)
                arrays[each.filename.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
    return arrays


def copied(variables: Sequence[Any], name: str) -> dict[str, npt.NDArray[Any]]:
    """Return copies of the present values of Keras or TensorFlow variables, as ``name`` and their position."""
    return {f"{name}{i:04d}": np.array(variable) for i, variable in enumerate(variables)}


def assign(variables: Sequence[Any], arrays: Mapping[str, npt.NDArray[Any]], name: str) -> None:
    """Give variables the values that :func:`copied` returned for as many variables of these shapes."""
    for i, variable in enumerate(variables):
        variable.assign(arrays[f"{name}{i:04d}"])
