"""Publishing is a commit: artifacts first, then the manifest, once.

A run counts as published when its ``manifest.json`` is there. Several processes may work on one run, since schedulers
start a second one before the first is gone, and any of them may be killed at any moment. So nothing is written to its
final place before it is decided who publishes what:

1. Whoever begins to train writes its fingerprint to ``checkpoints/fingerprint``, create-only: another experiment under
   the same id is refused before it has trained anything.
2. Finished results are stored under ``checkpoints/finished/`` (``finished.py``).
3. Where all results are finished, the whole manifest is written to ``checkpoints/commit.json``, create-only. Of several
   processes one succeeds; the others take its manifest for their own.
4. The files named in the commit are copied to their final places, unless a manifest is there: a commit that was created
   after another's had been carried out and removed is withdrawn. Whoever copies writes the same bytes.
5. ``manifest.json`` is created, and everything below ``checkpoints/`` is removed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from enum import Enum

from pydantic import ValidationError

from job.errors import ConfigError, JobError, UnavailableError
from job.manifest import MANIFEST, PENDING, Artifact, Manifest, Record, RunPath
from job.storage.finished import at_once, opened, sealed
from job.storage.store import Store
from job.storage.verification import differences

logger = logging.getLogger(__name__)

_BEGUN = "fingerprint"
_COMMIT = "commit.json"
_SHOWN = 10
_ATTEMPTS = 3


class Outcome(Enum):
    """How a commit ended; both are success."""

    PUBLISHED = "published"
    ALREADY_PUBLISHED = "already published"


class _Commit(Record):
    """What is being published. stored: the name of each artifact below ``checkpoints/``, by its path."""

    manifest: Manifest
    stored: dict[RunPath, RunPath]


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
    """Return whether the run with this fingerprint is already published, and none of its files lost or changed.

    Files are compared by the CRC32C that the store tells, and read only where it tells none.

    Raises:
        ConfigError: another experiment has this id, or what was published is damaged.
    """
    manifest = read_manifest(store)
    if manifest is None:
        begun = store.child(PENDING).read(_BEGUN)
        if begun is not None and begun != fingerprint.encode():
            other = begun[:12].decode(errors="replace")
            raise _taken(store, f"another experiment (fingerprint {other!r}) has begun at {store.uri}")
        return False
    if manifest.fingerprint != fingerprint:
        raise _taken(store, f"another experiment is published at {store.uri} (fingerprint {manifest.fingerprint[:12]})")
    if problems := list(differences(manifest.artifacts, store)):
        shown = problems[:_SHOWN] + [f"and {len(problems) - _SHOWN} more"] * (len(problems) > _SHOWN)
        raise _taken(store, f"this run was published at {store.uri} and is damaged: {'; '.join(shown)}")
    return True


def _taken(store: Store, reason: str) -> ConfigError:
    return ConfigError.of("TRANSFER_RUN_ID", f"{reason}; give another id, or delete {store.uri}")


def completed(store: Store, fingerprint: str) -> bool:
    """Return whether the run is published; the commit of a process that was killed in it is completed for that.

    Raises:
        ConfigError: another experiment has this id, published or only begun, or what was published is damaged.
    """
    if finish(store, fingerprint):
        logger.info("an interrupted commit was completed")
    published = existing(store, fingerprint)
    if published:
        tidy(store)
    return published


def begin(store: Store, fingerprint: str) -> bool:
    """Take the run's id for this fingerprint, unless the run is published; return whether it is.

    Raises:
        ConfigError: as :func:`completed` does.
        UnavailableError: others take and give up the id at the same time.
    """
    pending, mark = store.child(PENDING), fingerprint.encode()
    if completed(store, fingerprint):
        return True
    for _ in range(_ATTEMPTS):
        is_mine = pending.create(_BEGUN, mark)
        # once more: whoever published meanwhile has removed what it had begun with
        try:
            published = existing(store, fingerprint)
        except ConfigError:
            if is_mine:
                pending.delete(_BEGUN)
            raise
        if published:
            tidy(store)
        if published or is_mine or pending.read(_BEGUN) == mark:
            return published
    raise UnavailableError(f"{store.uri} is begun and given up by others; try again later")


def commit(store: Store, manifest: Manifest, places: Iterable[tuple[str, Iterable[Artifact]]]) -> Outcome:
    """Publish the run: decide for this manifest or the one that another process decided for, and carry that out.

    Args:
        store: the run's.
        manifest: with all artifacts.
        places: folders below ``checkpoints/``, and the artifacts that are stored in each.

    Raises:
        ConfigError: another experiment has this id or is getting it, or what is published is damaged.
        UnavailableError: the files to publish have gone, while nothing is published.
    """
    stored = {artifact.path: f"{place}/{artifact.path}" for place, artifacts in places for artifact in artifacts}
    mine = _Commit(manifest=manifest, stored=stored)
    pending = store.child(PENDING)
    for _ in range(_ATTEMPTS):
        if existing(store, manifest.fingerprint):
            tidy(store)
            return Outcome.ALREADY_PUBLISHED
        is_mine = pending.create(_COMMIT, sealed(mine))
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
            _carry_out(store, decided)
        except FileNotFoundError:
            if not existing(store, manifest.fingerprint):
                logger.warning("%s/%s names files that are gone: it is replaced", pending.uri, _COMMIT)
                pending.delete(_COMMIT)
            continue
        tidy(store)
        return Outcome.PUBLISHED if is_mine else Outcome.ALREADY_PUBLISHED
    raise UnavailableError(f"{store.uri} changes while it is published; try again later")


def finish(store: Store, fingerprint: str) -> bool:
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
        _carry_out(store, decided)
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
        decided = _Commit.model_validate_json(opened(data))
        if unknown := [each.path for each in decided.manifest.artifacts if each.path not in decided.stored]:
            raise ValueError(f"it does not say where {unknown[0]} is stored")
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


def _carry_out(store: Store, decided: _Commit) -> None:
    """Copy every file to its final place, then create the manifest. FileNotFoundError where one has gone."""
    pending = store.child(PENDING)
    manifest = decided.manifest

    def copy(artifact: Artifact) -> None:
        copied = store.copy(artifact.path, pending, decided.stored[artifact.path])
        if (copied.bytes, copied.crc32c) != (artifact.bytes, artifact.crc32c):
            raise FileNotFoundError(f"{pending.uri}/{decided.stored[artifact.path]} has another content")

    at_once(copy, manifest.artifacts)
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
            logger.warning("%s/%r is of no result of this run: it is removed", store.uri, name)
            store.delete(name)


def tidy(store: Store) -> None:
    """Remove what is left of unfinished work in a published run's store."""
    try:
        store.child(PENDING).delete_all()
        store.tidy()
    except JobError as error:
        logger.warning("published, but unfinished work is left over: %s", error)
