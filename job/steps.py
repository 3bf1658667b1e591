"""The compiled steps of a phase, and the epochs that are made of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job import batch_norm, checkpoints
from job.arms import Part
from job.batch_norm import Recalibrator, filled_up
from job.chance import Chance
from job.errors import ConfigError
from job.features import logits_of
from job.fused_batch_norm import synchronised
from job.manifest import Epoch
from job.model import Classifier
from job.optimizers import FlatOptimizer, joined
from job.replicas import Tensors
from job.runtime import derived_seed
from job.stages import Stage
from job.statistics import cross_entropy
from job.stopping import asked_to_stop, stop, stop_if_asked

# Rows over which BatchNorm statistics are re-estimated before each validation of an arm whose BatchNorm trains.
VALIDATION_CALIBRATION_ROWS = 128
# Several steps go into one call until a call takes this long. It bounds how late a stop or the bar is heeded, and at a
# tenth of a millisecond a call it leaves Python a thousandth of the time.
_SECONDS_PER_CALL = 0.2
# Rows that are read ahead of a call, at most.
_BYTES_AHEAD = 32 * 2**20


# Rows, labels, order, places and counts: what one replica takes into a call of several steps.
#   rows [n, ...], at the cut, and labels int32 [n]
#   order int32 [steps, most]: the rows of each step, as an index into ``rows``
#   places int32 [steps, most]: where in the step's whole batch they stand
#   counts int32 [steps]: how many of a step's ``order`` and ``places`` are meant
Feed = tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]
_ORDER = 2
_Index = npt.NDArray[np.int64]


def whole_feed(rows: tf.Tensor, labels: tf.Tensor, order: _Index) -> Feed:
    """Return what the only replica takes into a call: every batch whole, ``order`` [steps, batch] into ``rows``."""
    steps, batch = order.shape
    places = np.broadcast_to(np.arange(batch), order.shape)
    indices = (tf.constant(each, tf.int32) for each in (order, places, np.full(steps, batch)))
    return rows, labels, *indices


class Steps:
    """The compiled training steps of one phase at one cut, and the sums that they keep.

    A replica's part of a step is a pure function: the gradient of its share in the batch's mean loss. These are added
    up over all replicas, in one vector with the losses, and applied once.

    most_per_call: how many may go into one call; None where any number may.
    """

    def __init__(self, classifier: Classifier, stage: Stage, optimizer: Any, *, xla: bool) -> None:
        """Take a fresh keras optimizer; nothing is traced before the first call. The rows of ``stage`` are not kept."""
        phase, (cut, _) = stage.phase, stage.stepped
        augment = stage.augmented.augment if stage.augmented else None
        loss_sum, correct = self._sums = tf.Variable(0.0), tf.Variable(0, dtype=tf.int32)
        self._agreed = tf.Variable(tf.zeros([2]))
        self._replicas = replicas = classifier.replicas
        variables = classifier.trainable_variables(phase.trains)
        flat = self._optimizer = FlatOptimizer(optimizer, variables)
        head, alone = classifier.head, replicas.count == 1

        def gradient(
            rows: tf.Tensor, labels: tf.Tensor, batch: tf.Tensor, weight: tf.Tensor | float, chance: Chance
        ) -> Tensors:
            """Return the flat gradient, the summed loss and the number of right answers of some rows of a batch."""
            values = [variable.value for variable in variables]
            rows = augment(rows, chance) if augment else rows
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(values)
                logits = head(cut.tail(rows, phase.trains_batch_norm), chance=chance)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits) * weight
                scaled = flat.scale_loss(tf.reduce_sum(losses) / tf.cast(batch, tf.float32))
            hits = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
            counted = tf.reduce_sum(tf.cast(hits, tf.float32)) * weight
            return [joined(tape.gradient(scaled, values)), tf.reduce_sum(losses), counted]

        def steps(feeds: list[Feed], batch: tf.Tensor, seed: tf.Tensor, done: tf.Tensor, votes: tf.Tensor) -> None:
            def one(i: tf.Tensor) -> tuple[tf.Tensor]:
                layers: list[Any] = []

                def share(replica: int) -> tuple[Tensors, Tensors]:
                    rows, labels, order, places, counts = feeds[replica]
                    drawn = tf.stack([seed, done + i + 1])
                    if alone:
                        rows, labels = tf.gather(rows, order[i]), tf.gather(labels, order[i])
                        return [*gradient(rows, labels, tf.shape(labels)[0], 1.0, Chance(drawn)), votes], []
                    index = order[i, : counts[i]]
                    (rows, weight), (labels, _) = filled_up(tf.gather(rows, index)), filled_up(tf.gather(labels, index))
                    where, _ = filled_up(places[i, : counts[i]])
                    with synchronised(weight) as over_all:
                        found = gradient(rows, labels, batch, weight, Chance(drawn, batch, where))
                    layers[:] = [layer for layer, *_ in over_all.moments]
                    moments = [moment for _, *moments in over_all.moments for moment in moments]
                    return [*found, votes if replica == 0 else tf.zeros_like(votes)], moments

                (gradients, losses, hits, agreed), moments = replicas.total(share)
                flat.apply(gradients)
                for layer, mean, variance in zip(layers, moments[::2], moments[1::2], strict=True):
                    layer.average(mean, variance)
                loss_sum.assign_add(losses)
                correct.assign_add(tf.cast(hits, tf.int32))
                self._agreed.assign(agreed)
                return (i + 1,)

            number = tf.shape(feeds[0][_ORDER])[0]
            tf.while_loop(lambda i: i < number, one, (tf.constant(0),), parallel_iterations=1)

        scalar = tf.TensorSpec([], tf.int32)
        feed = (
            tf.TensorSpec([None, *cut.shape], cut.dtype),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([None], tf.int32),
        )
        signature = [[feed] * replicas.local, scalar, scalar, scalar, tf.TensorSpec([2], tf.float32)]
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
        self, feeds: Sequence[Feed], batch: int, seed: int, done: int, votes: tuple[float, float] = (0.0, 0.0)
    ) -> tuple[float, float]:
        """Take one step for each row of the feeds' ``order``, and return the sums of all workers' ``votes``.

        All workers call it with as many steps.

        Args:
            feeds: of each replica of this worker.
            batch: examples of all replicas in each of the steps.
            seed: of the phase; each step draws from it and its number.
            done: steps taken before.
            votes: this worker's.
        """
        numbers = (tf.constant(number, tf.int32) for number in (batch, seed, done))
        self._call(list(feeds), *numbers, tf.constant(votes))
        if self._replicas.workers == 1:
            return votes
        stops, steps = self._agreed.numpy()
        return float(stops), float(steps)

    def sums(self) -> tuple[float, int]:
        """Return the summed loss and the number of right answers since the last ``reset_sums``."""
        loss_sum, correct = self._sums
        return float(loss_sum), int(correct)

    def reset_sums(self) -> None:
        """Begin the sums at zero."""
        for each in self._sums:
            each.assign(tf.zeros_like(each))


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

    def _rows(self, replica: int, position: _Index) -> tuple[tf.Tensor, tf.Tensor]:
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
            kept = batch_norm.statistics(recalibrator.layers)
            try:
                recalibrator.recalibrate(self._stage.train, order[:VALIDATION_CALIBRATION_ROWS], self._batch_size)
                logits = logits_of(self._classifier, self._stage.cut, validation)
            finally:
                batch_norm.assign(recalibrator.layers, kept)
        loss = float(cross_entropy(logits, validation.labels).mean())
        return loss, float((logits.argmax(axis=1) == validation.labels).mean())
