"""The check of a published run: manifest against schema, every artifact's size and checksums, nothing else there.

Whoever published it may be hostile. Its manifest is held against this version's own schema, the one beside it is only
compared; nothing outside of the run is read, and of an artifact no more than the manifest says that it has.
"""

from __future__ import annotations

import functools
import math
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import ValidationError

from job.manifest import MANIFEST, PENDING, SCHEMA, SCHEMA_VERSION, Artifact, Manifest, SplitMetrics, json_schema
from job.storage.documents import parse
from job.storage.locations import open_store
from job.storage.store import THREADS, Store, Stored, UnusableError

_ROUNDING = 1e-6  # figures may have been computed in float32
_LONGEST = 1000  # characters of a sentence: a path has 1,024 at most, the names of fields can have any number


def verify(uri: str) -> list[str]:
    """Return what is wrong with the run published at ``uri``, a sentence each; nothing when it is sound.

    Every artifact is read from end to end. Nothing is written. A sentence is one line, whatever the run's names hold.

    Raises:
        ConfigError, UnavailableError: as the store raises them.
    """
    return problems_of(open_store(uri, "URI"))


def problems_of(store: Store) -> list[str]:
    """Return what is wrong with the run in ``store``, as :func:`verify` does."""
    return list(dict.fromkeys(map(_line, _problems(store))))


def _line(sentence: str) -> str:
    """Return a sentence as it may stand in a log: nothing in it ends a line or is invisible."""
    if len(sentence) > _LONGEST:
        sentence = f"{sentence[:_LONGEST]}…"
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in sentence)


def _problems(store: Store) -> Iterator[str]:
    try:
        data = store.read(MANIFEST)
    except UnusableError as error:
        yield error.problems[0].message
        return
    if data is None:
        yield f"{store.uri} has no {MANIFEST}: the run is not complete"
        return
    try:
        document = parse(data)
    except ValueError as error:
        yield f"{MANIFEST} {error}"
        return
    version = document.get("schema_version") if isinstance(document, dict) else None
    if isinstance(version, str) and version != SCHEMA_VERSION:
        yield (
            f"{MANIFEST} has schema version {version!r}, and this version of the job checks {SCHEMA_VERSION!r}: "
            "use the version that published the run"
        )
        return
    del document
    yield from _schema_problems(store)
    try:
        manifest = Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        for each in error.errors(include_url=False, include_context=False, include_input=False):
            yield f"{MANIFEST}: {'/'.join(map(str, each['loc']))}: {each['msg']}"
        return
    listing = store.list()
    yield from _listing_problems(manifest, listing)
    yield from _damage(manifest.artifacts, listing, store)
    yield from _contradictions(manifest)


def _schema_problems(store: Store) -> Iterator[str]:
    try:
        data = store.read(SCHEMA)
        schema = None if data is None else parse(data)
    except UnusableError as error:
        yield error.problems[0].message
    except ValueError as error:
        yield f"{SCHEMA} {error}"
    else:
        if data is None:
            yield f"{SCHEMA} is missing"
        elif not (_names_version(schema) and _within(schema, _own_schema())):
            yield f"{SCHEMA} is not the schema of version {SCHEMA_VERSION}"


@functools.cache
def _own_schema() -> dict[str, Any]:
    return json_schema()


def _names_version(schema: Any) -> bool:
    try:
        return bool(schema["properties"]["schema_version"]["const"] == SCHEMA_VERSION)
    except (TypeError, KeyError, IndexError):
        return False


def _within(older: Any, own: Any) -> bool:
    """Return whether a schema asks for nothing that our own does not: fields were added under the same version."""
    if isinstance(older, dict) and isinstance(own, dict):
        said = {key for key in ("title", "description") if isinstance(older.get(key), str)}  # words, or fields so named
        return all(key in own and _within(older[key], own[key]) for key in older.keys() - said)
    if isinstance(older, list) and isinstance(own, list):
        return all(any(_within(each, mine) for mine in own) for each in older)
    return bool(older == own)


def _listing_problems(manifest: Manifest, listing: dict[str, Stored]) -> Iterator[str]:
    times = Counter(artifact.path for artifact in manifest.artifacts)
    yield from (f"{path} is listed {count} times" for path, count in times.items() if count > 1)
    yield from (f"{path} is missing" for path in sorted(times.keys() - listing.keys()))
    yield from (f"{path} is not a plain file" for path, stored in sorted(listing.items()) if not stored.plain)
    # unfinished work is left over where a run was killed right after its manifest was written, or another one with its
    # id goes on; the next run with this id removes it
    extra = sorted(name for name in listing.keys() - times.keys() - {MANIFEST} if not name.startswith(f"{PENDING}/"))
    yield from (f"{path} is not in the manifest" for path in extra)
    folders = _folders(listing)
    for result in manifest.results:
        if result.saved_model not in folders:
            yield f"{result.saved_model}, the SavedModel of {result.arm}, is missing"


def _folders(paths: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        while (path := posixpath.dirname(path)) and path not in found:
            found.add(path)
    return found


def _damage(artifacts: Iterable[Artifact], listing: dict[str, Stored], store: Store) -> Iterator[str]:
    """Read every artifact that is there, and as long as it should be, from end to end."""
    once = {artifact.path: artifact for artifact in artifacts}.values()
    present = [artifact for artifact in once if artifact.path in listing and listing[artifact.path].plain]

    def check(artifact: Artifact) -> str | None:
        size = listing[artifact.path].bytes
        try:
            if size == artifact.bytes:
                size, sha256, crc32c = store.checksums(artifact.path)
        except FileNotFoundError:
            return f"{artifact.path} is missing"
        if size != artifact.bytes:
            return f"{artifact.path} has {size} bytes instead of {artifact.bytes}"
        if sha256 != artifact.sha256:
            return f"{artifact.path} has another content (sha256 {sha256} instead of {artifact.sha256})"
        return None if crc32c == artifact.crc32c else f"{artifact.path} has crc32c {crc32c}, not {artifact.crc32c}"

    with ThreadPoolExecutor(THREADS) as pool:
        problems = pool.map(check, sorted(present, key=lambda each: -each.bytes))
        yield from sorted(problem for problem in problems if problem)


def differences(artifacts: Iterable[Artifact], store: Store) -> Iterator[str]:
    """Yield how artifacts differ from the store by what it can say: its CRC32C, or where it has none, the content."""
    listing = store.list()
    artifacts = list(artifacts)
    for artifact in artifacts:
        stored = listing.get(artifact.path)
        if stored is None:
            yield f"{artifact.path} is missing"
        elif not stored.plain:
            yield f"{artifact.path} is not a plain file"
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
