"""What a run publishes beside its models: the manifest, its schema, the report, model cards and TensorBoard's files."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import keras
import numpy as np
import tensorflow as tf

import job
from job import manifest
from job.data import dataset
from job.data.duplicates import Found
from job.data.rows import Rows
from job.experiment import source_code
from job.experiment.plan import Plan
from job.manifest import SCHEMA
from job.results import event_files, model_card, report
from job.results.comparisons import comparisons, summaries, verdict
from job.storage.finished import Finished
from job.training.live_tensorboard import hparams

REPORT = "report.html"
_MODEL_CARD = "model_card.md"
_TENSORBOARD = "tensorboard"


def record(
    plan: Plan, pixels: Mapping[str, Rows], finished: Sequence[Finished], duplicates: Found
) -> manifest.Manifest:
    """Return the run's manifest, still without artifacts."""
    source, machine, network, weights = plan.source, plan.runtime, plan.network, plan.network.weights
    splits = {
        name: manifest.Split(expression=split.expression, examples=len(pixels[name]))
        for name, split in source.splits.items()
    }
    scored = [(each.result, each.hits) for each in finished]
    return manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        run_id=plan.run_id,
        created=datetime.now(UTC),
        fingerprint=plan.fingerprint,
        code=manifest.Code(
            version=job.__version__,
            digest=source_code.digest(),
            revision=plan.settings.platform.job_revision,
            image=plan.settings.platform.image,
        ),
        settings=plan.settings.resolved() | {"run_id": plan.run_id},
        environment=manifest.Environment(
            python=platform.python_version(),
            tensorflow=tf.__version__,
            keras=keras.__version__,
            tensorflow_datasets=dataset.TFDS_VERSION,
            job=job.__version__,
            devices=machine.devices,
            workers=machine.replicas.workers,
            precision=machine.precision,
            tf32=machine.tf32,
            xla=any(each.result.xla for each in finished),
            deterministic=machine.deterministic,
        ),
        dataset=manifest.Dataset(
            name=source.name,
            version=source.version,
            classes=source.classes,
            skipped_examples=sum(split.examples - len(pixels[name]) for name, split in source.splits.items()),
            duplicates_across_splits=duplicates.count,
            duplicates=duplicates.listed,
            splits=manifest.Splits(**splits),
            licence=source.licence,
            citation=source.citation,
            homepage=source.homepage,
        ),
        backbone=manifest.Backbone(
            name=network.row.name,
            image_size=plan.settings.model.image_size,
            layers=len(network.backbone.layers),
            parameters=network.backbone.count_params(),
            weights=weights and manifest.Weights(source=weights.source, sha256=weights.sha256, licence=weights.licence),
        ),
        results=tuple(each.result for each in finished),
        summaries=summaries(scored),
        verdict=verdict(scored),
        comparisons=comparisons(scored),
        artifacts=(),
    )


def write(run: manifest.Manifest, test: Rows, folder: Path) -> None:
    """Write all files that are made from the manifest to ``folder``, in the published run's layout.

    test: the decoded test photos, of which the report shows some.
    """
    _write(folder / SCHEMA, json.dumps(manifest.json_schema(), indent=2) + "\n")
    _write(folder / REPORT, report.render(run, _photos(test, report.wanted_photos(run.results))))
    finished = run.created.timestamp()
    for result in run.results:
        place = PurePosixPath(result.saved_model).parent
        _write(folder / place / _MODEL_CARD, model_card.render(run, result))
        name = place.relative_to("arms")
        of_it = folder / _TENSORBOARD / name
        told = hparams(run.settings, result.arm, result.train_fraction, result.seed)
        event_files.write(of_it, str(name), told, result.history, finished - result.seconds.total, result)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _photos(test: Rows, wanted: Sequence[str]) -> dict[str, bytes]:
    """Return those of the wanted test photos as JPEG that this worker holds."""
    place = {example: index for index, example in enumerate(test.ids)}
    index = np.array([place[example] for example in wanted if example in place], np.int64)
    index = index[test.held(index)]
    return {test.ids[i]: tf.io.encode_jpeg(pixels).numpy() for i, pixels in zip(index, test.read(index), strict=True)}
