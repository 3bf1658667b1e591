"""The order of things: plan, decode, then per result train, evaluate, export, upload; the manifest last."""

from __future__ import annotations

import itertools
import json
import logging
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import keras
import tensorflow as tf

import job
from job import data, manifest, planning, publishing
from job.console import Console
from job.errors import ConfigError
from job.experiment import Experiment, Outcome
from job.planning import Plan
from job.rows import Rows, duplicates_across_splits
from job.runtime import Runtime, stop_if_asked
from job.settings import RuntimeSettings, Settings
from job.statistics import paired_test

logger = logging.getLogger(__name__)


def run(settings: Settings, machine: Runtime, console: Console) -> str:
    """Run the whole comparison and publish it; return the URI of the manifest.

    A run that is already published with the same fingerprint is verified instead. Raises the errors of the steps.
    """
    with workspace(settings.runtime) as folder:
        plan = planning.make(settings, machine, folder)
        uri = f"{plan.store.uri}/manifest.json"
        logger.info("run %s", plan.run_id, extra={"run_id": plan.run_id, "fingerprint": plan.fingerprint})
        if publishing.existing(plan.store, plan.fingerprint):
            logger.info("already published and verified: %s", uri)
            return uri
        _warn_of_what_is_not_honoured(settings)
        pixels, data_seconds = _decode(plan, folder, console)
        outcomes, artifacts = _results(plan, pixels, data_seconds, folder, console)
        record = _manifest(plan, pixels, outcomes, artifacts)
        stop_if_asked()
        if publishing.commit(plan.store, record) is publishing.Outcome.ALREADY_PUBLISHED:
            logger.info("another run published the same meanwhile: %s", uri)
        _summary(record, console)
        logger.info("published %s", uri, extra={"manifest": uri})
        return uri


@contextmanager
def workspace(settings: RuntimeSettings) -> Iterator[Path]:
    """Yield a fresh folder on local disk, below TRANSFER_CACHE_DIR if given; it is removed at the end."""
    try:
        if settings.cache_dir is not None:
            Path(settings.cache_dir).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="transfer-", dir=settings.cache_dir))
    except OSError as error:
        raise ConfigError.of(
            "TRANSFER_CACHE_DIR",
            f"no folder can be made in {settings.cache_dir or tempfile.gettempdir()}: {error.strerror}. "
            "Give a folder on a local disk that can be written",
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _warn_of_what_is_not_honoured(settings: Settings) -> None:
    platform_settings = settings.platform
    if platform_settings.checkpoint_dir:
        logger.warning("AIP_CHECKPOINT_DIR is set, but this version keeps no checkpoints: a killed run starts again")
    if platform_settings.tensorboard_log_dir:
        logger.warning("AIP_TENSORBOARD_LOG_DIR is set, but this version writes no TensorBoard logs")


def _decode(plan: Plan, folder: Path, console: Console) -> tuple[dict[str, Rows], float]:
    start = time.perf_counter()
    settings = plan.settings
    total = sum(split.examples for split in plan.source.splits.values())
    with console.bar("decoding", total) as advance:
        pixels = data.read_splits(
            plan.source,
            settings.model.image_size,
            folder,
            settings.data.max_bad_images,
            lambda _done, _total: advance(1),
        )
    return pixels, time.perf_counter() - start


def _results(
    plan: Plan, pixels: dict[str, Rows], data_seconds: float, folder: Path, console: Console
) -> tuple[list[Outcome], list[manifest.Artifact]]:
    training = plan.settings.training
    fractions = plan.settings.data.train_fractions
    experiment = Experiment(plan, pixels, data_seconds, folder, console)
    outcomes: list[Outcome] = []
    artifacts: list[manifest.Artifact] = []
    best = -1.0
    # an arm's results follow each other: what was compiled for the first serves the others
    for arm, fraction, seed in itertools.product(training.arms, fractions, training.seeds):
        stop_if_asked()
        outcome = experiment.result(arm, fraction, seed)
        artifacts += publishing.upload_tree(plan.store, outcome.folder)
        validated = outcome.record.metrics.validation.accuracy
        if plan.model_store is not None and validated > best:
            best_model = folder / "best"
            shutil.rmtree(best_model, ignore_errors=True)
            shutil.move(outcome.folder / outcome.record.saved_model, best_model)
            best = validated
        shutil.rmtree(outcome.folder)
        outcomes.append(outcome)
    if plan.model_store is not None:
        publishing.upload_tree(plan.model_store, folder / "best")
    schema = folder / "schema" / "manifest.schema.json"
    schema.parent.mkdir()
    schema.write_text(json.dumps(manifest.json_schema(), indent=2) + "\n", encoding="utf-8")
    artifacts += publishing.upload_tree(plan.store, schema.parent)
    outcomes.sort(key=lambda outcome: (outcome.record.train_fraction, training.seeds.index(outcome.record.seed)))
    return outcomes, sorted(artifacts, key=lambda artifact: artifact.path)


def _manifest(
    plan: Plan, pixels: dict[str, Rows], outcomes: Sequence[Outcome], artifacts: Sequence[manifest.Artifact]
) -> manifest.Manifest:
    source, machine = plan.source, plan.runtime
    splits = {
        name: manifest.Split(expression=split.expression, examples=len(pixels[name]))
        for name, split in source.splits.items()
    }
    skipped = sum(split.examples - len(pixels[name]) for name, split in source.splits.items())
    duplicates = duplicates_across_splits(pixels)
    if duplicates:
        logger.warning("%d images lie in more than one split: test accuracies may be too high", duplicates)
    return manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        run_id=plan.run_id,
        created=datetime.now(UTC),
        fingerprint=plan.fingerprint,
        settings=plan.settings.resolved() | {"run_id": plan.run_id},
        environment=manifest.Environment(
            python=platform.python_version(),
            tensorflow=tf.__version__,
            keras=keras.__version__,
            tensorflow_datasets=data.TFDS_VERSION,
            job=job.__version__,
            devices=machine.devices,
            workers=1,
            precision=machine.precision,
            xla=machine.xla,
            deterministic=machine.deterministic,
        ),
        dataset=manifest.Dataset(
            name=source.name,
            version=source.version,
            classes=source.classes,
            skipped_examples=skipped,
            duplicates_across_splits=duplicates,
            splits=manifest.Splits(**splits),
        ),
        backbone=manifest.Backbone(
            name=plan.row.name,
            image_size=plan.settings.model.image_size,
            layers=len(plan.backbone.layers),
            parameters=plan.backbone.count_params(),
            weights=manifest.Weights(source=plan.weights.source, sha256=plan.weights.sha256) if plan.weights else None,
        ),
        results=tuple(outcome.record for outcome in outcomes),
        comparisons=_comparisons(outcomes),
        artifacts=tuple(artifacts),
    )


def _comparisons(outcomes: Sequence[Outcome]) -> tuple[manifest.Comparison, ...]:
    """Compare every two arms of the same fraction and seed on the same test examples."""
    found = []
    labels = _labels([outcome.record for outcome in outcomes])
    for one, other in itertools.combinations(outcomes, 2):
        if (one.record.train_fraction, one.record.seed) != (other.record.train_fraction, other.record.seed):
            continue
        better, worse = sorted((one, other), key=lambda outcome: -outcome.record.metrics.test.accuracy)
        test = paired_test(better.test.correct, worse.test.correct)
        found.append(
            manifest.Comparison(
                train_fraction=one.record.train_fraction,
                better=better.record.arm,
                worse=worse.record.arm,
                difference=test.difference,
                interval=test.interval,
                p_value=test.p_value,
                method=f"{test.method}; seed {one.record.seed}",
                verdict=test.verdict(labels(better.record), labels(worse.record)),
            )
        )
    return tuple(found)


def _labels(results: Sequence[manifest.Result]) -> Callable[[manifest.Result], str]:
    """Return what names a result: its arm, with the fraction and the seed where ``results`` have several."""
    fractions = len({result.train_fraction for result in results}) > 1
    seeds = len({result.seed for result in results}) > 1

    def label(result: manifest.Result) -> str:
        told = [f"fraction {result.train_fraction:g}"] * fractions + [f"seed {result.seed}"] * seeds
        return f"{result.arm} ({', '.join(told)})" if told else result.arm

    return label


def _summary(record: manifest.Manifest, console: Console) -> None:
    columns = ["arm", "train", "trainable", "test accuracy", "95% interval", "test loss", "seconds", "images/s"]
    rows = []
    labels = _labels(record.results)
    for result in record.results:
        test, seconds = result.metrics.test, result.seconds.total
        low, high = test.accuracy_interval
        figures = [f"{result.train_examples:,}", f"{result.parameters.trainable:,}", f"{test.accuracy:.4f}"]
        figures += [
            f"{low:.3f} - {high:.3f}",
            f"{test.loss:.4f}",
            f"{seconds:.0f}",
            f"{result.examples_per_second:.0f}",
        ]
        price = [] if result.cost is None else [f"{result.cost:.4f}"]
        rows.append([labels(result), *figures, *price])
    dataset, backbone = record.dataset, record.backbone
    title = f"{dataset.name} {dataset.version}, {dataset.splits.test.examples:,} test examples, "
    title += f"{backbone.name} at {backbone.image_size} px"
    priced = any(result.cost is not None for result in record.results)
    console.table(title, [*columns, "cost"] if priced else columns, rows)
    for comparison in record.comparisons:
        logger.info("%s", comparison.verdict)
