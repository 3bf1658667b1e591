"""The compiled steps of a phase, and the epochs that are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.machine.replicas import Tensors
from job.models.classifier import Classifier
from job.models.fused_batch_norm import synchronised
from job.models.randomness import Chance
from job.models.recalibration import filled_up
from job.training import checkpoints
from job.training.optimizers import FlatOptimizer, joined
from job.training.stages import Stage

# Rows, labels, order, places and counts: what one replica takes into a call of several steps.
#   rows [n, ...], at the cut, and labels int32 [n]
#   order int32 [steps, most]: the rows of each step, as an index into ``rows``
#   places int32 [steps, most]: where in the step's whole batch they stand
#   counts int32 [steps]: how many of a step's ``order`` and ``places`` are meant
Feed = tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]
_ORDER = 2
Index = npt.NDArray[np.int64]


def whole_feed(rows: tf.Tensor, labels: tf.Tensor, order: Index) -> Feed:
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
        # int64: TensorFlow keeps int32 variables on the host, where a step that XLA compiles for a GPU may not reach
        # them (tensorflow#53192)
        loss_sum, correct = self._sums = tf.Variable(0.0), tf.Variable(0, dtype=tf.int64)
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
                correct.assign_add(tf.cast(hits, tf.int64))
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
