"""The compiled steps of a phase, and the epochs that are made of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job import batch_norm, checkpoints
from job.arms import Part, Phase
from job.batch_norm import Recalibrator
from job.errors import ConfigError
from job.features import run_over
from job.manifest import Epoch
from job.model import Classifier, Cut
from job.optimizers import FlatOptimizer
from job.rows import Rows
from job.runtime import derived_seed
from job.statistics import cross_entropy
from job.stopping import stop_if_asked

# Rows over which BatchNorm statistics are re-estimated before each validation of an arm whose BatchNorm trains.
VALIDATION_CALIBRATION_ROWS = 128
# Several steps go into one call until a call takes this long. It bounds how late a stop or the bar is heeded, and at a
# tenth of a millisecond a call it leaves Python a thousandth of the time.
_SECONDS_PER_CALL = 0.2
# Rows that are read ahead of a call, at most.
_BYTES_AHEAD = 32 * 2**20


@dataclass(frozen=True)
class Stage:
    """A phase with its rows, at one cut.

    index: int64 [n], the rows of ``train`` that are trained on.
    """

    phase: Phase
    cut: Cut
    train: Rows
    index: npt.NDArray[np.int64]
    validation: Rows


class Steps:
    """The compiled training steps of one phase at one cut, and the sums that they keep.

    most_per_call: how many may go into one call; None where any number may.
    """

    def __init__(self, classifier: Classifier, phase: Phase, cut: Cut, optimizer: Any, *, xla: bool) -> None:
        """Take a fresh keras optimizer; nothing is traced before the first call."""
        loss_sum, correct = self._sums = tf.Variable(0.0, dtype=tf.float32), tf.Variable(0, dtype=tf.int32)
        variables = classifier.trainable_variables(phase.trains)
        flat = self._optimizer = FlatOptimizer(optimizer, variables)
        head = classifier.head

        def step(rows: tf.Tensor, labels: tf.Tensor, dropout_seed: tf.Tensor) -> None:
            values = [variable.value for variable in variables]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(values)
                logits = head(cut.tail(rows, phase.trains_batch_norm), dropout_seed)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
                scaled = flat.scale_loss(tf.reduce_mean(losses))
            flat.apply(tape.gradient(scaled, values))
            loss_sum.assign_add(tf.reduce_sum(losses))
            hits = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
            correct.assign_add(tf.reduce_sum(tf.cast(hits, tf.int32)))

        def steps(
            rows: tf.Tensor, labels: tf.Tensor, order: tf.Tensor, dropout_seed: tf.Tensor, done: tf.Tensor
        ) -> None:
            def one(i: tf.Tensor) -> tuple[tf.Tensor]:
                index = order[i]
                step(tf.gather(rows, index), tf.gather(labels, index), tf.stack([dropout_seed, done + i + 1]))
                return (i + 1,)

            tf.while_loop(lambda i: i < tf.shape(order)[0], one, (tf.constant(0),), parallel_iterations=1)

        signature = [
            tf.TensorSpec([None, *cut.shape], cut.dtype),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([], tf.int32),
            tf.TensorSpec([], tf.int32),
        ]
        # XLA compiles for every shape: one step a call has two, that of a whole batch and that of an epoch's last
        self.most_per_call = 1 if xla else None
        self._call = tf.function(steps, input_signature=signature, autograph=False, jit_compile=xla or None)

    def reset(self) -> None:
        """Begin anew at the classifier's present values."""
        self._optimizer.reset()
        self.reset_sums()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of all that steps change beside the classifier's variables."""
        return checkpoints.copied(self._optimizer.state, "optimizer") | checkpoints.copied(self._sums, "sum")

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from a ``state``, with the classifier's variables as they were then."""
        self._optimizer.reset()
        checkpoints.assign(self._optimizer.state, state, "optimizer")
        checkpoints.assign(self._sums, state, "sum")

    def __call__(
        self, rows: tf.Tensor, labels: tf.Tensor, order: npt.NDArray[np.int64], dropout_seed: int, done: int
    ) -> None:
        """Take one step for each row of ``order``.

        Args:
            rows: [n, ...], at the cut.
            labels: int32 [n].
            order: [steps, batch], index into ``rows``.
            dropout_seed: of the phase; each step draws from it and its number.
            done: steps taken before.
        """
        number = tf.constant(done, tf.int32)
        self._call(rows, labels, tf.constant(order, tf.int32), tf.constant(dropout_seed, tf.int32), number)

    def sums(self) -> tuple[float, int]:
        """Return the summed loss and the number of right answers since the last ``reset_sums``."""
        loss_sum, correct = self._sums
        return float(loss_sum), int(correct)

    def reset_sums(self) -> None:
        """Begin the sums at zero."""
        for each in self._sums:
            each.assign(tf.zeros_like(each))


Call = tuple[tf.Tensor, tf.Tensor, npt.NDArray[np.int64]]


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
        self._dropout_seed = derived_seed(seed, f"dropout {stage.phase.name}")
        self._predict = classifier.inference(stage.cut)
        self.images = 0
        self.done = 0
        self.per_call = 1
        self._epochs = 0
        self._epoch_seconds = 0.0
        self._epoch_start = time.perf_counter()
        self._compiled = False
        self._timed_images = 0
        self._timed_seconds = 0.0
        row_bytes = stage.cut.dtype.itemsize * math.prod(stage.cut.shape)
        self._most_per_call = max(1, _BYTES_AHEAD // (row_bytes * batch_size))
        self._resident: tuple[tf.Tensor, tf.Tensor] | None = None
        if isinstance(stage.train.values, np.ndarray):
            self._resident = tf.constant(stage.train.values), tf.constant(stage.train.labels)
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
        for rows, labels, batches in self._feed(self._calls(order)):
            stop_if_asked()
            self._steps(rows, labels, batches, self._dropout_seed, self.done)
            now = time.perf_counter()
            if self._compiled:
                self._timed_images += batches.size
                self._timed_seconds += now - before
                fitting = int(_SECONDS_PER_CALL * len(batches) / (now - before))
                self.per_call = min(max(1, fitting), self._most_per_call)
            self._compiled = True
            self.done += len(batches)
            self.images += batches.size
            advance(batches.size)
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

    def _feed(self, calls: Iterator[npt.NDArray[np.int64]]) -> Iterator[Call]:
        """Yield rows, labels, and the calls' batches as indices into them.

        Rows that are not in memory are read while the call before computes.
        """
        if self._resident is not None:
            yield from ((*self._resident, batches) for batches in calls)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
            ahead = next(calls, None)
            future = None if ahead is None else reader.submit(self._read, ahead)
            while future is not None:
                ready = future.result()
                following = next(calls, None)
                future = None if following is None else reader.submit(self._read, following)
                yield ready

    def _read(self, batches: npt.NDArray[np.int64]) -> Call:
        index = batches.ravel()
        rows = self._stage.train
        local = np.arange(len(index)).reshape(batches.shape)
        return tf.constant(rows.values[index]), tf.constant(rows.labels[index]), local

    def _validate(self, order: npt.NDArray[np.int64]) -> tuple[float, float]:
        """Return mean loss and accuracy on the validation rows.

        Where BatchNorm trains, this is done with statistics re-estimated on some of the training rows, and the
        moving averages are put back: with momentum 0.999 their own curve would be flat at chance.
        """
        validation, recalibrator = self._stage.validation, self._recalibrator
        if recalibrator is None:
            logits = run_over(self._predict, validation.values)
        else:
            kept = batch_norm.statistics(recalibrator.layers)
            try:
                recalibrator.recalibrate(self._stage.train, order[:VALIDATION_CALIBRATION_ROWS], self._batch_size)
                logits = run_over(self._predict, validation.values)
            finally:
                batch_norm.assign(recalibrator.layers, kept)
        loss = float(cross_entropy(logits, validation.labels).mean())
        return loss, float((logits.argmax(axis=1) == validation.labels).mean())
