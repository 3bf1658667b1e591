"""All randomness: a function of the seed, of what it is for, and of the step and the place in the batch."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from keras.src.random import seed_generator

# What a step draws numbers for. Each has a stream of its own, so that one setting does not change another's draws.
DROPOUT, AUGMENTATION = range(2)


def derived_seed(seed: int, purpose: str, *counters: int) -> int:
    """Return a 31-bit seed that depends on all arguments and on nothing else.

    All randomness is a function of (seed, purpose, step), so that a resumed run draws what the undisturbed one drew.
    """
    entropy = (seed, zlib.crc32(purpose.encode()), *counters)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)


@contextmanager
def initial_values(seed: int) -> Iterator[None]:
    """Have layers that are made in the block begin with values that hang on ``seed`` and on nothing else.

    Keras 3 draws a seed for each initializer from Python's own generator, from which other threads draw too: Google's
    client waits for random times before it tries again, and the layers made after that had other values. So Keras is
    given a generator of its own, in the one place where it names it. The values are those of ``set_random_seed``.
    """
    keras.utils.set_random_seed(seed)
    shared = seed_generator.python_random
    seed_generator.python_random = random.Random(seed)  # noqa: S311
    try:
        yield
    finally:
        seed_generator.python_random = shared


@dataclass(frozen=True)
class Chance:
    """Where the random numbers of one step come from; no state, so that a resumed run draws the same.

    seed: int32 [2], of the phase and the step. batch: examples that a whole batch has at most. places: int64 [n],
    where in it the present rows stand: numbers belong to a place, however the batch is divided among replicas. Both
    None where the rows are the whole batch.
    """

    seed: tf.Tensor
    batch: int | None = None
    places: tf.Tensor | None = None

    def uniform(self, purpose: int, rows: tf.Tensor, width: int) -> tf.Tensor:
        """Return float32 [n, width] in [0, 1) for ``rows`` [n, ...]."""
        batch = tf.shape(rows)[0] if self.batch is None else self.batch
        # by default the algorithm would be the device's choice
        seed = tf.random.experimental.stateless_fold_in(self.seed, purpose, alg="philox")
        bits = tf.random.stateless_uniform([batch, width], seed, None, None, tf.uint32, alg="philox")
        # TensorFlow makes a number of the lower 23 bits, XLA of the upper ones: so it is done here, as TensorFlow does
        fraction = tf.bitwise.bitwise_and(bits, tf.constant(0x7FFFFF, tf.uint32))
        drawn = tf.bitcast(tf.bitwise.bitwise_or(fraction, tf.constant(0x3F800000, tf.uint32)), tf.float32) - 1.0
        return drawn if self.places is None else tf.gather(drawn, self.places)
