"""One result: an (arm, train_fraction, seed) trained, evaluated and exported."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import numpy.typing as npt

from job import backbones, export, manifest, training
from job.arms import ARMS, Arm, Part, Phase, Recipe
from job.batch_norm import Recalibrator
from job.console import Console
from job.evaluation import Predictions, predict
from job.features import Features, mean_and_deviation
from job.model import Classifier, Cut, Head
from job.planning import Plan
from job.rows import Rows, stratified_subset
from job.runtime import derived_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """A finished result: its record, what it said of the test split, and the folder with its files to upload."""

    record: manifest.Result
    test: Predictions
    folder: Path


class Experiment:
    """All results of a run: they share the decoded photos, the pretrained weights and the rows of frozen layers."""

    def __init__(
        self, plan: Plan, pixels: dict[str, Rows], data_seconds: float, folder: Path, console: Console
    ) -> None:
        """Take the checked plan, the decoded splits and the seconds that decoding took, and local scratch space."""
        self._plan = plan
        self._pixels = pixels
        self._data_seconds = data_seconds
        self._folder = folder
        self._console = console
        self._features = Features(pixels, folder, console)
        self._pretrained = plan.backbone.get_weights()
        training_settings = plan.settings.training
        self._recipe = Recipe(
            training_settings.epochs,
            training_settings.resolved_head_epochs,
            training_settings.learning_rate,
            training_settings.fine_tune_learning_rate,
        )

    def result(self, arm_name: str, fraction: float, seed: int) -> Outcome:
        """Train, evaluate and export one result; its files are written to a folder of its own."""
        start = time.perf_counter()
        arm, settings = ARMS[arm_name], self._plan.settings
        logger.info("%s: fraction %g, seed %d", arm.name, fraction, seed, extra={"arm": arm.name, "seed": seed})
        index = stratified_subset(self._pixels["train"].labels, fraction, seed)
        classifier = self._classifier(arm, seed)
        stages = self._stages(arm, classifier, index)
        features_seconds = time.perf_counter() - start
        trained = training.train(
            arm.name, classifier, stages, settings.training, seed, self._console, xla=self._plan.runtime.xla
        )

        evaluation_start = time.perf_counter()
        last = stages[-1]
        test, norm = self._test(classifier, last)
        logits_of = classifier.inference(last.cut)
        metrics = {
            name: predict(logits_of, rows, chosen).metrics(self._classes)
            for name, rows, chosen in (("train", last.train, index), ("validation", last.validation, None))
        }
        evaluation_seconds = time.perf_counter() - evaluation_start

        export_start = time.perf_counter()
        where = f"arms/{arm.name}/fraction-{fraction:g}/seed-{seed}"
        target = self._folder / "publish" / where
        export.export(classifier, self._classes, target / "saved_model")
        difference = export.prove(target / "saved_model", self._pixels["test"].values, test)
        logger.info("%s: the reloaded SavedModel differs by %.1e in probability", arm.name, difference)
        (target / "predictions.csv").write_text(test.to_csv(self._classes), encoding="utf-8")
        export_seconds = time.perf_counter() - export_start

        data_seconds, self._data_seconds = self._data_seconds, 0.0  # decoding is shared: it stands at the first result
        seconds = manifest.Durations(
            data=data_seconds,
            features=features_seconds,
            training=trained.seconds,
            evaluation=evaluation_seconds,
            export=export_seconds,
            total=time.perf_counter() - start + data_seconds,
        )
        price = settings.output.cost_per_hour
        record = manifest.Result(
            arm=arm.name,
            train_fraction=fraction,
            seed=seed,
            train_examples=len(index),
            resumed=0,
            parameters=_parameters(classifier, last.phase.trains),
            history=trained.history,
            metrics=manifest.Metrics(**metrics, test=test.metrics(self._classes)),
            batch_norm=norm,
            seconds=seconds,
            examples_per_second=trained.images / trained.seconds,
            cost=None if price is None else seconds.total / 3600 * price,
            saved_model=f"{where}/saved_model",
        )
        return Outcome(record, test, self._folder / "publish")

    @property
    def _classes(self) -> Sequence[str]:
        return self._plan.source.classes

    def _classifier(self, arm: Arm, seed: int) -> Classifier:
        """Return a fresh model: pretrained or random backbone, and a head whose values depend on the seed alone."""
        model, plan = self._plan.settings.model, self._plan
        if arm.pretrained:
            backbone = plan.backbone
            backbone.set_weights(self._pretrained)
        else:
            keras.utils.set_random_seed(derived_seed(seed, "backbone"))
            backbone = backbones.build(plan.row, model.image_size)
            if model.truncate_at:
                backbone = backbones.truncate(backbone, model.truncate_at)
        keras.utils.set_random_seed(derived_seed(seed, "head"))
        head = Head(len(self._classes), model.head_units, model.dropout)
        return Classifier(backbone, backbones.preprocessing(plan.row), head, plan.first_trainable)

    def _stages(self, arm: Arm, classifier: Classifier, index: npt.NDArray[np.int64]) -> tuple[training.Stage, ...]:
        """Return the arm's phases with their rows; for a pretrained arm, fit the head's standardisation."""
        phases = arm.phases(self._recipe)
        if not arm.pretrained:
            cut = classifier.cut(Part.ALL)
            return tuple(self._stage(classifier, phase, cut, index) for phase in phases)
        cached = self._plan.settings.runtime.feature_cache == "auto"
        # with fine_tune in the run, the pooled rows are made from the rows at its cut: its trunk runs once for both
        before = classifier.cut(Part.TAIL) if cached and "fine_tune" in self._plan.settings.training.arms else None
        pooled = classifier.cut(Part.HEAD)
        pooled_train = self._features.rows(pooled, "train", before)
        classifier.head.standardise(*mean_and_deviation(pooled_train.values[index]))
        cuts = {
            Part.HEAD: pooled if cached else classifier.cut(Part.HEAD, at_pixels=True),
            Part.TAIL: before if before is not None else classifier.cut(Part.TAIL, at_pixels=not cached),
        }
        return tuple(self._stage(classifier, phase, cuts[phase.trains], index, before) for phase in phases)

    def _stage(
        self, classifier: Classifier, phase: Phase, cut: Cut, index: npt.NDArray[np.int64], before: Cut | None = None
    ) -> training.Stage:
        before = before if before is not None and before.name != cut.name else None
        train, validation = (self._features.rows(cut, split, before) for split in ("train", "validation"))
        recalibrator = Recalibrator(classifier, cut) if phase.trains_batch_norm and classifier.batch_norms() else None
        return training.Stage(phase, cut, train, index, validation, recalibrator)

    def _test(self, classifier: Classifier, stage: training.Stage) -> tuple[Predictions, manifest.BatchNorm | None]:
        """Return the composed model's predictions from the test split's pixels.

        Where BatchNorm trained, its statistics are first re-estimated over the training rows, and stay so.
        """
        pixels = self._pixels["test"]
        logits_of = classifier.inference(classifier.cut(Part.ALL))
        if stage.recalibrator is None:
            return predict(logits_of, pixels), None
        raw = float(predict(logits_of, pixels).correct.mean())
        stage.recalibrator.recalibrate(stage.train, stage.index, self._plan.settings.training.batch_size)
        test = predict(logits_of, pixels)
        recalibrated = float(test.correct.mean())
        return test, manifest.BatchNorm(test_accuracy_raw=raw, test_accuracy_recalibrated=recalibrated)


def _parameters(classifier: Classifier, part: Part) -> manifest.Parameters:
    backbone, head = classifier.backbone, classifier.head
    return manifest.Parameters(
        total=backbone.count_params() + head.count_params(),
        trainable=_count(classifier.trainable_variables(part)),
        backbone_trainable=_count(classifier.backbone_variables(part)),
    )


def _count(variables: Sequence[keras.Variable]) -> int:
    return sum(int(np.prod(variable.shape)) for variable in variables)
