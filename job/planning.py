"""Everything that can be checked before training, and what the run then rests on."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import job
from job import backbones, data, storage
from job.arms import ARMS
from job.backbone_table import BACKBONES, BackboneRow
from job.errors import ConfigError, Problem
from job.runtime import Runtime
from job.settings import Settings, fingerprint
from job.storage import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run that can begin.

    backbone: with its pretrained weights where an arm needs them, truncated if asked. first_trainable: index of the
    layer of ``backbone`` where fine_tune's tail starts. weights: None where only scratch runs. store: the run's own
    place. model_store: where AIP_MODEL_DIR wants the best model.
    """

    settings: Settings
    runtime: Runtime
    source: data.Source
    row: BackboneRow
    backbone: keras.Model
    first_trainable: int
    weights: backbones.LoadedWeights | None
    fingerprint: str
    run_id: str
    store: Store
    model_store: Store | None


def make(settings: Settings, machine: Runtime, folder: Path) -> Plan:
    """Check places, backbone, weights and data, in order of cost, and return what was found.

    folder: local scratch space for a weights file that has to be fetched. Raises ConfigError with every problem
    found; a data set that would have to be prepared first is only looked at when nothing else is wrong.
    """
    problems: list[Problem] = []
    store = model_store = model = source = None
    try:
        store, model_store = _open_places(settings)
    except ConfigError as error:
        problems.extend(error.problems)
    try:
        model = _load_backbone(settings, folder)
    except ConfigError as error:
        problems.extend(error.problems)
    try:
        source = data.open_source(settings.data, prepare=not problems)
    except ConfigError as error:
        problems.extend(error.problems)
    if problems or store is None or model is None or source is None:
        raise ConfigError(problems)
    backbone, first_trainable, loaded = model
    mark = fingerprint(
        {
            "settings": settings.deciding(),
            "precision": machine.precision,
            "xla": machine.xla,
            "data": source.identity,
            "weights": loaded.sha256 if loaded else None,
            "versions": {"job": job.__version__, "tensorflow": tf.__version__, "keras": keras.__version__},
        }
    )
    run_id = settings.output.run_id or f"{source.name.replace('/', '-')}-{settings.model.backbone}-{mark[:12]}"
    return Plan(
        settings, machine, source, BACKBONES[settings.model.backbone], backbone, first_trainable, loaded,
        mark, run_id, store.child(run_id), model_store,
    )  # fmt: skip


def _open_places(settings: Settings) -> tuple[Store, Store | None]:
    store = storage.open_store(settings.output.output_uri, "TRANSFER_OUTPUT_URI")
    store.probe()
    if settings.platform.model_dir is None:
        return store, None
    model_store = storage.open_store(settings.platform.model_dir, "AIP_MODEL_DIR")
    model_store.probe()
    return store, model_store


def _load_backbone(settings: Settings, folder: Path) -> tuple[keras.Model, int, backbones.LoadedWeights | None]:
    model, row = settings.model, BACKBONES[settings.model.backbone]
    backbone = backbones.build(row, model.image_size)
    # layer names are checked before the weights, which may have to be downloaded
    shortened = backbones.truncate(backbone, model.truncate_at) if model.truncate_at else backbone
    first = backbones.first_trainable(shortened, settings.training.fine_tune_from or row.fine_tune_from)
    if not any(ARMS[arm].pretrained for arm in settings.training.arms):
        return shortened, first, None
    home = Path(settings.platform.keras_home).expanduser() if settings.platform.keras_home else None
    weights = model.weights
    if weights != "imagenet":
        weights = str(storage.fetch(weights, folder, "TRANSFER_WEIGHTS"))
    loaded = backbones.load_weights(
        backbone, row, model.image_size, weights, _package_cache(home, folder), model.weights_sha256, home
    )
    if weights != model.weights:
        loaded = replace(loaded, source=storage.public_uri(model.weights))
    for note in loaded.notes:
        logger.warning("%s", note)
    logger.info("weights of %s: %s", row.name, loaded.source, extra={"source": loaded.source, "sha256": loaded.sha256})
    return shortened, first, loaded


def _package_cache(keras_home: Path | None, folder: Path) -> Path:
    """Return Keras's folder of weights, so that a package is fetched once; ``folder`` where it cannot be written."""
    cache = (keras_home or Path.home() / ".keras") / "models"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return folder
    return cache if os.access(cache, os.W_OK) else folder


def facts(plan: Plan) -> dict[str, Any]:
    """Return what ``python -m job plan`` tells, as JSON."""
    splits = {name: split.examples for name, split in plan.source.splits.items()}
    return {
        "run_id": plan.run_id,
        "output": plan.store.uri,
        "fingerprint": plan.fingerprint,
        "devices": list(plan.runtime.devices),
        "precision": plan.runtime.precision,
        "dataset": f"{plan.source.name}:{plan.source.version}",
        "classes": len(plan.source.classes),
        "examples": splits,
        "backbone": plan.row.name,
        "weights": plan.weights.source if plan.weights else None,
        "fine_tune_from": plan.backbone.layers[plan.first_trainable].name,
        "arms": list(plan.settings.training.arms),
        "epochs": plan.settings.training.epochs,
    }
