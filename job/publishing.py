"""Publishing is a commit: artifacts first, then the manifest, once; and the check of what was published.

A run counts as published when its ``manifest.json`` is there. It is written create-only, so of two runs with one id
one wins, and the other finds its work done.
"""

from __future__ import annotations

import json
import math
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path

from jsonschema import Draft202012Validator, SchemaError
from pydantic import ValidationError
from referencing import Registry
from referencing.exceptions import Unresolvable

from job.errors import ConfigError, UnavailableError
from job.manifest import Artifact, Manifest, SplitMetrics
from job.storage import Store, Stored, checksums, open_store

MANIFEST = "manifest.json"
SCHEMA = "manifest.schema.json"
# The storage client's pool keeps 10 connections; more threads would open and drop one for each request.
_THREADS = 8
_SHOWN = 10
_ROUNDING = 1e-6  # figures may have been computed in float32


class Outcome(Enum):
    """How a commit ended; both are success."""

    PUBLISHED = "published"
    ALREADY_PUBLISHED = "already published"


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

    with ThreadPoolExecutor(_THREADS) as pool:
        return sorted(pool.map(upload, files), key=lambda artifact: artifact.path)


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
    if problems := _problems(store):
        shown = problems[:_SHOWN] + [f"and {len(problems) - _SHOWN} more"] * (len(problems) > _SHOWN)
        raise _taken(store, f"this run was published at {store.uri} and is damaged: {'; '.join(shown)}")
    return True


def _taken(store: Store, reason: str) -> ConfigError:
    return ConfigError.of("TRANSFER_RUN_ID", f"{reason}; give another id, or delete {store.uri}")


def commit(store: Store, manifest: Manifest) -> Outcome:
    """Write the manifest, last and only once: from then on the run is published.

    Before that, the store is asked whether it holds what the manifest says: another run with this id may have
    written over it.

    Raises:
        ConfigError: another experiment was published under this id, or the same one and it is damaged.
        UnavailableError: another run with this id is publishing at the same time.
    """
    if overwritten := list(_differences(manifest.artifacts, store)):
        if existing(store, manifest.fingerprint):
            return Outcome.ALREADY_PUBLISHED
        raise UnavailableError(f"{store.uri} changed while it was published: {overwritten[0]}; try again later")
    if store.create(MANIFEST, manifest.to_json()):
        return Outcome.PUBLISHED
    if existing(store, manifest.fingerprint):
        return Outcome.ALREADY_PUBLISHED
    raise UnavailableError(f"{store.uri}/{MANIFEST} was there and has gone; try again later")


def verify(uri: str) -> list[str]:
    """Return what is wrong with the run published at ``uri``, a sentence each; nothing when it is sound.

    Every artifact is read from end to end. Nothing is written.

    Raises:
        ConfigError, UnavailableError: as the store raises them.
    """
    return _problems(open_store(uri, "URI"))


def _problems(store: Store) -> list[str]:
    data = store.read(MANIFEST)
    if data is None:
        return [f"{store.uri} has no {MANIFEST}: the run is not complete"]
    try:
        document = json.loads(data)
    except ValueError as error:
        return [f"{MANIFEST} is not JSON: {error}"]
    problems = list(_schema_problems(document, store.read(SCHEMA)))
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        found = (f"{MANIFEST}: {'/'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        return problems + list(found)
    listing = store.list()
    return [
        *problems,
        *_listing_problems(manifest, listing),
        *_damage(manifest.artifacts, listing, store),
        *_contradictions(manifest),
    ]


def _schema_problems(document: object, schema: bytes | None) -> Iterator[str]:
    if schema is None:
        yield f"{SCHEMA} is missing"
        return
    try:
        rules = json.loads(schema)
        Draft202012Validator.check_schema(rules)
        # An empty registry: a published schema is never a reason to fetch another from the network.
        errors = list(Draft202012Validator(rules, registry=Registry()).iter_errors(document))
    except (ValueError, SchemaError, Unresolvable) as error:
        yield f"{SCHEMA} is no JSON schema ({type(error).__name__})"
        return
    for each in errors:
        yield f"{MANIFEST} does not satisfy {SCHEMA}: {each.json_path}: {each.message[:200]}"


def _listing_problems(manifest: Manifest, listing: dict[str, Stored]) -> Iterator[str]:
    times = Counter(artifact.path for artifact in manifest.artifacts)
    yield from (f"{path} is listed {count} times" for path, count in times.items() if count > 1)
    yield from (f"{path} is missing" for path in sorted(times.keys() - listing.keys()))
    yield from (f"{path} is not in the manifest" for path in sorted(listing.keys() - times.keys() - {MANIFEST}))
    for result in manifest.results:
        if not any(path.startswith(f"{result.saved_model}/") for path in listing):
            yield f"{result.saved_model}, the SavedModel of {result.arm}, is missing"


def _damage(artifacts: Iterable[Artifact], listing: dict[str, Stored], store: Store) -> Iterator[str]:
    """Read every artifact that is there from end to end."""
    present = sorted((artifact for artifact in artifacts if artifact.path in listing), key=lambda each: -each.bytes)

    def check(artifact: Artifact) -> str | None:
        try:
            size, sha256, crc32c = store.checksums(artifact.path)
        except FileNotFoundError:
            return f"{artifact.path} is missing"
        if size != artifact.bytes:
            return f"{artifact.path} has {size} bytes instead of {artifact.bytes}"
        if sha256 != artifact.sha256:
            return f"{artifact.path} has another content (sha256 {sha256} instead of {artifact.sha256})"
        return None if crc32c == artifact.crc32c else f"{artifact.path} has crc32c {crc32c}, not {artifact.crc32c}"

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from sorted(problem for problem in pool.map(check, present) if problem)


def _differences(artifacts: Iterable[Artifact], store: Store) -> Iterator[str]:
    """Compare artifacts with the store by what it can say: its CRC32C, or where it has none, the content."""
    listing = store.list()
    artifacts = list(artifacts)
    for artifact in artifacts:
        stored = listing.get(artifact.path)
        if stored is None:
            yield f"{artifact.path} is missing"
        elif stored.crc32c not in (artifact.crc32c, None):
            yield f"{artifact.path} has another content"
    yield from _damage(
        (each for each in artifacts if each.path in listing and not listing[each.path].crc32c), listing, store
    )


def _contradictions(manifest: Manifest) -> Iterator[str]:
    splits = manifest.dataset.splits
    for result in manifest.results:
        metrics = result.metrics
        for split, measured, examples in (
            ("train", metrics.train, result.train_examples),
            ("validation", metrics.validation, splits.validation.examples),
            ("test", metrics.test, splits.test.examples),
        ):
            where = f"{result.arm}, fraction {result.train_fraction:g}, seed {result.seed}, {split}"
            if measured.examples != examples:
                yield f"{where}: {measured.examples} examples were measured of {examples}"
            yield from (f"{where}: {problem}" for problem in _metric_contradictions(measured, manifest.dataset.classes))


def _metric_contradictions(metrics: SplitMetrics, classes: tuple[str, ...]) -> Iterator[str]:
    confusion, count = metrics.confusion, len(classes)
    if len(confusion) != count or any(len(row) != count for row in confusion):
        yield f"the confusion matrix is not {count} by {count}"
        return
    if sum(map(sum, confusion)) != metrics.examples:
        yield f"the confusion matrix counts {sum(map(sum, confusion))} examples instead of {metrics.examples}"
    correct = sum(confusion[index][index] for index in range(count))
    if not math.isclose(metrics.accuracy * metrics.examples, correct, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
        yield f"accuracy {metrics.accuracy:g} is not {correct} of {metrics.examples}"
    low, high = metrics.accuracy_interval
    if not low - _ROUNDING <= metrics.accuracy <= high + _ROUNDING:
        yield f"accuracy {metrics.accuracy:g} is outside its interval [{low:g}, {high:g}]"
    supports = [(each.name, each.support) for each in metrics.per_class]
    if supports != [(name, sum(row)) for name, row in zip(classes, confusion, strict=True)]:
        yield "the support per class does not add up to the confusion matrix"
