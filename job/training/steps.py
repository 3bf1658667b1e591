"""The compiled steps of a phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import tensorflow as tf

from job.machine.replicas import Tensors
from job.models.classifier import Classifier
from job.models.fused_batch_norm import synchronised
from job.models.randomness import Chance
from job.training import checkpoints
from job.training.feeds import Call, Feed, packed_spec, unpacked
from job.training.optimizers import FlatOptimizer, joined, make_optimizer, rate_at, schedule
from job.training.stages import Stage


class Steps:
    """The compiled training steps of one phase at one cut, and the sums that they keep.

    A replica's part of a step is a pure function: the gradient of its share in the batch's mean loss. These are added
    up over all replicas, in one vector with the losses, and each replica then takes the same step on its own copy of
    the variables. Nothing depends on how many steps the phase has, so one compilation serves every fraction and seed.

    There are two of the same: plain, for calls of any number of steps, the last one on a smaller batch; and compiled by
    XLA, for padded calls, in which rows of weight 0 fill the last batch up.

    by_xla: whether padded calls are compiled by XLA.
    """

    def __init__(self, classifier: Classifier, stage: Stage, optimizer: str, batch_size: int, *, xla: bool) -> None:
        """Take what decides a step; nothing is traced before the first call. The rows of ``stage`` are not kept.

        optimizer: its name in the settings. batch_size: of all replicas. xla: whether padded calls are compiled by XLA.
        """
        phase, (cut, _) = stage.phase, stage.stepped
        augment = stage.augmented.augment if stage.augmented else None
        # int64: TensorFlow keeps int32 variables on the host, where a step that XLA compiles for a GPU may not reach
        # them (tensorflow#53192)
        loss_sum, correct = self._sums = tf.Variable(0.0), tf.Variable(0, dtype=tf.int64)
        self._agreed = tf.Variable(tf.zeros([2]))
        self._replicas = replicas = classifier.replicas
        trained = classifier.trainable_variables(phase.trains)
        self._optimizers = [
            FlatOptimizer(make_optimizer(optimizer), [replicas.own(variable, number) for variable in trained])
            for number in replicas.on_each_device()
        ]
        head, alone = classifier.head, replicas.count == 1

        def gradient(
            rows: tf.Tensor, labels: tf.Tensor, weights: Any, size: tf.Tensor, chance: Chance, scale: Any
        ) -> Tensors:
            """Return the flat gradient, the summed loss and the number of right answers of some rows of a batch.

            scale: what makes of the loss that of which the gradient is taken.
            """
            values = [variable.value for variable in trained]
            rows = unpacked(rows, cut)
            rows = augment(rows, chance) if augment else rows
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(values)
                logits = head(cut.tail(rows, phase.trains_batch_norm), chance=chance)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits) * weights
                scaled = scale(tf.reduce_sum(losses) / size)
            hits = tf.cast(tf.equal(tf.argmax(logits, axis=1), labels), tf.float32)
            return [joined(tape.gradient(scaled, values)), tf.reduce_sum(losses), tf.reduce_sum(hits * weights)]

        def steps(
            feeds: Sequence[Feed], sizes: tf.Tensor, numbers: Sequence[tf.Tensor], lengths: Sequence[tf.Tensor],
            votes: tf.Tensor, *, padded: bool,
        ) -> None:  # fmt: skip
            number, seed, done = numbers

            def one(i: tf.Tensor) -> tuple[tf.Tensor]:
                layers: list[Any] = []

                def share(replica: int) -> tuple[Tensors, Tensors]:
                    feed, scale = feeds[replica], self._optimizers[replica].scale_loss
                    drawn = tf.stack([seed, done + i + 1])
                    rows, labels = tf.gather(feed.rows, feed.order[i]), tf.gather(feed.labels, feed.order[i])
                    voted = votes if replica == 0 else tf.zeros_like(votes)
                    if alone and not padded:
                        return [*gradient(rows, labels, 1.0, sizes[i], Chance(drawn), scale), voted], []
                    chance = Chance(drawn, batch_size, feed.places[i])
                    with synchronised(feed.weights[i], alone=alone) as over_all:
                        found = gradient(rows, labels, feed.weights[i], sizes[i], chance, scale)
                    layers[:] = [layer for layer, *_ in over_all.moments]
                    moments = [moment for _, *moments in over_all.moments for moment in moments]
                    return [*found, voted], moments

                totals = replicas.total(share)
                rate = rate_at(done + i, phase.learning_rate, *lengths)
                for replica in replicas.on_each_device():
                    (gradients, *_), moments = totals[replica]
                    self._optimizers[replica].apply(gradients, rate)
                    for layer, *statistics in zip(layers, moments[::2], moments[1::2], strict=True):
                        moving = [replicas.own(each, replica) for each in (layer.moving_mean, layer.moving_variance)]
                        layer.average(*statistics, moving)
                _, losses, hits, agreed = totals[0][0]
                loss_sum.assign_add(losses)
                correct.assign_add(tf.cast(hits, tf.int64))
                self._agreed.assign(agreed)
                return (i + 1,)

            tf.while_loop(lambda i: i < number, one, (tf.constant(0),), parallel_iterations=1)

        floats, whole = tf.TensorSpec([None, None], tf.float32), tf.TensorSpec([None, None], tf.int64)
        feed = Feed(packed_spec(cut), tf.TensorSpec([None], tf.int64), whole, whole, floats)
        signature = [
            (feed,) * replicas.local,
            tf.TensorSpec([None], tf.float32),
            (tf.TensorSpec([], tf.int32),) * 3,
            (tf.TensorSpec([], tf.float32),) * 2,
            tf.TensorSpec([2], tf.float32),
        ]

        def function(*, padded: bool, xla: bool = False) -> Any:
            def call(*arguments: Any) -> None:
                steps(*arguments, padded=padded)

            return tf.function(call, signature, autograph=False, jit_compile=xla or None)

        self.by_xla = xla
        self._function = function
        self._functions = {False: function(padded=False), True: function(padded=True, xla=xla)}
        self._lengths = schedule(1)

    def leave_xla(self) -> None:
        """Take padded calls without XLA too."""
        self.by_xla = False
        self._functions[True] = self._function(padded=True)

    def traced(self, *, padded: bool = False) -> Any:
        """Return the graph of the steps, as a concrete function whose first argument is the feeds."""
        return self._functions[padded].get_concrete_function()

    def reset(self, number: int) -> None:
        """Begin anew at the classifier's present values, for a phase of so many steps."""
        self._lengths = schedule(number)
        for optimizer in self._optimizers:
            optimizer.reset()
        self.reset_sums()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of all that steps change beside the classifier's variables."""
        state = self._optimizers[0].state
        return checkpoints.copied(state, "optimizer") | checkpoints.copied(self._sums, "sum")

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from a ``state``, with the classifier's variables as they were then."""
        for optimizer in self._optimizers:
            optimizer.reset()
            checkpoints.assign(optimizer.state, state, "optimizer")
        checkpoints.assign(self._sums, state, "sum")

    def __call__(
        self, call: Call, seed: int, done: int, votes: tuple[float, float] = (0.0, 0.0)
    ) -> tuple[float, float]:
        """Take the steps of a call, and return the sums of all workers' ``votes``.

        All workers call it with as many steps.

        Args:
            call: of all replicas of this worker.
            seed: of the phase; each step draws from it and its number.
            done: steps taken before.
            votes: this worker's.
        """
        numbers = tuple(tf.constant(number, tf.int32) for number in (call.steps, seed, done))
        lengths = tuple(tf.constant(length, tf.float32) for length in self._lengths)
        self._functions[call.padded](call.feeds, call.sizes, numbers, lengths, tf.constant(votes))
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
