"""The one loop: an arm's phases over rows, whatever the arm."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job import batch_norm
from job.arms import Part, Phase
from job.batch_norm import Recalibrator
from job.console import Console
from job.errors import ConfigError
from job.features import run_over
from job.manifest import Epoch
from job.model import Classifier, Cut
from job.rows import Rows
from job.runtime import derived_seed, stop_if_asked
from job.settings import TrainingSettings
from job.statistics import cross_entropy

logger = logging.getLogger(__name__)

# Share of a phase's steps over which the learning rate rises to its peak before the cosine decay to zero.
WARM_UP = 0.1
# Rows over which BatchNorm statistics are re-estimated before each validation of an arm whose BatchNorm trains.
VALIDATION_CALIBRATION_ROWS = 256


@dataclass(frozen=True)
class Stage:
    """A phase with its rows, at one cut.

    index: int64 [n], the rows of ``train`` that are trained on. recalibrator: for a phase that trains BatchNorm.
    """

    phase: Phase
    cut: Cut
    train: Rows
    index: npt.NDArray[np.int64]
    validation: Rows
    recalibrator: Recalibrator | None = None


@dataclass(frozen=True)
class Trained:
    """What training an arm gave beside the weights. seconds: its wall-clock time; images: examples stepped over."""

    history: tuple[Epoch, ...]
    images: int
    seconds: float


def train(
    name: str,
    classifier: Classifier,
    stages: tuple[Stage, ...],
    settings: TrainingSettings,
    seed: int,
    console: Console,
    *,
    xla: bool = False,
) -> Trained:
    """Train ``classifier`` in place through ``stages`` and return the history.

    The order of the examples is a permutation drawn from (seed, epoch), and the last, smaller batch of an epoch is
    trained on too. ``history`` counts epochs through all phases from 1.
    """
    start = time.perf_counter()
    history: list[Epoch] = []
    images = sum(stage.phase.epochs * len(stage.index) for stage in stages)
    with console.bar(name, images) as advance:
        for stage in stages:
            run = _PhaseRun(classifier, stage, settings, seed, xla=xla)
            for _ in range(stage.phase.epochs):
                epoch = run.epoch(len(history) + 1, advance)
                history.append(epoch)
                logger.info(
                    "%s: epoch %d/%d (%s) train loss %.4f accuracy %.4f, validation loss %.4f accuracy %.4f, %.1f s",
                    name, epoch.epoch, settings.epochs, epoch.phase, epoch.train_loss, epoch.train_accuracy,
                    epoch.validation_loss, epoch.validation_accuracy, epoch.seconds,
                    extra={"arm": name, "seed": seed, **epoch.model_dump()},
                )  # fmt: skip
    return Trained(tuple(history), images, time.perf_counter() - start)


class _PhaseRun:
    """One phase: its optimizer, its compiled step, and what an epoch of it does."""

    def __init__(
        self, classifier: Classifier, stage: Stage, settings: TrainingSettings, seed: int, *, xla: bool
    ) -> None:
        self._classifier = classifier
        self._stage = stage
        self._batch_size = settings.batch_size
        self._seed = seed
        self._dropout_seed = derived_seed(seed, f"dropout {stage.phase.name}")
        self._steps = 0
        steps_per_epoch = -(-len(stage.index) // settings.batch_size)
        self._optimizer = make_optimizer(
            settings.optimizer, stage.phase.learning_rate, stage.phase.epochs * steps_per_epoch
        )
        self._loss_sum = tf.Variable(0.0, dtype=tf.float32)
        self._correct = tf.Variable(0, dtype=tf.int32)
        self._step = self._make_step(xla)
        self._predict = classifier.inference(stage.cut)

    def _make_step(self, xla: bool) -> Callable[..., None]:
        phase, cut, head = self._stage.phase, self._stage.cut, self._classifier.head
        variables = self._classifier.trainable_variables(phase.trains)
        optimizer, loss_sum, correct = self._optimizer, self._loss_sum, self._correct
        optimizer.build(variables)

        def step(rows: tf.Tensor, labels: tf.Tensor, dropout_seed: tf.Tensor) -> None:
            values = [variable.value for variable in variables]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(values)
                logits = head(cut.tail(rows, phase.trains_batch_norm), dropout_seed)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
                scaled = optimizer.scale_loss(tf.reduce_mean(losses))
            optimizer.apply(tape.gradient(scaled, values), variables)
            loss_sum.assign_add(tf.reduce_sum(losses))
            hits = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
            correct.assign_add(tf.reduce_sum(tf.cast(hits, tf.int32)))

        signature = [
            tf.TensorSpec([None, *cut.shape], self._stage.train.values.dtype),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([2], tf.int32),
        ]
        compiled: Callable[..., None] = tf.function(
            step, input_signature=signature, autograph=False, jit_compile=xla or None
        )
        return compiled

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        generator = np.random.default_rng(derived_seed(self._seed, "order", epoch))
        return generator.permutation(self._stage.index)

    def _batches(self, order: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        for start in range(0, len(order), self._batch_size):
            yield order[start : start + self._batch_size]

    def epoch(self, number: int, advance: Callable[[int], None]) -> Epoch:
        """Run one epoch, numbered from 1 through all phases, and validate."""
        start = time.perf_counter()
        rows, phase = self._stage.train, self._stage.phase
        self._loss_sum.assign(0.0)
        self._correct.assign(0)
        order = self._order(number)
        for index in self._batches(order):
            stop_if_asked()
            self._steps += 1
            dropout_seed = tf.constant([self._dropout_seed, self._steps], tf.int32)
            self._step(tf.constant(rows.values[index]), tf.constant(rows.labels[index]), dropout_seed)
            advance(len(index))
        examples = len(order)
        if not math.isfinite(float(self._loss_sum)):
            tail = phase.trains is Part.TAIL
            raise ConfigError.of(
                "TRANSFER_FINE_TUNE_LEARNING_RATE" if tail else "TRANSFER_LEARNING_RATE",
                f"the training loss is {float(self._loss_sum)} in epoch {number} ({phase.name} phase), "
                f"at a peak rate of {phase.learning_rate:g}; give a lower rate",
            )
        loss, accuracy = self._validate(order)
        return Epoch(
            epoch=number,
            phase=phase.name,
            train_loss=float(self._loss_sum) / examples,
            train_accuracy=int(self._correct) / examples,
            validation_loss=loss,
            validation_accuracy=accuracy,
            seconds=time.perf_counter() - start,
        )

    def _validate(self, order: npt.NDArray[np.int64]) -> tuple[float, float]:
        """Return mean loss and accuracy on the validation rows.

        Where BatchNorm trains, this is done with statistics re-estimated on some of the training rows, and the
        moving averages are put back: with momentum 0.999 their own curve would be flat at chance.
        """
        validation, recalibrator = self._stage.validation, self._stage.recalibrator
        if recalibrator is None:
            logits = run_over(self._predict, validation.values)
        else:
            kept = batch_norm.statistics(recalibrator.layers)
            recalibrator.recalibrate(self._stage.train, order[:VALIDATION_CALIBRATION_ROWS], self._batch_size)
            logits = run_over(self._predict, validation.values)
            batch_norm.assign(recalibrator.layers, kept)
        loss = float(cross_entropy(logits, validation.labels).mean())
        return loss, float((logits.argmax(axis=1) == validation.labels).mean())


def make_optimizer(name: str, peak: float, steps: int) -> Any:
    """Return a keras optimizer whose rate rises linearly to ``peak``, then falls to zero along a cosine.

    steps: of the whole phase. Under mixed_float16 the optimizer scales the loss, as float16 gradients need.
    """
    warm_up = min(steps - 1, max(1, round(WARM_UP * steps))) if steps > 1 else 0
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warm_up else peak, max(1, steps - warm_up), warmup_target=peak if warm_up else None, warmup_steps=warm_up
    )
    optimizers: dict[str, Callable[[], Any]] = {
        "adam": lambda: keras.optimizers.Adam(schedule),
        "adamw": lambda: keras.optimizers.AdamW(schedule),
        "rmsprop": lambda: keras.optimizers.RMSprop(schedule),
        "sgd": lambda: keras.optimizers.SGD(schedule, momentum=0.9),
    }
    optimizer = optimizers[name]()
    if keras.config.dtype_policy().compute_dtype == "float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer
