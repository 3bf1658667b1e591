"""Everything that can be checked before training, and what the run then rests on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from job.arms import Part
from job.backbone_table import BACKBONES
from job.data import row_cache
from job.data.dataset import Source, open_source
from job.data.decoding import Room
from job.data.reading import decoding_at_full_speed
from job.data.splits import SPLIT_VARIABLES
from job.errors import ConfigError, Problem
from job.experiment import disk, memory, source_code
from job.experiment.gpu_memory import GpuMemory, gpu_memory
from job.experiment.network import Network, load_backbone, outline
from job.experiment.places import Places, open_places
from job.machine.limits import gigabytes, in_memory, memory_limit
from job.machine.replicas import Replicas
from job.machine.runtime import Runtime
from job.models import cuts
from job.models.classifier import row_dtype
from job.settings.environment import Settings, fingerprint
from job.storage.commit import read_manifest
from job.training.stages import phases_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that can begin.

    rows_key: what decides rows of the frozen layers, beside the examples and the cut. memory, gpu_memory, disk: what
    the run takes, and of disks what was free before it began; the first has its scratch space.
    """

    settings: Settings
    runtime: Runtime
    source: Source
    network: Network
    fingerprint: str
    run_id: str
    places: Places
    rows_key: Mapping[str, Any]
    memory: memory.Memory
    gpu_memory: GpuMemory
    disk: tuple[disk.Disk, ...]

    @property
    def decoding(self) -> Room:
        """Return what decoding may take."""
        return Room(self.runtime.cores, self.memory.decoding, self.memory.one_photo)

    def train_examples(self, fraction: float) -> int:
        """Return about how many examples a result at ``fraction`` trains on; classes are rounded one by one."""
        return max(1, round(fraction * self.source.splits["train"].examples))


def make_plan(settings: Settings, machine: Runtime, folder: Path) -> Plan:
    """Check places, backbone, weights and data, in order of cost, and return what was found.

    folder: local scratch space for a weights file that has to be fetched. Raises ConfigError with every problem
    found; a data set that would have to be prepared first is only looked at when nothing else is wrong.
    """
    problems: list[Problem] = []
    opened = outlined = model = source = None
    try:
        opened = open_places(settings)
    except ConfigError as error:
        problems.extend(error.problems)
    try:
        outlined = outline(settings)
        # before anything large is built; the batch follows when it is known how many examples there are
        _check_memory(_memory(settings, machine, *outlined, batch=2, examples=0))
        model = load_backbone(settings, machine, folder)
    except ConfigError as error:
        problems.extend(error.problems)
    try:
        source = _open_source(settings, machine.replicas, prepare=not problems)
    except ConfigError as error:
        problems.extend(error.problems)
    if problems or opened is None or outlined is None or model is None or source is None:
        raise ConfigError(problems)
    if problems := _too_few_examples(settings, machine.replicas, source):
        raise ConfigError(problems)
    (backbone, weights), (_, first_trainable) = model, outlined
    identity = {
        "data": source.identity,
        "weights": weights.sha256 if weights else None,
        "versions": {"job": source_code.digest(), "tensorflow": tf.__version__, "keras": keras.__version__},
    }
    mark = fingerprint({**_arithmetic(machine), "settings": settings.deciding(), **identity})
    machine.replicas.agree("TF_CONFIG", "the fingerprint of settings, data, weights and versions", mark[:12])
    run_id = settings.output.run_id or f"{source.name.replace('/', '-')}-{settings.model.backbone}-{mark[:12]}"
    places = opened.of(run_id)
    rows_key = _rows_key(settings, machine, source, identity)
    kept = row_cache.kept_rows(row_cache.folder_in(settings.runtime.cache_dir or folder), rows_key)
    held = _held(source, settings)
    batch = -(-min(settings.training.batch_size, max(2, source.splits["train"].examples)) // settings.workers)
    taken = _memory(settings, machine, backbone, first_trainable, batch=batch, examples=sum(held.values()))
    taken = replace(taken, photos=decoding_at_full_speed(source, machine.cores))
    on_gpu = _gpu_memory(settings, machine, backbone, first_trainable, batch)
    cut = _choose_cut(settings, machine, held, backbone, first_trainable, folder, kept, taken, places)
    spaces = disk.spaces(settings, folder, held, backbone, cut, kept, places)
    taken = replace(taken, files=disk.files_in_memory(spaces))
    found = disk.disks(spaces)
    if read_manifest(places.run) is None:
        _check_memory(taken)
        _check_memory(on_gpu)
        if problems := [problem for each in found if (problem := each.problem())]:
            raise ConfigError(problems)
        if taken.is_tight:
            logger.warning(
                "the run takes about %s of the %s of memory that it may use: if it is killed, give a smaller "
                "TRANSFER_BATCH_SIZE, or more memory", gigabytes(taken.needed), gigabytes(taken.limit),
            )  # fmt: skip
    return Plan(
        settings=settings,
        runtime=machine,
        source=source,
        network=Network(
            row=BACKBONES[settings.model.backbone],
            backbone=backbone,
            first_trainable=first_trainable,
            cut=cut,
            weights=weights,
        ),
        fingerprint=mark,
        run_id=run_id,
        places=places,
        rows_key=rows_key,
        memory=taken,
        gpu_memory=on_gpu,
        disk=tuple(found),
    )


def _arithmetic(machine: Runtime) -> dict[str, Any]:
    """Return what is known before training of how the machine computes. TF32 has 10 bits where float32 has 23."""
    known: dict[str, Any] = {"precision": machine.precision, "xla": machine.xla == "on"}
    return known | {"tf32": True} if machine.arithmetic == "tf32" else known


def _rows_key(settings: Settings, machine: Runtime, source: Source, identity: Mapping[str, Any]) -> dict[str, Any]:
    model, row, replicas = settings.model, BACKBONES[settings.model.backbone], machine.replicas
    return {
        "dataset": source.name,
        "share": f"{replicas.worker + 1}-of-{replicas.workers}",
        "image_size": model.image_size,
        "backbone": row.name,
        "truncate_at": model.truncate_at,
        "preprocessing": row.module,
        "precision": machine.arithmetic,
        "device": "GPU" if machine.gpu else "CPU",
        **identity,
    }


def _memory(
    settings: Settings, machine: Runtime, backbone: keras.Model, first_trainable: int, *, batch: int, examples: int
) -> memory.Memory:
    training = settings.training
    return memory.memory_needed(
        backbone, first_trainable, phases_of(training), training.optimizer, batch, examples, memory_limit(),
        gpu=machine.gpu, augmented=training.augmentation != "none",
    )  # fmt: skip


def _gpu_memory(
    settings: Settings, machine: Runtime, backbone: keras.Model, first_trainable: int, batch: int
) -> GpuMemory:
    if not machine.gpu:
        return GpuMemory()
    training = settings.training
    phases = phases_of(training)
    whole = any(phase.trains is Part.ALL for some in phases.values() for phase in some)
    tail = any(phase.trains is Part.TAIL for some in phases.values() for phase in some)
    first = 0 if whole else first_trainable if tail else len(backbone.layers)
    augmented = training.augmentation != "none"
    in_main_memory = memory.memory_needed(
        backbone, first_trainable, phases, training.optimizer, batch, examples=0, limit=0, augmented=augmented
    )
    return gpu_memory(
        cuts.bytes_of_weights(backbone.layers),
        cuts.bytes_of_weights(backbone.layers[first:]),
        memory.SLOTS[training.optimizer],
        in_main_memory.per_image,
        batch,
        machine.gpu_bytes,
        machine.replicas.local,
    )


def _check_memory(taken: memory.Memory | GpuMemory) -> None:
    if (problem := taken.problem()) is not None:
        raise ConfigError([problem])


def _choose_cut(
    settings: Settings, machine: Runtime, held: Mapping[str, int], backbone: keras.Model, first_trainable: int,
    folder: Path, kept: Mapping[tuple[str, str], int], taken: memory.Memory, places: Places,
) -> cuts.Candidate:  # fmt: skip
    training, examples = settings.training, sum(held.values())
    found = cuts.candidates(backbone, first_trainable, row_dtype().itemsize)
    # what is written beside the rows of a cut: at the pixels there are none
    other = disk.disks(disk.spaces(settings, folder, held, backbone, found[0], {}, places))[0].needed
    # rows that are kept from an earlier run take no room again: with them, the choice is the same as it was then
    room = disk.room(folder, disk.scratch_quota(settings))[0] + sum(kept.values())
    if in_memory(folder):
        room = min(room, taken.limit - replace(taken, photos=0).needed)
    means = cuts.Means(
        epochs=(training.epochs - training.resolved_head_epochs)
        * len(training.seeds)
        * len(settings.data.train_fractions),
        examples=examples,
        disk=room - other,
        memory=memory_limit(),
        flops_per_second=cuts.FLOPS_OF_GPU if machine.gpu else machine.cores * cuts.FLOPS_PER_CORE,
    )
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


def _open_source(settings: Settings, replicas: Replicas, *, prepare: bool) -> Source:
    """Open the data set, first on the chief: where it has to be prepared, two would write to one folder."""
    if not replicas.is_chief:
        replicas.gather(b"")
    source = open_source(settings.data, prepare=prepare)
    if replicas.is_chief:
        replicas.gather(b"")
    return source


def _too_few_examples(settings: Settings, replicas: Replicas, source: Source) -> list[Problem]:
    """Return what is wrong with settings under which a class, a device or a worker would have nothing to do."""
    found = []
    if settings.training.batch_size < replicas.count:
        message = (
            f"received {settings.training.batch_size} for {replicas.count} devices; give at least one example each"
        )
        found.append(Problem("TRANSFER_BATCH_SIZE", message))
    train, classes = source.splits["train"], len(source.classes)
    if train.examples < classes:
        message = f"{train.expression!r} has {train.examples} examples for {classes} classes, each of which needs one"
        found.append(Problem(SPLIT_VARIABLES["train"], f"{message}; take a larger part"))
    for name, split in source.splits.items():
        if split.examples < replicas.workers:
            message = (
                f"{split.expression!r} has {split.examples} examples for {replicas.workers} workers; take more of it"
            )
            found.append(Problem(SPLIT_VARIABLES[name], message))
    return found


def _held(source: Source, settings: Settings) -> dict[str, int]:
    """Return how many examples of each split a worker reads, whether or not the others are there yet."""
    return {name: -(-split.examples // settings.workers) for name, split in source.splits.items()}
