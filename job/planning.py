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
from job import backbones, cuts, data, storage
from job.arms import ARMS
from job.backbone_table import BACKBONES, BackboneRow
from job.budget import disk_left, memory_limit
from job.errors import ConfigError, Problem
from job.model import row_dtype
from job.runtime import Runtime
from job.settings import Settings, fingerprint
from job.storage import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run that can begin.

    backbone: with its pretrained weights where an arm needs them, truncated if asked. first_trainable: index of the
    layer of ``backbone`` where fine_tune's tail starts. cut: where its trunk ends. weights: None where only scratch
    runs. store: the run's own place. model_store: where AIP_MODEL_DIR wants the best model.
    """

    settings: Settings
    runtime: Runtime
    source: data.Source
    row: BackboneRow
    backbone: keras.Model
    first_trainable: int
    cut: cuts.Candidate
    weights: backbones.LoadedWeights | None
    fingerprint: str
    run_id: str
    store: Store
    model_store: Store | None

    def rows_key(self) -> dict[str, Any]:
        """Return what decides rows of the frozen layers, beside the examples and the cut."""
        model, source = self.settings.model, self.source
        return {
            "dataset": source.name,
            "data": source.identity,
            "image_size": model.image_size,
            "backbone": self.row.name,
            "truncate_at": model.truncate_at,
            "preprocessing": self.row.module,
            "weights": self.weights.sha256 if self.weights else None,
            "precision": self.runtime.precision,
            "device": "GPU" if self.runtime.gpu else "CPU",
            "versions": {"job": job.__version__, "tensorflow": tf.__version__, "keras": keras.__version__},
        }


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
    cut = _choose_cut(settings, machine, source, backbone, first_trainable, folder)
    return Plan(
        settings, machine, source, BACKBONES[settings.model.backbone], backbone, first_trainable, cut, loaded,
        mark, run_id, store.child(run_id), model_store,
    )  # fmt: skip


def _choose_cut(
    settings: Settings, machine: Runtime, source: data.Source, backbone: keras.Model, first_trainable: int, folder: Path
) -> cuts.Candidate:
    training, examples = settings.training, sum(split.examples for split in source.splits.values())
    means = cuts.Means(
        epochs=(training.epochs - training.resolved_head_epochs)
        * len(training.seeds)
        * len(settings.data.train_fractions),
        examples=examples,
        disk=disk_left(folder) - examples * settings.model.image_size**2 * 3,
        memory=memory_limit(),
        flops_per_second=cuts.FLOPS_OF_GPU if machine.gpu else machine.cores * cuts.FLOPS_PER_CORE,
    )
    found = cuts.candidates(backbone, first_trainable, row_dtype().itemsize)
    chosen = cuts.choose(found, means)
    if "fine_tune" in training.arms and settings.runtime.feature_cache == "auto":
        logger.info(
            "fine_tune trains on rows at %s: %s bytes each, %s MB in all", chosen.name, f"{chosen.row_bytes:,}",
            f"{chosen.row_bytes * examples / 1e6:,.0f}", extra={"cut": chosen.name, "row_bytes": chosen.row_bytes},
        )  # fmt: skip
    return chosen


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
        "cut": plan.cut.name,
        "row_bytes": plan.cut.row_bytes,
        "arms": list(plan.settings.training.arms),
        "epochs": plan.settings.training.epochs,
    }
