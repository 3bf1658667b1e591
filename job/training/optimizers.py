"""Keras's optimizers on one flat vector instead of hundreds of variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# Share of a phase's steps over which the learning rate rises to its peak before the cosine decay to zero.
WARM_UP = 0.1


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


class FlatOptimizer:
    """Updates many variables as one vector; every rule here is elementwise, so the values are Keras's own.

    Keras updates MobileNetV2's 156 variables one by one, with more operations than the network itself has; as one
    vector the first update, tracing included, took 1.5 s instead of 8.5 s.
    """

    def __init__(self, optimizer: Any, variables: Sequence[keras.Variable]) -> None:
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
        self._flat.assign(joined([variable.value for variable in self._variables]))

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """Return ``loss`` (float32 scalar) as its gradients should be taken of."""
        return self._optimizer.scale_loss(loss)

    def apply(self, gradient: tf.Tensor) -> None:
        """Take one step along the gradients of all variables, ``joined``."""
        self._optimizer.apply([gradient], [self._flat])
        parts = tf.split(self._flat.value, self._sizes)
        for variable, part in zip(self._variables, parts, strict=True):
            variable.assign(tf.reshape(part, variable.shape))


def joined(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Return the elements of all ``tensors`` as one vector."""
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)
