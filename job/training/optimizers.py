"""Keras's optimizers on one flat vector instead of hundreds of variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# Share of a phase's steps over which the learning rate rises to its peak before the cosine decay to zero.
WARM_UP = 0.1


def schedule(steps: int) -> tuple[int, int]:
    """Return over how many of a phase's ``steps`` the rate rises, and over how many it falls."""
    warm_up = min(steps - 1, max(1, round(WARM_UP * steps))) if steps > 1 else 0
    return warm_up, max(1, steps - warm_up)


def rate_at(step: tf.Tensor, peak: float, warm_up: tf.Tensor, decay: tf.Tensor) -> tf.Tensor:
    """Return the learning rate of ``step``, from 0: it rises linearly to ``peak``, then falls to zero along a cosine.

    It is keras.optimizers.schedules.CosineDecay's, bit for bit, but with numbers of steps that are tensors (float32
    scalars, as ``schedule`` gives them): one compiled step serves phases of any length.
    """
    done = tf.minimum(tf.cast(step, tf.float32), warm_up + decay)
    rising = peak * (done / tf.maximum(warm_up, 1.0))
    falling = peak * (0.5 * (1.0 + tf.cos(math.pi * ((done - warm_up) / decay))))
    return tf.where(done < warm_up, rising, falling)


def make_optimizer(name: str, learning_rate: Any = 0.0) -> Any:
    """Return a keras optimizer at this rate or schedule. Under mixed_float16 it scales the loss, as gradients need."""
    optimizers: dict[str, Callable[[], Any]] = {
        "adam": lambda: keras.optimizers.Adam(learning_rate),
        "adamw": lambda: keras.optimizers.AdamW(learning_rate),
        "rmsprop": lambda: keras.optimizers.RMSprop(learning_rate),
        "sgd": lambda: keras.optimizers.SGD(learning_rate, momentum=0.9),
    }
    optimizer = optimizers[name]()
    if keras.config.dtype_policy().compute_dtype == "float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


class FlatOptimizer:
    """Updates many variables as one vector; every rule here is elementwise, so the values are Keras's own.

    Keras updates MobileNetV2's 156 variables one by one, with more operations than the network itself has; as one
    vector the first update, tracing included, took 1.5 s instead of 8.5 s.
    """

    def __init__(self, optimizer: Any, variables: Sequence[tf.Variable]) -> None:
        """Take a fresh keras optimizer; ``variables`` are float32, of any shape, and keep their present values."""
        self._optimizer = optimizer
        self._variables = list(variables)
        self._sizes = [int(np.prod(variable.shape)) for variable in self._variables]
        self._flat = keras.Variable(tf.zeros([sum(self._sizes)]), name="flat")
        optimizer.build([self._flat])
        self._initial = [np.array(variable) for variable in optimizer.variables]
        self.reset()

    @property
    def state(self) -> list[keras.Variable]:
        """Return the variables that an update changes beside those that it updates."""
        return list(self._optimizer.variables)

    def reset(self) -> None:
        """Begin anew at the variables' present values: step 0, no momentum."""
        for variable, value in zip(self._optimizer.variables, self._initial, strict=True):
            variable.assign(value)
        self._flat.assign(joined(self._variables))

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """Return ``loss`` (float32 scalar) as its gradients should be taken of."""
        return self._optimizer.scale_loss(loss)

    def apply(self, gradient: tf.Tensor, rate: tf.Tensor) -> None:
        """Take one step at ``rate`` (float32 scalar) along the gradients of all variables, ``joined``."""
        self._optimizer.learning_rate.assign(rate)
        self._optimizer.apply([gradient], [self._flat])
        parts = tf.split(self._flat.value, self._sizes)
        for variable, part in zip(self._variables, parts, strict=True):
            variable.assign(tf.reshape(part, variable.shape))


def joined(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Return the elements of all ``tensors`` as one vector."""
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)
