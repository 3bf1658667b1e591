"""One flat vector is updated as Keras updates many variables."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from job.training.optimizers import FlatOptimizer, joined, make_optimizer, rate_at, schedule
from tests.measure.plain_keras import cosine

SHAPES = ((3, 3, 2, 4), (4,), (5, 3), (1,))


def variables() -> list[keras.Variable]:
    generator = np.random.default_rng(0)
    return [keras.Variable(generator.normal(size=shape).astype(np.float32)) for shape in SHAPES]


def rate(step: int, peak: float = 0.1, steps: int = 20) -> tf.Tensor:
    return rate_at(tf.constant(step), peak, *(tf.constant(length, tf.float32) for length in schedule(steps)))


def flat(optimizer: str, values: list[keras.Variable]) -> FlatOptimizer:
    return FlatOptimizer(make_optimizer(optimizer), [variable.value for variable in values])


def gradients(step: int) -> list[Any]:
    generator = np.random.default_rng(step + 1)
    return [tf.constant(generator.normal(size=shape).astype(np.float32)) for shape in SHAPES]


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "sgd"])
def test_values_are_those_of_keras_bit_for_bit(name: str) -> None:
    keras_own, own = variables(), variables()
    optimizer = make_optimizer(name, cosine(0.1, 20))
    optimizer.build(keras_own)
    ours = flat(name, own)
    for step in range(6):
        optimizer.apply(gradients(step), keras_own)
        ours.apply(joined(gradients(step)), rate(step))
        for expected, found in zip(keras_own, own, strict=True):
            np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_a_reset_begins_at_the_present_values_without_memory() -> None:
    values = variables()
    optimizer = flat("adam", values)
    ends = []
    for _ in range(2):
        for variable, start in zip(values, variables(), strict=True):
            variable.assign(start)
        optimizer.reset()
        for step in range(3):
            optimizer.apply(joined(gradients(step)), rate(step))
        ends.append([variable.numpy().copy() for variable in values])
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("dtype_policy")
@pytest.mark.parametrize("dtype_policy", ["mixed_float16"], indirect=True)
def test_in_half_precision_the_loss_is_scaled_and_a_step_that_overflows_changes_nothing() -> None:
    values = variables()
    optimizer = flat("sgd", values)
    assert float(optimizer.scale_loss(tf.constant(1.0))) > 1
    before = [variable.numpy().copy() for variable in values]
    optimizer.apply(joined([tf.fill(shape, np.float32(np.inf)) for shape in SHAPES]), rate(3))
    for variable, kept in zip(values, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), kept)


def test_the_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    rates = [float(rate(step, 0.5, 100)) for step in range(101)]
    assert rates[0] == 0.0
    assert max(rates) == pytest.approx(0.5)
    assert rates.index(max(rates)) == 10
    assert rates[100] == pytest.approx(0.0, abs=1e-6)
    assert float(rate(0, 0.5, 1)) == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 1234])
def test_the_rate_is_that_of_keras_bit_for_bit(steps: int) -> None:
    keras_own = cosine(3e-4, steps)
    assert [float(rate(step, 3e-4, steps)) for step in range(steps)] == [
        float(keras_own(step)) for step in range(steps)
    ]
