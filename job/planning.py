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
from job import backbones, cuts, data, needs, publishing, storage
from job.arms import ARMS, Part, Phase, Recipe
from job.backbone_table import BACKBONES, BackboneRow
from job.budget import disk_left, in_memory, memory_limit
from job.errors import ConfigError, Problem
from job.model import row_dtype
from job.replicas import Replicas
from job.runtime import Runtime
from job.settings import Settings, TrainingSettings, fingerprint
from job.splits import SPLIT_VARIABLES
from job.storage import Store
from job.store import LocalStore
from job.weights import MEMBER_FILE_NAME

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run that can begin.

    backbone: with its pretrained weights where an arm needs them, truncated if asked. first_trainable: index of the
    layer of ``backbone`` where fine_tune's tail starts. cut: where its trunk ends. weights: None where only scratch
    runs. store: the run's own place. checkpoints: where its unfinished work is kept. model_store: where AIP_MODEL_DIR
    wants the best model. tensorboard: where AIP_TENSORBOARD_LOG_DIR wants the run's event files. memory, disk: what
    the run takes; empty where it is published already.
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
    checkpoints: Store
    model_store: Store | None
    tensorboard: Store | None
    memory: needs.Memory
    disk: tuple[needs.Space, ...]

    def rows_key(self) -> dict[str, Any]:
        """Return what decides rows of the frozen layers, beside the examples and the cut."""
        return _rows_key(self.settings, self.runtime, self.source, self.weights)


def phases_of(training: TrainingSettings) -> dict[str, tuple[Phase, ...]]:
    """Return the phases of every arm that runs."""
    rates = training.learning_rate, training.fine_tune_learning_rate
    recipe = Recipe(training.epochs, training.resolved_head_epochs, *rates)
    return {arm: ARMS[arm].phases(recipe) for arm in training.arms}


def make(settings: Settings, machine: Runtime, folder: Path) -> Plan:
    """Check places, backbone, weights and data, in order of cost, and return what was found.

    folder: local scratch space for a weights file that has to be fetched. Raises ConfigError with every problem
    found; a data set that would have to be prepared first is only looked at when nothing else is wrong.
    """
    problems: list[Problem] = []
    places = outline = model = source = None
    try:
        places = _open_places(settings)
    except ConfigError as error:
        problems.extend(error.problems)
    try:
        outline = _outline(settings)
        # before anything large is built; the batch follows when it is known how many examples there are
        _check_memory(_memory(settings, machine, *outline, 2, 0))
        model = _load_backbone(settings, machine, folder)
    except ConfigError as error:
        problems.extend(error.problems)
    try:
        source = _open_source(settings, machine.replicas, prepare=not problems)
    except ConfigError as error:
        problems.extend(error.problems)
    if problems or places is None or outline is None or model is None or source is None:
        raise ConfigError(problems)
    if problems := _too_many_replicas(settings, machine.replicas, source):
        raise ConfigError(problems)
    (backbone, loaded), (_, first_trainable) = model, outline
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
    machine.replicas.agree("TF_CONFIG", "the fingerprint of settings, data, weights and versions", mark[:12])
    run_id = settings.output.run_id or f"{source.name.replace('/', '-')}-{settings.model.backbone}-{mark[:12]}"
    store, checkpoints = places.output.child(run_id), places.checkpoints_of(run_id)
    kept = _kept_rows(settings, folder, _rows_key(settings, machine, source, loaded))
    batch = -(-min(settings.training.batch_size, max(2, source.splits["train"].examples)) // settings.workers)
    memory = _memory(settings, machine, backbone, first_trainable, batch, sum(_held(source, settings).values()))
    cut = _choose_cut(settings, machine, source, backbone, first_trainable, folder, kept, memory)
    disk = _disk(settings, folder, source, backbone, cut, kept, (store, checkpoints, places.model))
    memory = replace(memory, files=needs.files_in_memory(disk))
    if publishing.read_manifest(store) is None:
        _check_memory(memory)
        if problems := needs.disk_problems(disk):
            raise ConfigError(problems)
        if memory.is_tight:
            logger.warning(
                "the run takes about %s of the %s of memory that it may use: if it is killed, give a smaller "
                "TRANSFER_BATCH_SIZE, or more memory", needs.gigabytes(memory.needed), needs.gigabytes(memory.limit),
            )  # fmt: skip
    return Plan(
        settings, machine, source, BACKBONES[settings.model.backbone], backbone, first_trainable, cut, loaded,
        mark, run_id, store, checkpoints, places.model, places.tensorboard and places.tensorboard.child(run_id),
        memory, disk,
    )  # fmt: skip


def _rows_key(
    settings: Settings, machine: Runtime, source: data.Source, weights: backbones.LoadedWeights | None
) -> dict[str, Any]:
    model, row, replicas = settings.model, BACKBONES[settings.model.backbone], machine.replicas
    return {
        "dataset": source.name,
        "share": f"{replicas.worker + 1}-of-{replicas.workers}",
        "data": source.identity,
        "image_size": model.image_size,
        "backbone": row.name,
        "truncate_at": model.truncate_at,
        "preprocessing": row.module,
        "weights": weights.sha256 if weights else None,
        "precision": machine.precision,
        "device": "GPU" if machine.gpu else "CPU",
        "versions": {"job": job.__version__, "tensorflow": tf.__version__, "keras": keras.__version__},
    }


def _memory(
    settings: Settings, machine: Runtime, backbone: keras.Model, first_trainable: int, batch: int, examples: int
) -> needs.Memory:
    training = settings.training
    return needs.memory(
        backbone, first_trainable, phases_of(training), training.optimizer, batch, examples, memory_limit(),
        gpu=machine.gpu, augmented=training.augmentation != "none",
    )  # fmt: skip


def _check_memory(memory: needs.Memory) -> None:
    if (problem := memory.problem()) is not None:
        raise ConfigError([problem])


def _kept_rows(settings: Settings, folder: Path, key: dict[str, Any]) -> dict[tuple[str, str], int]:
    return needs.kept_rows(Path(settings.runtime.cache_dir or folder) / "features", key)


def _disk(
    settings: Settings, folder: Path, source: data.Source, backbone: keras.Model, cut: cuts.Candidate,
    kept: dict[tuple[str, str], int], stores: tuple[Store, Store, Store | None],
) -> tuple[needs.Space, ...]:  # fmt: skip
    """Return what is written to local disks. The first place is the scratch space."""
    training = settings.training
    phases = phases_of(training)
    row_bytes = {}
    if settings.runtime.feature_cache == "auto" and any(ARMS[arm].pretrained for arm in phases):
        row_bytes[cuts.POOLED] = 4 * int(backbone.output_shape[-1])
        if cut.operation is not None and any(p.trains is Part.TAIL for each in phases.values() for p in each):
            row_bytes[cut.name] = cut.row_bytes
    pixels = rows = again = 0
    for name, held in _held(source, settings).items():
        pixels += held * settings.model.image_size**2 * 3
        rows += sum(held * size for at, size in row_bytes.items() if (at, name) not in kept)
        again += sum(held * size for at, size in row_bytes.items() if (at, name) in kept)
    model = needs.bytes_of_model(backbone)
    results = len(training.arms) * len(training.seeds) * len(settings.data.train_fractions)
    scratch = "TRANSFER_CACHE_DIR"
    places = [
        needs.Space(scratch, folder, pixels, "decoded images"),
        needs.Space(scratch, folder, rows, "rows of frozen layers", again),
        needs.Space(scratch, folder, needs.COPIES_IN_SCRATCH * model, "a model and a checkpoint"),
    ]
    # finished results are stored first, and copied to their places when all are
    published = 2 * results * model
    there = sum(stored.bytes for stored in stores[0].list().values()) if isinstance(stores[0], LocalStore) else 0
    sizes = (max(0, published - there), there), (needs.COPIES_IN_CHECKPOINTS * model, 0), (model, 0)
    for store, (size, kept_size), what in zip(stores, sizes, ("models", "checkpoints", "the best model"), strict=True):
        if isinstance(store, LocalStore):
            places.append(needs.Space(store.variable, Path(store.uri), size, what, kept_size))
    return tuple(places)


def _choose_cut(
    settings: Settings, machine: Runtime, source: data.Source, backbone: keras.Model, first_trainable: int,
    folder: Path, kept: dict[tuple[str, str], int], memory: needs.Memory,
) -> cuts.Candidate:  # fmt: skip
    training, examples = settings.training, sum(_held(source, settings).values())
    other = settings.model.image_size**2 * 3 + 4 * backbone.output_shape[-1]
    # rows that are kept from an earlier run take no room again: with them, the choice is the same as it was then
    room = disk_left(folder) + sum(kept.values())
    if in_memory(folder):
        room = min(room, memory.limit - memory.needed - needs.COPIES_IN_SCRATCH * needs.bytes_of_model(backbone))
    means = cuts.Means(
        epochs=(training.epochs - training.resolved_head_epochs)
        * len(training.seeds)
        * len(settings.data.train_fractions),
        examples=examples,
        disk=room - examples * other,
        memory=memory_limit(),
        flops_per_second=cuts.FLOPS_OF_GPU if machine.gpu else machine.cores * cuts.FLOPS_PER_CORE,
    )
    found = cuts.candidates(backbone, first_trainable, row_dtype().itemsize)
    chosen = cuts.choose(found, means)
    if training.augmentation != "none":
        logger.info(
            "photos are changed at random in every step (TRANSFER_AUGMENTATION=%s): frozen layers run in each",
            training.augmentation,
        )
    elif "fine_tune" in training.arms and settings.runtime.feature_cache == "auto":
        logger.info(
            "fine_tune trains on rows at %s: %s bytes each, %s MB in all", chosen.name, f"{chosen.row_bytes:,}",
            f"{chosen.row_bytes * examples / 1e6:,.0f}", extra={"cut": chosen.name, "row_bytes": chosen.row_bytes},
        )  # fmt: skip
    return chosen


@dataclass(frozen=True)
class _Places:
    """Where things go. checkpoints: None where they lie under the run itself."""

    output: Store
    checkpoints: Store | None
    model: Store | None
    tensorboard: Store | None

    def checkpoints_of(self, run_id: str) -> Store:
        if self.checkpoints is None:
            return self.output.child(run_id).child("checkpoints")
        # not the run's own name: what lies there is removed, and the place may be that of the runs
        return self.checkpoints.child(f"{run_id}.checkpoints")


def _open_places(settings: Settings) -> _Places:
    """Open and probe every place that is written to, and report all that is wrong with them together."""
    output, on_platform = settings.output, settings.platform
    checkpoints = output.checkpoint_uri or on_platform.checkpoint_dir
    variable = "TRANSFER_CHECKPOINT_URI" if output.checkpoint_uri else "AIP_CHECKPOINT_DIR"
    problems: list[Problem] = []

    def opened(uri: str | None, variable: str) -> Store | None:
        if uri is None:
            return None
        try:
            store = storage.open_store(uri, variable)
            store.probe()
        except ConfigError as error:
            problems.extend(error.problems)
            return None
        return store

    store = opened(output.output_uri, "TRANSFER_OUTPUT_URI")
    places = (
        opened(checkpoints, variable),
        opened(on_platform.model_dir, "AIP_MODEL_DIR"),
        opened(on_platform.tensorboard_log_dir, "AIP_TENSORBOARD_LOG_DIR"),
    )
    if store is None or problems:
        raise ConfigError(problems)
    return _Places(store, *places)


def _outline(settings: Settings) -> tuple[keras.Model, int]:
    """Return the backbone without values in its variables, and where fine_tune starts: a network of 1.4 GB takes 7 MB.

    Raises:
        ConfigError: it has no layer of a name that is asked for.
    """
    model, row = settings.model, BACKBONES[settings.model.backbone]
    with keras.StatelessScope(initialize_variables=False):
        backbone = backbones.build(row, model.image_size)
        shortened = backbones.truncate(backbone, model.truncate_at) if model.truncate_at else backbone
    return shortened, backbones.first_trainable(shortened, settings.training.fine_tune_from or row.fine_tune_from)


def _open_source(settings: Settings, replicas: Replicas, *, prepare: bool) -> data.Source:
    """Open the data set, first on the chief: where it has to be prepared, two would write to one folder."""
    if not replicas.is_chief:
        replicas.gather(b"")
    source = data.open_source(settings.data, prepare=prepare)
    if replicas.is_chief:
        replicas.gather(b"")
    return source


def _too_many_replicas(settings: Settings, replicas: Replicas, source: data.Source) -> list[Problem]:
    """Return what is wrong with settings under which a device or a worker would have nothing to do."""
    found = []
    if settings.training.batch_size < replicas.count:
        message = (
            f"received {settings.training.batch_size} for {replicas.count} devices; give at least one example each"
        )
        found.append(Problem("TRANSFER_BATCH_SIZE", message))
    for name, split in source.splits.items():
        if split.examples < replicas.workers:
            message = (
                f"{split.expression!r} has {split.examples} examples for {replicas.workers} workers; take more of it"
            )
            found.append(Problem(SPLIT_VARIABLES[name], message))
    return found


def _held(source: data.Source, settings: Settings) -> dict[str, int]:
    """Return how many examples of each split a worker reads, whether or not the others are there yet."""
    return {name: -(-split.examples // settings.workers) for name, split in source.splits.items()}


def _load_backbone(
    settings: Settings, machine: Runtime, folder: Path
) -> tuple[keras.Model, backbones.LoadedWeights | None]:
    model, row = settings.model, BACKBONES[settings.model.backbone]
    with machine.replicas.scope():
        backbone = backbones.build(row, model.image_size)
    shortened = backbones.truncate(backbone, model.truncate_at) if model.truncate_at else backbone
    if not any(ARMS[arm].pretrained for arm in settings.training.arms):
        return shortened, None
    home = Path(settings.platform.keras_home).expanduser() if settings.platform.keras_home else None
    weights = model.weights
    if weights != "imagenet":
        weights = str(storage.fetch(weights, folder, "TRANSFER_WEIGHTS"))
    loaded = backbones.load_weights(
        backbone, row, model.image_size, weights, _package_cache(home, folder), model.weights_sha256, home
    )
    if model.weights != "imagenet":
        loaded = replace(loaded, source=storage.public_uri(model.weights))
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
