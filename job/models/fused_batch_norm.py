"""BatchNorm in one operation instead of a dozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from job.machine.replicas import sum_over_replicas


@dataclass(frozen=True)
class Synchronised:
    """What BatchNorm does with a part of a batch: it normalises by the whole of it, and leaves out what fills it up.

    weight: float32 [n], 1 for rows of the batch and 0 for others. alone: whether these rows are all, so that nothing is
    to be summed with other replicas. moments: each layer's mean and variance [channels] over all replicas, in order of
    computation. They are given out here, and not averaged into the layer's variables, because a replica assigns to
    none.
    """

    weight: tf.Tensor
    alone: bool = False
    moments: list[tuple[keras.layers.BatchNormalization, tf.Tensor, tf.Tensor]] = field(default_factory=list)


_synchronised: ContextVar[Synchronised | None] = ContextVar("synchronised", default=None)


@contextmanager
def synchronised(weight: tf.Tensor, *, alone: bool = False) -> Iterator[Synchronised]:
    """Have the BatchNorm layers that are called in the block take their statistics over all rows of this weight."""
    found = Synchronised(weight, alone)
    token = _synchronised.set(found)
    try:
        yield found
    finally:
        _synchronised.reset(token)


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Keras's layer on FusedBatchNormV3: float [batch, height, width, channels] -> the same.

    Keras 3 normalises with separate operations, each a pass over the whole feature map. Fused, MobileNetV2's training
    step at 160 px was 1.8 times as fast on a CPU and its forward pass 1.3 times. Results differ from Keras's by
    rounding; variables, momentum and what enters the moving averages are the same.

    unfused_when_frozen: whether it normalises by the moving averages in separate operations: with them, the fused one
    has no gradient on a GPU that repeats bit for bit ("A deterministic GPU implementation of fused batch-norm backprop,
    when training is disabled, is not currently available").
    """

    unfused_when_frozen = False

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:  # noqa: ARG002
        """Normalise by the batch where ``training``, by the moving averages otherwise."""
        channels = inputs.shape[-1]
        by_batch = bool(training and self.trainable)
        if by_batch and (over_all := _synchronised.get()) is not None:
            return self._over_all(inputs, over_all)
        if self.unfused_when_frozen and not by_batch:
            return self._frozen(inputs)
        no_statistics = tf.zeros([0], tf.float32)
        normalised, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=tf.cast(inputs, self.compute_dtype),
            scale=tf.convert_to_tensor(self.gamma) if self.scale else tf.ones([channels]),
            offset=tf.convert_to_tensor(self.beta) if self.center else tf.zeros([channels]),
            mean=no_statistics if by_batch else tf.convert_to_tensor(self.moving_mean),
            variance=no_statistics if by_batch else tf.convert_to_tensor(self.moving_variance),
            epsilon=self.epsilon,
            is_training=by_batch,
        )
        if by_batch:
            # the operation returns the sample variance, Keras averages the population's
            count = tf.cast(tf.size(inputs) // channels, tf.float32)
            variance *= tf.maximum(count - 1.0, 1.0) / count
            self.average(mean, variance)
        return normalised

    def _frozen(self, inputs: tf.Tensor) -> tf.Tensor:
        normalised = tf.nn.batch_normalization(
            tf.cast(inputs, tf.float32),
            tf.convert_to_tensor(self.moving_mean),
            tf.convert_to_tensor(self.moving_variance),
            tf.convert_to_tensor(self.beta) if self.center else None,
            tf.convert_to_tensor(self.gamma) if self.scale else None,
            self.epsilon,
        )
        return tf.cast(normalised, self.compute_dtype)

    def average(self, mean: tf.Tensor, variance: tf.Tensor, moving: Sequence[Any] = ()) -> None:
        """Take a batch's mean and variance [channels] into the moving averages, or into a replica's copies of them."""
        for average, batch in zip(moving or (self.moving_mean, self.moving_variance), (mean, variance), strict=True):
            average.assign(average * self.momentum + batch * (1.0 - self.momentum))

    def _over_all(self, inputs: tf.Tensor, over_all: Synchronised) -> tf.Tensor:
        """Normalise by the mean and variance of the rows of all replicas, however many each has."""
        x = tf.cast(inputs, tf.float32)
        gamma = tf.convert_to_tensor(self.gamma) if self.scale else tf.ones([x.shape[-1]])
        beta = tf.convert_to_tensor(self.beta) if self.center else tf.zeros([x.shape[-1]])
        total = _itself if over_all.alone else sum_over_replicas
        normalised, mean, variance = _normalise_over_all(x, gamma, beta, over_all.weight, self.epsilon, total)
        over_all.moments.append((self, mean, variance))
        return tf.cast(normalised, self.compute_dtype)


def _itself(tensor: tf.Tensor) -> tf.Tensor:
    return tensor


def _normalise_over_all(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    weight: tf.Tensor,
    epsilon: float,
    over_replicas: Callable[[tf.Tensor], tf.Tensor],
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return ``x`` [batch, height, width, channels] normalised over all replicas, and the mean and variance of it.

    weight: float32 [batch], of each row. over_replicas: returns the sum of a tensor over all replicas.

    With a gradient of its own (Ioffe and Szegedy 2015, section 3): taken operation by operation it needs twice as many
    passes over the feature map.
    """
    channels = x.shape[-1]
    axes = (0, 1, 2)
    weights = weight[:, None, None, None]

    def forward(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
        count = tf.reduce_sum(weight) * (x.shape[1] * x.shape[2])
        sums = [tf.reduce_sum(x * weights, axes), tf.reduce_sum(tf.square(x) * weights, axes), count[None]]
        total = over_replicas(tf.concat(sums, axis=0))
        every = total[-1]
        mean = total[:channels] / every
        variance = tf.maximum(total[channels:-1] / every - tf.square(mean), 0.0)
        inverse = tf.math.rsqrt(variance + epsilon)
        scale = gamma * inverse

        def gradient(of_result: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            of_beta = tf.reduce_sum(of_result, axes)
            of_gamma = (tf.reduce_sum(of_result * x, axes) - of_beta * mean) * inverse
            both = over_replicas(tf.concat([of_beta, of_gamma], axis=0)) / every
            slope = -both[channels:] * inverse
            # what fills an empty part of the batch up is no part of the statistics
            of_x = scale * weights * (of_result + x * slope - (both[:channels] + mean * slope))
            return of_x, of_gamma, of_beta

        return (x * scale + (beta - mean * scale), mean, variance), gradient

    found: tuple[tf.Tensor, tf.Tensor, tf.Tensor] = tf.custom_gradient(forward)(x, gamma, beta)
    return found


# Keras's .weights.h5 files name a layer's group by its class, so under another name their values would not be found.
FusedBatchNormalization.__name__ = "BatchNormalization"


def fuse(layers: list[keras.layers.Layer]) -> None:
    """Make every BatchNorm among ``layers`` that can be a fused one, in place, with its variables and connections.

    In place, since ``keras.models.clone_model`` builds the network a second time (1 to 10 s) and orders its layers
    differently. BatchNorm on something else than the channels of a feature map stays as it is.
    """
    for layer in layers:
        if type(layer) is keras.layers.BatchNormalization and _is_plain(layer):
            layer.__class__ = FusedBatchNormalization


def unfuse_when_frozen(layers: Sequence[keras.layers.Layer]) -> None:
    """Have the fused BatchNorms among ``layers`` take separate operations where they normalise by moving averages."""
    for layer in layers:
        if isinstance(layer, FusedBatchNormalization):
            layer.unfused_when_frozen = True


def flatten(model: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers of ``model`` and of the models among them, in order of computation."""
    flat: list[keras.layers.Layer] = []
    for layer in model.layers:
        flat.extend(flatten(layer) if isinstance(layer, keras.Model) else [layer])
    return flat


def _is_plain(layer: keras.layers.BatchNormalization) -> bool:
    rank = len(layer.input.shape)
    return rank == 4 and layer.axis in (-1, 3) and not layer.renorm and not layer.synchronized
