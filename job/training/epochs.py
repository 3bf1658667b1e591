"""One phase of one result: its epochs, of steps that are fed while the one before computes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

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
from job.training.stages import Stage
from job.training.steps import Feed, Index, Steps, whole_feed

# Rows over which BatchNorm statistics are re-estimated before each validation of an arm whose BatchNorm trains.
VALIDATION_CALIBRATION_ROWS = 128
# Several steps go into one call until a call takes this long. It bounds how late a stop or the bar is heeded, and at a
# tenth of a millisecond a call it leaves Python a thousandth of the time.
_SECONDS_PER_CALL = 0.2
# Rows that are read ahead of a call, at most.
_BYTES_AHEAD = 32 * 2**20


class PhaseRun:
    """One phase of one result: what an epoch of it does.

    done: steps taken in the phase. images: examples stepped over in this life of the run. per_call: steps in the next
    call.
    """

    def __init__(
        self,
        classifier: Classifier,
        stage: Stage,
        steps: Steps,
        batch_size: int,
        seed: int,
        recalibrator: Recalibrator | None,
    ) -> None:
        self._recalibrator = recalibrator
        self._stage = stage
        self._steps = steps
        self._batch_size = batch_size
        self._seed = seed
        self._chance_seed = derived_seed(seed, f"steps of {stage.phase.name}")
        self._classifier = classifier
        self._replicas = classifier.replicas
        self.images = 0
        self.done = 0
        self.per_call = 1
        self._epochs = 0
        self._epoch_seconds = 0.0
        self._epoch_start = time.perf_counter()
        self._compiled = False
        self._timed_images = 0
        self._timed_seconds = 0.0
        cut, self._stepped = stage.stepped
        self._labels = self._stepped.labels[self._stepped.in_place()]
        self._most_per_call = max(1, _BYTES_AHEAD // (cut.row_bytes * batch_size))
        self._resident: list[tuple[tf.Tensor, tf.Tensor]] = []
        if isinstance(self._stepped.values, np.ndarray):
            self._resident = self._replicas.copies(self._stepped.values, self._labels)
            self._most_per_call = len(stage.index)
        if steps.most_per_call is not None:
            self._most_per_call = steps.most_per_call

    @property
    def examples_per_second(self) -> float:
        """Return the examples a second in steps so far, but for the first call, which compiles."""
        return self._timed_images / self._timed_seconds if self._timed_images else math.nan

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
        before = time.perf_counter()
        fitting = self.per_call
        for feeds, steps, batch in self._feed(self._calls(order)):
            if self._replicas.workers == 1:
                stop_if_asked()
            # several workers stop after the same step, and take as many steps a call as the chief would
            votes = float(asked_to_stop()), float(fitting if self._replicas.is_chief else 0)
            stops, steps_next = self._steps(feeds, batch, self._chance_seed, self.done, votes)
            now = time.perf_counter()
            if self._compiled:
                self._timed_images += steps * batch
                self._timed_seconds += now - before
                fitting = min(max(1, int(_SECONDS_PER_CALL * steps / (now - before))), self._most_per_call)
            self._compiled = True
            self.per_call = int(steps_next) if self._replicas.workers > 1 else fitting
            self.done += steps
            self.images += steps * batch
            advance(steps * batch)
            if stops:
                stop()
            before = time.perf_counter()

    def _calls(self, order: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the batches of each call, int64 [steps, batch]; the last, smaller batch has a call of its own."""
        whole = len(order) // self._batch_size
        batches = order[: whole * self._batch_size].reshape(whole, self._batch_size)
        at = 0
        while at < whole:
            call = batches[at : at + self.per_call]
            at += len(call)
            yield call
        if whole * self._batch_size < len(order):
            yield order[whole * self._batch_size :][None]

    def _feed(self, calls: Iterator[npt.NDArray[np.int64]]) -> Iterator[tuple[list[Feed], int, int]]:
        """Yield what each replica takes into each call, and the call's steps and batch size.

        What a call takes is read while the call before computes.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
            ahead = next(calls, None)
            future = None if ahead is None else reader.submit(self._read, ahead)
            while ahead is not None and future is not None:
                feeds = future.result()
                steps, batch = ahead.shape
                ahead = next(calls, None)
                future = None if ahead is None else reader.submit(self._read, ahead)
                yield feeds, steps, batch

    def _read(self, batches: npt.NDArray[np.int64]) -> list[Feed]:
        """Divide ``batches`` (int64 [steps, batch]) among the replicas of this worker, of what it holds."""
        rows, local = self._stepped, self._replicas.local
        if self._replicas.count == 1:
            position = rows.positions(batches.ravel())
            index = position if self._resident else np.arange(len(position))
            return [whole_feed(*self._rows(0, position), index.reshape(batches.shape))]
        held = rows.held(batches)
        divided = [np.array_split(np.flatnonzero(row), local) for row in held]
        feeds = []
        for replica in range(local):
            places_of = [parts[replica] for parts in divided]
            counts = np.array([len(places) for places in places_of])
            position = rows.positions(np.concatenate([row[p] for row, p in zip(batches, places_of, strict=True)]))
            index = position if self._resident else np.arange(len(position))
            order, places = np.zeros((2, len(batches), max(1, counts.max())), np.int64)
            filled = np.arange(order.shape[1]) < counts[:, None]
            order[filled], places[filled] = index, np.concatenate(places_of)
            indices = (tf.constant(each, tf.int32) for each in (order, places, counts))
            feeds.append((*self._rows(replica, position), *indices))
        return feeds

    def _rows(self, replica: int, position: Index) -> tuple[tf.Tensor, tf.Tensor]:
        if self._resident:
            values, labels = self._resident[replica]
            return values, labels
        return tf.constant(self._stepped.values[position]), tf.constant(self._labels[position])

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
