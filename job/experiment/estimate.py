"""What a run would take: steps, seconds and money, from short measurements on this machine with a few of its photos."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.arms import ARMS, Part
from job.data import reading, row_cache
from job.data.rows import Rows, RowValues
from job.errors import ConfigError
from job.experiment import cap
from job.experiment.gpu_memory import largest_batch, too_large
from job.experiment.plan import Plan
from job.experiment.result import Experiment
from job.machine.console import Console
from job.machine.limits import gigabytes
from job.models import export
from job.models.cuts import PIXELS, POOLED
from job.models.inference import inference_batch, run_over
from job.storage import commit
from job.training.epochs import VALIDATION_CALIBRATION_ROWS
from job.training.evaluation import predict
from job.training.stages import Stage
from job.training.trainer import Trainer

# Photos that are decoded to measure with.
_PHOTOS = 64
# Batches that a pass without gradients is timed over.
_BATCHES_TIMED = 3
# Steps are taken for so long, once they are compiled.
_SECONDS_OF_STEPS = 2.0


def report(plan: Plan, folder: Path) -> dict[str, Any]:
    """Return what a run would do, need and cost, as JSON values.

    Seconds are measured: a few photos are decoded, a few steps of every phase are taken, one model is exported, and
    all is thrown away. Where the run is published already, nothing is left to do, and nothing is measured. ``spent``
    are those of lives that did not end it, ``left`` those that one more would take about.

    Args:
        plan: the checked plan; its backbone's variables are changed.
        folder: local scratch space.

    Raises:
        ConfigError: another experiment is published under the run's id, what is published is damaged, or no photo can
            be decoded.
        UnavailableError: the photos or the store cannot be read.
    """
    published = commit.existing(plan.places.run, plan.fingerprint)
    seconds = {"total": 0.0} if published else _seconds(plan, folder)
    spent = cap.Spent() if published else cap.spent_before(plan.places.checkpoints, plan.fingerprint)
    found = _facts(plan) | {
        "published": published,
        "seconds": {name: round(s, 2) for name, s in seconds.items()},
        "spent": round(spent.seconds, 2),
        "left": round(_left(seconds, spent.share), 2),
    }
    price = plan.settings.output.cost_per_hour
    return found if price is None else found | {"cost": round(seconds["total"] / 3600 * price, 4)}


def _left(seconds: Mapping[str, float], share: float) -> float:
    """Return the seconds that are left of a run whose training is done to ``share``: each life starts and decodes."""
    anew = seconds.get("start", 0.0) + seconds.get("decode", 0.0)
    return anew + (seconds["total"] - anew) * (1 - share)


def _facts(plan: Plan) -> dict[str, Any]:
    """Return what is known of a run without measuring, as JSON values: sizes in bytes, ``steps`` of each arm in all."""
    settings, source, machine = plan.settings, plan.source, plan.runtime
    training, fractions = settings.training, settings.data.train_fractions
    batches = sum(-(-plan.train_examples(fraction) // training.batch_size) for fraction in fractions)
    scratch = plan.disk[0]
    return {
        "run_id": plan.run_id,
        "output": plan.places.run.uri,
        "checkpoints": plan.places.checkpoints.uri,
        "fingerprint": plan.fingerprint,
        "workers": settings.workers,
        "devices": list(machine.devices),
        "device_proof": machine.proof,
        "precision": machine.precision,
        "tf32": machine.tf32,
        "xla": machine.xla,
        "dataset": f"{source.name}:{source.version}",
        "classes": len(source.classes),
        "examples": {name: split.examples for name, split in source.splits.items()},
        "backbone": plan.network.row.name,
        "weights": plan.network.weights.source if plan.network.weights else None,
        "fine_tune_from": plan.network.backbone.layers[plan.network.first_trainable].name,
        **_stepped(plan),
        "arms": list(training.arms),
        "epochs": training.epochs,
        "fractions": list(fractions),
        "seeds": list(training.seeds),
        "results": len(training.arms) * len(fractions) * len(training.seeds),
        "steps": dict.fromkeys(training.arms, batches * training.epochs * len(training.seeds)),
        "disk": {"needed": scratch.needed, "free": scratch.free, "limited_by": scratch.limited_by},
        "memory": {
            "needed": plan.memory.needed,
            "limit": plan.memory.limit,
            "files": plan.memory.in_files,
            "decoding": plan.memory.decoding,
        },
        "gpu_memory": {"needed": plan.gpu_memory.needed, "limit": plan.gpu_memory.limit} if machine.gpu else None,
    }


def _stepped(plan: Plan) -> dict[str, Any]:
    """Return what fine_tune's steps are taken on: augmented photos have no rows of frozen layers."""
    if plan.settings.training.augmentation != "none":
        return {"cut": PIXELS, "row_bytes": plan.settings.model.image_size**2 * 3}
    return {"cut": plan.network.cut.name, "row_bytes": plan.network.cut.row_bytes}


def rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what :func:`report` found as a table for people, in their order of reading: what, and its value."""
    examples, memory, disk = found["examples"], found["memory"], found["disk"]
    yield "run", found["run_id"]
    yield "published to", found["output"]
    yield "unfinished work in", found["checkpoints"]
    yield "data", f"{found['dataset']}, {found['classes']} classes"
    yield "images", ", ".join(f"{count:,} {split}" for split, count in examples.items())
    yield "backbone", found["backbone"]
    yield "weights", found["weights"] or "random values: only scratch runs"
    yield "device", ", ".join(found["devices"])
    yield "device proven", found["device_proof"]
    if found["workers"] > 1:
        yield "workers", f"{found['workers']}; times are those of one alone, disk and memory of each"
    told = {"off": "without XLA", "auto": "with XLA where training finds it faster", "on": "with XLA"}[found["xla"]]
    yield "precision", f"{found['precision']}{' (TF32)' if found['tf32'] else ''}, {told}"
    yield "arms", ", ".join(found["arms"])
    if "fine_tune" in found["arms"]:
        yield "fine_tune trains from", found["fine_tune_from"]
        yield "on rows at", f"{found['cut']}, {found['row_bytes']:,} bytes each"
    several = [f"{len(found[name])} {name}" for name in ("arms", "fractions", "seeds") if len(found[name]) > 1]
    yield "results", f"{found['results']}{f' ({chr(215).join(several)})' if len(several) > 1 else ''}"
    yield "epochs of each", str(found["epochs"])
    by = f" by {disk['limited_by']}" if disk["limited_by"] else ""
    yield "disk", f"{gigabytes(disk['needed'])} needed, {gigabytes(disk['free'])} free{by}"
    of_it = f"{gigabytes(memory['files'])} of it for files in memory (tmpfs), " if memory["files"] else ""
    yield "memory", f"{gigabytes(memory['needed'])} needed, {of_it}{gigabytes(memory['limit'])} may be used"
    yield "memory of decoding", f"{gigabytes(memory['decoding'])} at most, before training takes it"
    if on_gpu := found["gpu_memory"]:
        yield "GPU memory", f"{gigabytes(on_gpu['needed'])} needed, {gigabytes(on_gpu['limit'])} may be used"
    if found["published"]:
        yield "already published", "yes: run would verify it and end"
        return
    for name, seconds in found["seconds"].items():
        steps = f"{found['steps'][name]:,} steps, " if name in found["steps"] else ""
        yield f"time {'in all' if name == 'total' else 'of ' + name}", f"{steps}{duration(seconds)}"
    if found["spent"]:
        yield "spent before", f"{duration(found['spent'])}; about {duration(found['left'])} are left"
    if "cost" in found:
        yield "cost", f"{found['cost']:.2f}"


def duration(seconds: float) -> str:
    """Return seconds for people: ``45 s``, ``12 min``, ``3 h 20 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class _Pace:
    """Seconds for each image in one phase, once compiled.

    step: of training. forward: of a pass without gradients. recalibration: of one that re-estimates BatchNorm
    statistics; 0 where there are none to estimate.
    """

    epochs: int
    step: float
    forward: float
    recalibration: float


@dataclass(frozen=True)
class _Measured:
    """What one arm was seen to take in seconds.

    setting_up: of building and compiling, once a run. whole: for each image of a pass over the whole network.
    """

    setting_up: float
    whole: float
    paces: tuple[_Pace, ...]

    def training(self, train: int, validation: int) -> float:
        """Return the seconds of training one result on ``train`` examples."""
        calibrated = min(VALIDATION_CALIBRATION_ROWS, train)
        return sum(
            pace.epochs * (train * pace.step + validation * pace.forward + calibrated * pace.recalibration)
            for pace in self.paces
        )

    def evaluation(self, train: int, validation: int, test: int) -> float:
        """Return the seconds of evaluating one result; its test split is seen twice where BatchNorm was trained."""
        last = self.paces[-1]
        seen = train + validation + test * (2 if last.recalibration else 1)
        return seen * last.forward + train * last.recalibration


def _seconds(plan: Plan, folder: Path) -> dict[str, float]:
    """Return the seconds of each part of a run, and of all together.

    The start of the process is what it has computed for until now. For three arms of MobileNetV2 at 160 px, 480 photos
    and 3 epochs, on two cores whose other work came and went, four estimates were 162 to 261 s, and three runs took 246
    to 268 s.
    """
    start = time.process_time()
    settings, source = plan.settings, plan.source
    sample, decoded = reading.first_rows(source, "train", _PHOTOS, settings.model.image_size, folder, plan.decoding)
    if not len(sample):
        raise ConfigError.of("TRANSFER_TRAIN_SPLIT", f"none of its first {_PHOTOS} images can be decoded")
    # rows that are kept from earlier runs are neither taken for those of these photos nor replaced by them
    apart = settings.runtime.model_copy(update={"cache_dir": None})
    trial = replace(plan, settings=replace(settings, runtime=apart))
    with _quiet():
        experiment = Experiment(trial, dict.fromkeys(source.splits, sample), 0.0, folder, Console(None))
        arms: dict[str, _Measured] = {}
        for arm in map(str, settings.training.arms):
            known = next((measured.whole for measured in arms.values()), None)
            arms[arm] = _measure(trial, experiment, arm, sample, known)
        first, further = _measure_export(trial, experiment, folder, sample)
    train, validation, test = (source.splits[name].examples for name in ("train", "validation", "test"))
    features, traced = _features(plan, arms, len(sample))
    seconds = {"start": start, "decode": (train + validation + test) / decoded, "features": features}
    evaluation = 0.0
    for arm, measured in arms.items():
        seconds[arm] = max(0.0, measured.setting_up - traced.get(arm, 0.0))
        for fraction in settings.data.train_fractions:
            examples, seeds = plan.train_examples(fraction), len(settings.training.seeds)
            seconds[arm] += seeds * measured.training(examples, validation)
            evaluation += seeds * measured.evaluation(examples, validation, test)
    results = len(arms) * len(settings.data.train_fractions) * len(settings.training.seeds)
    seconds |= {"evaluation": evaluation, "export": first + (results - 1) * further}
    return seconds | {"total": sum(seconds.values())}


def _measure(plan: Plan, experiment: Experiment, name: str, sample: Rows, known: float | None) -> _Measured:
    """Take a few steps and passes in every phase of an arm.

    known: seconds for each image of a pass over the whole network, where they are known from another arm.
    """
    training, few = plan.settings.training, np.arange(len(sample))
    batch = min(training.batch_size, plan.source.splits["train"].examples)
    begin = time.perf_counter()
    trainer, stages = experiment.prepare(ARMS[name], np.resize(few, batch), training.seeds[0])
    setting_up = time.perf_counter() - begin
    paces = []
    for stage in stages:
        # the real step at the full batch: what has no memory for it is found out here, not after hours
        with too_large(batch, partial(_largest, trainer, stage, few, batch)):
            pace, compiling = _measure_stage(trainer, stage, few, batch)
        paces.append(pace)
        setting_up += compiling
    whole = paces[-1].forward if stages[-1].cut.at_pixels else known
    if whole is None:
        classifier = trainer.classifier
        whole, _ = _pass(classifier.inference(classifier.cut(Part.ALL)), sample.values, few)
    return _Measured(setting_up, whole, tuple(paces))


def _largest(trainer: Trainer, stage: Stage, few: npt.NDArray[np.int64], batch: int) -> int:
    """Return the largest batch, below ``batch``, on which a step of ``stage`` finds memory; 0 where none does."""

    def fits(some: int) -> bool:
        feeder, steps = trainer.feeder(stage), trainer.steps(stage)
        try:
            steps(feeder.read([np.resize(few, some)]), 0, 0)
            steps.sums()
        except tf.errors.ResourceExhaustedError:
            return False
        return True

    return largest_batch(fits, batch)


def _features(plan: Plan, arms: Mapping[str, _Measured], sample: int) -> tuple[float, dict[str, float]]:
    """Return the seconds of running the frozen layers once, and what of it is in an arm's ``setting_up``, by arm."""
    runtime = plan.settings.runtime
    first = next((arm for arm in arms if ARMS[arm].pretrained), None)
    if first is None or runtime.feature_cache == "off":
        return 0.0, {}
    kept = row_cache.kept_rows(row_cache.folder_in(runtime.cache_dir), plan.rows_key) if runtime.cache_dir else {}
    splits = plan.source.splits
    missing = sum(split.examples for name, split in splits.items() if (POOLED, name) not in kept)
    return missing * arms[first].whole, {first: len(splits) * sample * arms[first].whole}


def _measure_stage(trainer: Trainer, stage: Stage, few: npt.NDArray[np.int64], batch: int) -> tuple[_Pace, float]:
    """Return what an image takes in one phase, and the seconds of compiling it."""
    run = trainer.phase_run(stage, trainer.steps(stage), 0)
    begin = time.perf_counter()
    run.steps_over(np.resize(few, batch), lambda _: None)
    first = compiled = time.perf_counter()
    while run.done < 2 or time.perf_counter() - compiled < _SECONDS_OF_STEPS:
        run.steps_over(np.resize(few, run.per_call * batch), lambda _: None)
    step = 1 / run.examples_per_second
    compiling = max(0.0, first - begin - batch * step)
    forward, once = _pass(trainer.classifier.inference(stage.cut), stage.validation.values, few)
    compiling += once
    recalibration = 0.0
    recalibrator = trainer.recalibrator(stage) if stage.phase.trains_batch_norm else None
    if recalibrator is not None:
        begin = time.perf_counter()
        recalibrator.recalibrate(stage.train, np.resize(few, batch), batch)
        traced = time.perf_counter()
        recalibrator.recalibrate(stage.train, np.resize(few, batch), batch)
        again = time.perf_counter() - traced
        recalibration = again / batch
        compiling += max(0.0, traced - begin - again)
    return _Pace(stage.phase.epochs, step, forward, recalibration), compiling


def _pass(
    function: Callable[[tf.Tensor], tf.Tensor], values: RowValues, few: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """Return the seconds of a pass for each image, and those of compiling it."""
    batch = inference_batch(values.shape[1:])
    begin = time.perf_counter()
    run_over(function, values, np.resize(few, batch))
    compiled = time.perf_counter()
    run_over(function, values, np.resize(few, _BATCHES_TIMED * batch))
    image = (time.perf_counter() - compiled) / (_BATCHES_TIMED * batch)
    return image, max(0.0, compiled - begin - batch * image)


def _measure_export(plan: Plan, experiment: Experiment, folder: Path, sample: Rows) -> tuple[float, float]:
    """Return the seconds of exporting the first model of a run, and any further one."""
    training = plan.settings.training
    trainer, stages = experiment.prepare(ARMS[training.arms[-1]], np.arange(len(sample)), training.seeds[0])
    predicted = predict(trainer.classifier, stages[-1].cut, stages[-1].validation)
    exporter = export.Exporter(plan.source.classes)
    some = sample.values[: export.PROOF_EXAMPLES]
    times = []
    for name in ("first", "further"):
        begin = time.perf_counter()
        exporter.export(trainer.classifier, folder / "trial" / name)
        export.prove(folder / "trial" / name, some, predicted.probabilities[: len(some)], plan.runtime.arithmetic)
        times.append(time.perf_counter() - begin)
    return times[0], times[1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what trials would tell of themselves, as if they were the run."""
    told = logging.getLogger("job")
    level = told.level
    told.setLevel(logging.ERROR)
    try:
        yield
    finally:
        told.setLevel(level)
