"""Finished results of a run that is not published: their files stored, and a record beside them that tells of it."""

from __future__ import annotations

import hashlib
import logging
import posixpath
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from job.errors import UnavailableError
from job.manifest import PENDING, Artifact, Record, Result, RunPath
from job.storage.store import THREADS, Store, checksums
from job.storage.verification import differences

logger = logging.getLogger(__name__)

_FINISHED = "finished"
_SHOWN = 10
_T = TypeVar("_T")
_U = TypeVar("_U")


class Finished(Record):
    """A finished result whose files are stored, but not published.

    correct: whether each test example was classified rightly, a digit each. place: the folder of its files below
    ``checkpoints/``; artifacts: they, under their final paths.
    """

    fingerprint: str
    result: Result
    correct: str
    place: RunPath
    artifacts: tuple[Artifact, ...]

    @property
    def hits(self) -> npt.NDArray[np.bool_]:
        """Return ``correct`` as bool [n]."""
        return np.asarray(np.frombuffer(self.correct.encode(), np.uint8) == ord("1"))


def upload_tree(store: Store, folder: Path, prefix: str = "") -> list[Artifact]:
    """Upload every file below ``folder``, several at a time, the largest first.

    Args:
        store: the run's store.
        folder: a local folder. Folders without files are left out: object storage has none.
        prefix: the folder's place in the store.

    Returns:
        What was uploaded, sorted by path; paths start with ``prefix``.

    Raises:
        NotADirectoryError: ``folder`` is none.
        ConfigError, UnavailableError: as the store raises them; some files may have been uploaded then.
    """
    if not folder.is_dir():
        raise NotADirectoryError(folder)
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)

    def upload(path: Path) -> Artifact:
        name = posixpath.join(prefix, path.relative_to(folder).as_posix())
        size, sha256, crc32c = checksums(path)
        stored = store.put(name, path)
        if stored.crc32c != crc32c:
            raise UnavailableError(f"{path} changed while it was uploaded to {store.uri}/{name}; try again")
        return Artifact(path=name, bytes=size, sha256=sha256, crc32c=crc32c)

    return sorted(at_once(upload, files), key=lambda artifact: artifact.path)


class Pending:
    """The finished results of a run that is not published yet."""

    def __init__(self, store: Store, fingerprint: str) -> None:
        """Take the run's store and the fingerprint: results of another experiment under this id are not ours."""
        self._store = store.child(PENDING)
        self._fingerprint = fingerprint

    def find(self, name: str) -> Finished | None:
        """Return the finished result ``name`` if all its files are there and whole."""
        record = self._record(name)
        data = self._store.read(record)
        if data is None:
            return None
        try:
            found = Finished.model_validate_json(opened(data))
            if found.fingerprint != self._fingerprint:
                raise ValueError(found.fingerprint)
        except ValueError:  # of JSON and of pydantic too
            logger.warning("%s/%s is damaged or of another run: %s is trained again", self._store.uri, record, name)
            return None
        if damage := list(differences(found.artifacts, self._store.child(found.place))):
            logger.warning("%s is trained again: its %s", name, "; ".join(damage[:_SHOWN]))
            return None
        return found

    def add(self, name: str, folder: Path, result: Result, hits: npt.NDArray[np.bool_]) -> Finished:
        """Store a finished result: every file below ``folder``, whose layout is the published run's."""
        place = f"{_FINISHED}/{uuid.uuid4().hex}"
        artifacts = upload_tree(self._store.child(place), folder)
        correct = "".join("1" if hit else "0" for hit in hits)
        finished = Finished(
            fingerprint=self._fingerprint, result=result, correct=correct, place=place, artifacts=tuple(artifacts)
        )
        self._store.put_bytes(self._record(name), sealed(finished))
        return finished

    def add_files(self, folder: Path) -> tuple[str, list[Artifact]]:
        """Store other files of the run, and return their folder below ``checkpoints/`` and what they are."""
        place = f"{_FINISHED}/{uuid.uuid4().hex}"
        return place, upload_tree(self._store.child(place), folder)

    def _record(self, name: str) -> str:
        return f"{_FINISHED}/{self._fingerprint[:12]}-{name}.json"


def at_once(function: Callable[[_T], _U], items: Iterable[_T]) -> list[_U]:
    """Return what ``function`` gives for each item, several at a time; after an error no further one is begun."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def sealed(record: Record) -> bytes:
    """Return a record with its SHA-256 before it: one changed bit in a figure would be published otherwise."""
    content = record.model_dump_json().encode()
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def opened(data: bytes) -> bytes:
    """Return the record of :func:`sealed`. ValueError where it has changed."""
    digest, _, content = data.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise ValueError("the record is damaged")
    return content
