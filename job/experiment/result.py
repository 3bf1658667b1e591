"""One result: an (arm, train_fraction, seed) trained, evaluated and exported."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job import manifest
from job.arms import ARMS, Arm, Part
from job.data import row_cache
from job.data.row_cache import RowCache
from job.data.rows import Rows, stratified_subset
from job.errors import ConfigError
from job.experiment.gpu_memory import too_large
from job.experiment.plan import Plan
from job.machine.console import Console
from job.machine.energy import Meter
from job.models import backbones, export
from job.models.classifier import Classifier, Head
from job.models.frozen_features import Computed, Features, mean_and_deviation
from job.models.fused_batch_norm import unfuse_when_frozen
from job.models.randomness import derived_seed, initial_values
from job.stopping import stop_if_asked
from job.training.augmentation import augmenter
from job.training.checkpoints import Checkpoints
from job.training.evaluation import Predictions, predict
from job.training.live_tensorboard import Board, Told
from job.training.stages import Augmented, Stage, phases_of
from job.training.trainer import Saving, Trained, Trainer

logger = logging.getLogger(__name__)

MOST_WRONG = 12


@dataclass(frozen=True)
class Outcome:
    """A finished result: its record, what it said of the test split, and the folder with its files to upload."""

    record: manifest.Result
    test: Predictions
    folder: Path


@dataclass(frozen=True)
class _Work:
    """A trained result.

    index: int64 [n], the training rows. earlier_seconds: of training in earlier lives of the run.
    """

    index: npt.NDArray[np.int64]
    trainer: Trainer
    stages: tuple[Stage, ...]
    trained: Trained
    features_seconds: float
    earlier_seconds: float


class Experiment:
    """All results of a run: they share the decoded photos, the pretrained weights and the rows of frozen layers."""

    def __init__(
        self,
        plan: Plan,
        pixels: dict[str, Rows],
        data_seconds: float,
        folder: Path,
        console: Console,
        checkpoints: Checkpoints | None = None,
        board: Board | None = None,
    ) -> None:
        """Take the checked plan, the decoded splits and the seconds that decoding took, and local scratch space.

        checkpoints: where training is saved, and from where it goes on. board: who is told how it goes.
        """
        self._checkpoints = checkpoints
        self._board = board
        self._meter = Meter(gpu=plan.runtime.gpu)
        self._plan = plan
        self._pixels = pixels
        self._data_seconds = data_seconds
        self._folder = folder
        self._console = console
        self._pretrained = plan.network.backbone.get_weights()
        settings = plan.settings
        training = settings.training
        self._augment = augmenter(training.augmentation)
        self._phases = phases_of(training)
        phases = [phase for arm in training.arms if ARMS[arm].pretrained for phase in self._phases[arm]]
        # the head's standardisation needs pooled rows whatever the arm
        parts = [part for part in (Part.TAIL, Part.HEAD) if part is Part.HEAD or part in {p.trains for p in phases}]
        cache = None
        if settings.runtime.feature_cache == "auto":
            cache = RowCache(row_cache.folder_in(settings.runtime.cache_dir or folder))
        replicas = plan.runtime.replicas
        self._features = Features(pixels, parts, cache, plan.rows_key, console, replicas)
        self._exporter = export.Exporter(plan.source.classes)
        self._trained: tuple[Arm, Trainer] | None = None
        self._single: Classifier | None = None

    def result(self, arm_name: str, fraction: float, seed: int) -> Outcome:
        """Train, evaluate and export one result; its files are written to a folder of its own."""
        start = time.perf_counter()
        arm = ARMS[arm_name]
        logger.info("%s: fraction %g, seed %d", arm.name, fraction, seed, extra={"arm": arm.name, "seed": seed})
        where = f"arms/{arm.name}/fraction-{fraction:g}/seed-{seed}"
        told = self._board.result(where, arm.name, fraction, seed) if self._board else None
        energy = self._meter.joules()
        work = self._work(arm, fraction, seed, told)
        trained, classifier, last, index = work.trained, work.trainer.classifier, work.stages[-1], work.index
        evaluation_start = time.perf_counter()
        test, norm, metrics = self._evaluated(arm, work)
        evaluation_seconds = time.perf_counter() - evaluation_start

        stop_if_asked()
        logger.info("%s: exporting", arm.name, extra={"arm": arm.name, "seed": seed})
        export_start = time.perf_counter()
        proof = self._export(classifier, test, self._folder / "publish" / where)
        logger.info(
            "%s: the reloaded SavedModel differs by %.1e in probability", arm.name, proof.largest_probability_difference
        )
        export_seconds = time.perf_counter() - export_start

        data_seconds, self._data_seconds = self._data_seconds, 0.0  # decoding is shared: it stands at the first result
        seconds = manifest.Durations(
            data=data_seconds,
            features=work.features_seconds,
            training=trained.seconds,
            evaluation=evaluation_seconds,
            export=export_seconds,
            total=time.perf_counter() - start + data_seconds + work.earlier_seconds,
        )
        price = self._plan.settings.output.cost_per_hour
        record = manifest.Result(
            arm=arm.name,
            train_fraction=fraction,
            seed=seed,
            train_examples=len(index),
            resumed=trained.resumed,
            parameters=_parameters(classifier, last.phase.trains),
            history=trained.history,
            metrics=metrics,
            batch_norm=norm,
            most_wrong=test.most_wrong(self._classes, MOST_WRONG),
            rows=_rows_read(last),
            seconds=seconds,
            examples_per_second=_rate(trained),
            xla=trained.xla,
            energy_joules=_used(energy, self._meter.joules()) if not trained.resumed else None,
            cost=None if price is None else seconds.total / 3600 * price,
            saved_model=f"{where}/saved_model",
            export_proof=proof,
        )
        if told:
            told(trained.history, record)
        return Outcome(record, test, self._folder / "publish")

    def assist(self, arm_name: str, fraction: float, seed: int) -> None:
        """Do this worker's share of a result whose record and files are the chief's."""
        arm = ARMS[arm_name]
        self._evaluated(arm, self._work(arm, fraction, seed))

    def _work(self, arm: Arm, fraction: float, seed: int, told: Told | None = None) -> _Work:
        """Prepare and train one result."""
        start = time.perf_counter()
        index = stratified_subset(self._pixels["train"].labels, fraction, seed)
        trainer, stages = self.prepare(arm, index, seed)
        features_seconds = time.perf_counter() - start
        stop_if_asked()
        name = result_name(arm.name, fraction, seed)
        training_start = time.perf_counter()
        saving = Saving(self._checkpoints, name) if self._checkpoints else None
        with too_large(self._plan.settings.training.batch_size):
            trained = trainer.train(stages, seed, saving, told)
        earlier_seconds = max(0.0, trained.seconds - (time.perf_counter() - training_start))
        return _Work(index, trainer, stages, trained, features_seconds, earlier_seconds)

    def _evaluated(self, arm: Arm, work: _Work) -> tuple[Predictions, manifest.BatchNorm | None, manifest.Metrics]:
        """Return the predictions of the test split, what BatchNorm's statistics made of it, and all metrics."""
        logger.info("%s: evaluating", arm.name, extra={"arm": arm.name})
        last = work.stages[-1]
        test, norm = self._test(arm, work.trainer, last)
        measured = {
            name: predict(work.trainer.classifier, last.cut, rows, chosen).metrics(self._classes)
            for name, rows, chosen in (("train", last.train, work.index), ("validation", last.validation, None))
        }
        return test, norm, manifest.Metrics(**measured, test=test.metrics(self._classes))

    @property
    def _classes(self) -> Sequence[str]:
        return self._plan.source.classes

    def prepare(self, arm: Arm, index: npt.NDArray[np.int64], seed: int) -> tuple[Trainer, tuple[Stage, ...]]:
        """Return the arm's trainer, its model as it begins at ``seed``, and its phases with their rows.

        The backbone is pretrained or random, the head's values depend on the seed alone, but for the standardisation,
        which is fitted to the training rows at ``index`` (int64 [n]). One trainer is kept, the last arm's: an
        optimizer's slots are as large as the network.
        """
        fresh = self._classifier(arm, seed)
        if self._trained is None or self._trained[0] is not arm:
            self._trained = None  # frees the last arm's memory before the next takes its own
            settings, machine = self._plan.settings, self._plan.runtime
            trainer = Trainer(
                arm.name,
                fresh,
                settings.training,
                self._console,
                xla=machine.xla,
                device_bytes=self._plan.gpu_memory.for_rows if machine.gpu else None,
                results=len(settings.data.train_fractions) * len(settings.training.seeds),
            )
            self._trained = arm, trainer
        else:
            self._trained[1].classifier.set_weights(fresh)
        trainer = self._trained[1]
        classifier = trainer.classifier
        if arm.pretrained:
            pooled = self._rows(arm, classifier, Part.HEAD, "train")
            classifier.head.standardise(*mean_and_deviation(pooled, index, self._plan.runtime.replicas))
        stages = []
        for phase in self._phases[arm.name]:
            train, validation = (self._rows(arm, classifier, phase.trains, split) for split in ("train", "validation"))
            augmented = None
            if self._augment is not None:
                augmented = Augmented(classifier.from_pixels(phase.trains), self._pixels["train"], self._augment)
            stages.append(Stage(phase, classifier.cut(phase.trains), train, index, validation, augmented))
        return trainer, tuple(stages)

    def _classifier(self, arm: Arm, seed: int) -> Classifier:
        model, plan = self._plan.settings.model, self._plan
        if arm.pretrained:
            backbone = plan.network.backbone
            backbone.set_weights(self._pretrained)
        else:
            with plan.runtime.replicas.scope(), initial_values(derived_seed(seed, "backbone")):
                backbone = backbones.build(plan.network.row, model.image_size, model.truncate_at)
        with initial_values(derived_seed(seed, "head")):
            head = Head(len(self._classes), model.head_units, model.dropout)
        preprocess, replicas = backbones.preprocessing(plan.network.row), plan.runtime.replicas
        with replicas.scope():
            classifier = Classifier(
                backbone, preprocess, head, plan.network.first_trainable, plan.network.cut.operation, replicas
            )
        if plan.runtime.deterministic and plan.runtime.gpu:
            unfuse_when_frozen(classifier.batch_norms())
        return classifier

    def _rows(self, arm: Arm, classifier: Classifier, part: Part, split: str) -> Rows:
        return self._features.rows(classifier, part, split) if arm.pretrained else self._pixels[split]

    def _test(self, arm: Arm, trainer: Trainer, stage: Stage) -> tuple[Predictions, manifest.BatchNorm | None]:
        """Return the trained model's predictions of the test split.

        Where BatchNorm trained, its statistics are first re-estimated over the training rows, and stay so.
        """
        classifier = trainer.classifier
        rows = self._rows(arm, classifier, stage.phase.trains, "test")
        recalibrator = trainer.recalibrator(stage) if stage.phase.trains_batch_norm else None
        if recalibrator is None:
            return predict(classifier, stage.cut, rows), None
        raw = float(predict(classifier, stage.cut, rows).correct.mean())
        recalibrator.recalibrate(stage.train, stage.index, self._plan.settings.training.batch_size)
        test = predict(classifier, stage.cut, rows)
        recalibrated = float(test.correct.mean())
        return test, manifest.BatchNorm(test_accuracy_raw=raw, test_accuracy_recalibrated=recalibrated)

    def _export(self, classifier: Classifier, test: Predictions, target: Path) -> manifest.ExportProof:
        """Write the SavedModel and the predictions; return by how much the reloaded model differs from ``test``."""
        pixels, machine = self._pixels["test"], self._plan.runtime
        held = np.flatnonzero(pixels.held(np.arange(len(pixels))))[: export.PROOF_EXAMPLES]
        try:
            self._exporter.export(self._of_one_device(classifier), target / "saved_model")
            proof = export.prove(
                target / "saved_model", pixels.read(held), test.probabilities[held], machine.arithmetic
            )
            (target / "predictions.csv").write_text(test.to_csv(self._classes), encoding="utf-8")
        except (OSError, tf.errors.OpError) as error:
            if os.strerror(errno.ENOSPC) not in str(error):  # which is all that TensorFlow's errors say of it
                raise
            raise ConfigError.of(
                "TRANSFER_CACHE_DIR", f"the disk ran full while a SavedModel was written to {target}; give a larger one"
            ) from error
        return proof

    def _of_one_device(self, classifier: Classifier) -> Classifier:
        """Return the classifier as it is saved: of variables that lie on one device."""
        if self._plan.runtime.replicas.count == 1:
            return classifier
        if self._single is None:
            model, row = self._plan.settings.model, self._plan.network.row
            backbone = backbones.build(row, model.image_size, model.truncate_at)
            head = Head(len(self._classes), model.head_units, model.dropout)
            self._single = Classifier(backbone, backbones.preprocessing(row), head, self._plan.network.first_trainable)
        self._single.set_weights(classifier)
        return self._single


def result_name(arm: str, fraction: float, seed: int) -> str:
    """Return what names a result, fit for a file's name."""
    return f"{arm}-fraction-{fraction:g}-seed-{seed}"


def _rows_read(stage: Stage) -> manifest.RowsRead:
    cut, rows = stage.stepped
    values = rows.values
    row_bytes = cut.dtype.itemsize * int(np.prod(cut.shape))
    if isinstance(values, Computed):
        return manifest.RowsRead(cut=cut.name, row_bytes=row_bytes, kept="no")
    return manifest.RowsRead(
        cut=cut.name, row_bytes=row_bytes, kept="memory" if isinstance(values, np.ndarray) else "disk"
    )


def _used(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _rate(trained: Trained) -> float:
    """Return examples per second; where a single step was taken, over all of training."""
    after_the_first = trained.examples_per_second
    return after_the_first if np.isfinite(after_the_first) else trained.images / trained.seconds


def _parameters(classifier: Classifier, part: Part) -> manifest.Parameters:
    backbone, head = classifier.backbone, classifier.head
    return manifest.Parameters(
        total=backbone.count_params() + head.count_params(),
        trainable=_count(classifier.trainable_variables(part)),
        backbone_trainable=_count(classifier.backbone_variables(part)),
    )


def _count(variables: Sequence[keras.Variable]) -> int:
    return sum(int(np.prod(variable.shape)) for variable in variables)
