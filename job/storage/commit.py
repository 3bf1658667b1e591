"""Publishing is a commit: artifacts first, then the manifest, once.

A run counts as published when its ``manifest.json`` is there. Several processes may work on one run, since schedulers
start a second one before the first is gone, and any of them may be killed at any moment. So nothing is written to its
final place before it is decided who publishes what:

1. A finished result's files are stored under ``checkpoints/finished/`` in a folder of their own; a record beside them
   tells of it. A restarted run does not train it again.
2. Where all results are finished, the whole manifest is written to ``checkpoints/commit.json``, create-only. Of several
   processes one succeeds; the others take its manifest for their own.
3. The files named in the commit are copied to their final places, unless a manifest is there: a commit that was created
   after another's had been carried out and removed is withdrawn. Whoever copies writes the same bytes.
4. ``manifest.json`` is created, and everything below ``checkpoints/`` is removed.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from job.errors import ConfigError, JobError, UnavailableError
from job.manifest import MANIFEST, PENDING, Artifact, Manifest, Record, Result
from job.storage.store import THREADS, Store, checksums
from job.storage.verification import differences, problems_of

logger = logging.getLogger(__name__)

_COMMIT = "commit.json"
_FINISHED = "finished"
_SHOWN = 10
_ATTEMPTS = 3
_T = TypeVar("_T")
_U = TypeVar("_U")


class Outcome(Enum):
    """How a commit ended; both are success."""

    PUBLISHED = "published"
    ALREADY_PUBLISHED = "already published"


class Finished(Record):
    """A finished result whose files are stored, but not published.

    correct: whether each test example was classified rightly, a digit each. place: the folder of its files below
    ``checkpoints/``; artifacts: they, under their final paths.
    """

    fingerprint: str
    result: Result
    correct: str
    place: str
    artifacts: tuple[Artifact, ...]

    @property
    def hits(self) -> npt.NDArray[np.bool_]:
        """Return ``correct`` as bool [n]."""
        return np.asarray(np.frombuffer(self.correct.encode(), np.uint8) == ord("1"))


class _Commit(Record):
    """What is being published. stored: the name of each artifact below ``checkpoints/``, by its path.

    best: the SavedModel's folder that AIP_MODEL_DIR wants, None where it is not set.
    """

    manifest: Manifest
    stored: dict[str, str]
    best: str | None = None


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

    return sorted(_at_once(upload, files), key=lambda artifact: artifact.path)


def read_manifest(store: Store) -> Manifest | None:
    """Return the run's manifest, None when the run is not complete.

    Raises:
        ConfigError: what lies under its name is no manifest of this version.
    """
    data = store.read(MANIFEST)
    if data is None:
        return None
    try:
        return Manifest.model_validate_json(data)
    except ValidationError:
        raise _taken(store, f"something that is no manifest of this version lies at {store.uri}/{MANIFEST}") from None


def existing(store: Store, fingerprint: str) -> bool:
    """Return whether the run with this fingerprint is already published, and sound.

    Raises:
        ConfigError: another experiment has this id, or what was published is damaged.
    """
    manifest = read_manifest(store)
    if manifest is None:
        return False
    if manifest.fingerprint != fingerprint:
        raise _taken(store, f"another experiment is published at {store.uri} (fingerprint {manifest.fingerprint[:12]})")
    if problems := problems_of(store):
        shown = problems[:_SHOWN] + [f"and {len(problems) - _SHOWN} more"] * (len(problems) > _SHOWN)
        raise _taken(store, f"this run was published at {store.uri} and is damaged: {'; '.join(shown)}")
    return True


def _at_once(function: Callable[[_T], _U], items: Iterable[_T]) -> list[_U]:
    """Return what ``function`` gives for each item, several at a time; after an error no further one is begun."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _taken(store: Store, reason: str) -> ConfigError:
    return ConfigError.of("TRANSFER_RUN_ID", f"{reason}; give another id, or delete {store.uri}")


def _sealed(record: Record) -> bytes:
    """Return a record with its SHA-256 before it: one changed bit in a figure would be published otherwise."""
    content = record.model_dump_json().encode()
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def _opened(sealed: bytes) -> bytes:
    """Return the record of :func:`_sealed`. ValueError where it has changed."""
    digest, _, content = sealed.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise ValueError("the record is damaged")
    return content


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
            found = Finished.model_validate_json(_opened(data))
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
        self._store.put_bytes(self._record(name), _sealed(finished))
        return finished

    def add_files(self, folder: Path) -> tuple[str, list[Artifact]]:
        """Store other files of the run, and return their folder below ``checkpoints/`` and what they are."""
        place = f"{_FINISHED}/{uuid.uuid4().hex}"
        return place, upload_tree(self._store.child(place), folder)

    def _record(self, name: str) -> str:
        return f"{_FINISHED}/{self._fingerprint[:12]}-{name}.json"


def commit(
    store: Store, manifest: Manifest, places: Iterable[tuple[str, Iterable[Artifact]]], model_store: Store | None = None
) -> Outcome:
    """Publish the run: decide for this manifest or the one that another process decided for, and carry that out.

    Args:
        store: the run's.
        manifest: with all artifacts.
        places: folders below ``checkpoints/``, and the artifacts that are stored in each.
        model_store: where the SavedModel with the best validation accuracy shall lie too.

    Raises:
        ConfigError: another experiment has this id or is getting it, or what is published is damaged.
        UnavailableError: the files to publish have gone, while nothing is published.
    """
    stored = {artifact.path: f"{place}/{artifact.path}" for place, artifacts in places for artifact in artifacts}
    best = max(manifest.results, key=lambda result: result.metrics.validation.accuracy).saved_model
    mine = _Commit(manifest=manifest, stored=stored, best=best if model_store else None)
    pending = store.child(PENDING)
    for _ in range(_ATTEMPTS):
        if existing(store, manifest.fingerprint):
            tidy(store)
            return Outcome.ALREADY_PUBLISHED
        is_mine = pending.create(_COMMIT, _sealed(mine))
        decided = mine if is_mine else _decided(store, manifest.fingerprint)
        # once more: whoever published meanwhile has removed its commit, after its manifest was there
        try:
            published = existing(store, manifest.fingerprint)
        except ConfigError:
            # by now it may be a third process's: that one finds the manifest, too
            if is_mine:
                pending.delete(_COMMIT)
            raise
        if published:
            tidy(store)
            return Outcome.ALREADY_PUBLISHED
        if decided is None:
            continue
        try:
            _carry_out(store, decided, model_store)
        except FileNotFoundError:
            if not existing(store, manifest.fingerprint):
                logger.warning("%s/%s names files that are gone: it is replaced", pending.uri, _COMMIT)
                pending.delete(_COMMIT)
            continue
        tidy(store)
        return Outcome.PUBLISHED if is_mine else Outcome.ALREADY_PUBLISHED
    raise UnavailableError(f"{store.uri} changes while it is published; try again later")


def finish(store: Store, fingerprint: str, model_store: Store | None = None) -> bool:
    """Complete the commit of a process that was killed in it; return whether the run is published by that.

    Where a manifest is, nothing is carried out, whoever's commit was left behind: it would replace what is published.

    Raises:
        ConfigError: another experiment is being published under this id.
    """
    if (published := read_manifest(store)) is not None:
        left = published.fingerprint == fingerprint and store.child(PENDING).read(_COMMIT) is not None
        if left:
            tidy(store)
        return left
    decided = _decided(store, fingerprint)
    if decided is None:
        return False
    try:
        _carry_out(store, decided, model_store)
    except FileNotFoundError:
        return False
    tidy(store)
    return True


def _decided(store: Store, fingerprint: str) -> _Commit | None:
    """Return what is being published, None where nothing is."""
    pending = store.child(PENDING)
    data = pending.read(_COMMIT)
    if data is None:
        return None
    try:
        decided = _Commit.model_validate_json(_opened(data))
    except ValueError:
        logger.warning("%s/%s is damaged: it is removed", pending.uri, _COMMIT)
        pending.delete(_COMMIT)
        return None
    if decided.manifest.fingerprint != fingerprint:
        raise _taken(
            store,
            f"another experiment (fingerprint {decided.manifest.fingerprint[:12]}) is being published at {store.uri}",
        )
    return decided


def _carry_out(store: Store, decided: _Commit, model_store: Store | None) -> None:
    """Copy every file to its final place, then create the manifest. FileNotFoundError where one has gone."""
    pending = store.child(PENDING)
    manifest = decided.manifest

    def copy(where: tuple[Store, str, Artifact]) -> None:
        target, path, artifact = where
        copied = target.copy(path, pending, decided.stored[artifact.path])
        if (copied.bytes, copied.crc32c) != (artifact.bytes, artifact.crc32c):
            raise FileNotFoundError(f"{pending.uri}/{decided.stored[artifact.path]} has another content")

    copies = [(store, artifact.path, artifact) for artifact in manifest.artifacts]
    if model_store is not None and decided.best is not None:
        start = f"{decided.best}/"
        best = [artifact for artifact in manifest.artifacts if artifact.path.startswith(start)]
        copies += [(model_store, artifact.path.removeprefix(start), artifact) for artifact in best]
    _at_once(copy, copies)
    _remove_extra(store, manifest)
    if wrong := list(differences(manifest.artifacts, store)):
        raise UnavailableError(f"{store.uri} changed while it was published: {wrong[0]}; try again later")
    if not store.create(MANIFEST, manifest.to_json()) and not existing(store, manifest.fingerprint):
        raise UnavailableError(f"{store.uri}/{MANIFEST} was there and has gone; try again later")


def _remove_extra(store: Store, manifest: Manifest) -> None:
    """Remove what a commit that was replaced, or an earlier version, left among the artifacts."""
    listed = {artifact.path for artifact in manifest.artifacts}
    folders = {path.partition("/")[0] for path in listed if "/" in path}
    for name in store.list():
        if name.partition("/")[0] in folders and name not in listed:
            logger.warning("%s/%s is of no result of this run: it is removed", store.uri, name)
            store.delete(name)


def tidy(store: Store) -> None:
    """Remove what is left of unfinished work in a published run's store."""
    try:
        store.child(PENDING).delete_all()
        store.tidy()
    except JobError as error:
        logger.warning("published, but unfinished work is left over: %s", error)
