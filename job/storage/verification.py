"""The check of a published run: manifest against schema, every artifact's size and checksums, nothing else there."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from jsonschema import Draft202012Validator, SchemaError
from pydantic import ValidationError
from referencing import Registry
from referencing.exceptions import Unresolvable

from job.manifest import MANIFEST, PENDING, SCHEMA, Artifact, Manifest, SplitMetrics
from job.storage.locations import open_store
from job.storage.store import THREADS, Store, Stored

_ROUNDING = 1e-6  # figures may have been computed in float32


def verify(uri: str) -> list[str]:
    """Return what is wrong with the run published at ``uri``, a sentence each; nothing when it is sound.

    Every artifact is read from end to end. Nothing is written.

    Raises:
        ConfigError, UnavailableError: as the store raises them.
    """
    return problems_of(open_store(uri, "URI"))


def problems_of(store: Store) -> list[str]:
    """Return what is wrong with the run in ``store``, as :func:`verify` does."""
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
    # unfinished work is left over where a run was killed right after its manifest was written, or another one with its
    # id goes on; the next run with this id removes it
    extra = sorted(name for name in listing.keys() - times.keys() - {MANIFEST} if not name.startswith(f"{PENDING}/"))
    yield from (f"{path} is not in the manifest" for path in extra)
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

    with ThreadPoolExecutor(THREADS) as pool:
        yield from sorted(problem for problem in pool.map(check, present) if problem)


def differences(artifacts: Iterable[Artifact], store: Store) -> Iterator[str]:
    """Yield how artifacts differ from the store by what it can say: its CRC32C, or where it has none, the content."""
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
