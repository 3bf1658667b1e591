"""One phase of one result: its epochs, of steps that are fed while the one before computes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from job.arms import Part
from job.errors import ConfigError
from job.manifest import Epoch
from job.models import recalibration
from job.models.classifier import Classifier
from job.models.inference import logits_of
from job.models.randomness import derived_seed
from job.models.recalibration import Recalibrator
from job.results.statistics import cross_entropy
from job.stopping import asked_to_stop, stop, stop_if_asked
from job.training.compilation import Compilation
from job.training.feeds import Feeder
from job.training.stages import Stage
from job.training.steps import Steps

# Rows over which BatchNorm statistics are re-estimated before each validation of an arm whose BatchNorm trains.
VALIDATION_CALIBRATION_ROWS = 128
# Several steps go into one call until a call takes this long. It bounds how late a stop or the bar is heeded, and at a
# tenth of a millisecond a call it leaves Python a thousandth of the time.
_SECONDS_PER_CALL = 0.2


class PhaseRun:
    """One phase of one result: what an epoch of it does.

    done: steps taken in the phase. images: examples stepped over in this life of the run. per_call: steps in the next
    call. xla: whether XLA compiled some of the steps, in this life.
    """

    def __init__(
        self,
        classifier: Classifier,
        stage: Stage,
        steps: Steps,
        compilation: Compilation,
        feeder: Feeder,
        batch_size: int,
        seed: int,
        recalibrator: Recalibrator | None,
    ) -> None:
        self._recalibrator = recalibrator
        self._stage = stage
        self._steps = steps
        self._compilation = compilation
        self._feeder = feeder
        self._batch_size = batch_size
        self._seed = seed
        self._chance_seed = derived_seed(seed, f"steps of {stage.phase.name}")
        self._classifier = classifier
        self._replicas = classifier.replicas
        self.images = 0
        self.done = 0
        self.xla = False
        self.per_call = 1
        self._epochs = 0
        self._epoch_seconds = 0.0
        self._epoch_start = time.perf_counter()

    @property
    def examples_per_second(self) -> float:
        """Return the examples a second in steps so far, but for calls that compile."""
        return self._compilation.examples_per_second

    @property
    def epoch_seconds(self) -> float:
        """Return the seconds of the epoch under way, in every life of the run."""
        return self._epoch_seconds + time.perf_counter() - self._epoch_start

    def go_on(self, state: Mapping[str, npt.NDArray[Any]], done: int, epochs: int, epoch_seconds: float) -> None:
        """Go on from the ``state`` of the steps after ``done`` of them, with ``epochs`` of the phase validated."""
        self._steps.restore(state)
        self.done = done
        self._epochs = epochs
        self._epoch_seconds = epoch_seconds

    def epoch(self, number: int, advance: Callable[[int], None]) -> Epoch:
        """Run one epoch, numbered from 1 through all phases, or what is left of it, and validate."""
        self._epoch_start = time.perf_counter()
        phase = self._stage.phase
        order = np.random.default_rng(derived_seed(self._seed, "order", number)).permutation(self._stage.index)
        behind = self.done - self._epochs * -(-len(order) // self._batch_size)
        if behind == 0:
            self._steps.reset_sums()
        self.steps_over(order[behind * self._batch_size :], advance)
        loss_sum, correct = self._steps.sums()
        if not math.isfinite(loss_sum):
            tail = phase.trains is Part.TAIL
            raise ConfigError.of(
                "TRANSFER_FINE_TUNE_LEARNING_RATE" if tail else "TRANSFER_LEARNING_RATE",
                f"the training loss is {loss_sum} in epoch {number} ({phase.name} phase), "
                f"at a peak rate of {phase.learning_rate:g}; give a lower rate",
            )
        loss, accuracy = self._validate(order)
        seconds = self.epoch_seconds
        self._epochs += 1
        self._epoch_seconds = 0.0
        return Epoch(
            epoch=number,
            phase=phase.name,
            train_loss=loss_sum / len(order),
            train_accuracy=correct / len(order),
            validation_loss=loss,
            validation_accuracy=accuracy,
            seconds=seconds,
        )

    def steps_over(self, order: npt.NDArray[np.int64], advance: Callable[[int], None]) -> None:
        """Step over the rows at ``order`` (int64 [n]) once; ``advance`` is told of every call's examples."""
        total = self._stage.phase.epochs * -(-len(self._stage.index) // self._batch_size)
        before = time.perf_counter()
        fitting = self.per_call

        def next_call() -> tuple[int, bool]:
            return self.per_call, self._compilation.padded(total - self.done)

        for call in self._feeder.calls(order, next_call):
            if self._replicas.workers == 1:
                stop_if_asked()
            # several workers stop after the same step, and take as many steps a call as the chief would
            votes = float(asked_to_stop()), float(fitting if self._replicas.is_chief else 0)
            stops, steps_next = self._compilation.take(self._steps, call, self._chance_seed, self.done, votes)
            now = time.perf_counter()
            self.xla |= call.padded and self._steps.by_xla
            if self._compilation.took(call, now - before):
                fitting = min(max(1, int(_SECONDS_PER_CALL * call.steps / (now - before))), self._feeder.most_steps)
            self.per_call = int(steps_next) if self._replicas.workers > 1 else fitting
            self.done += call.steps
            self.images += call.images
            advance(call.images)
            if stops:
                stop()
            before = time.perf_counter()

    def _validate(self, order: npt.NDArray[np.int64]) -> tuple[float, float]:
        """Return mean loss and accuracy on the validation rows.

        Where BatchNorm trains, this is done with statistics re-estimated on some of the training rows, and the
        moving averages are put back: with momentum 0.999 their own curve would be flat at chance.
        """
        validation, recalibrator = self._stage.validation, self._recalibrator
        if recalibrator is None:
            logits = logits_of(self._classifier, self._stage.cut, validation)
        else:
            kept = recalibration.statistics(recalibrator.layers)
            try:
                recalibrator.recalibrate(self._stage.train, order[:VALIDATION_CALIBRATION_ROWS], self._batch_size)
                logits = logits_of(self._classifier, self._stage.cut, validation)
            finally:
                recalibration.assign(recalibrator.layers, kept)
        loss = float(cross_entropy(logits, validation.labels).mean())
        return loss, float((logits.argmax(axis=1) == validation.labels).mean())
