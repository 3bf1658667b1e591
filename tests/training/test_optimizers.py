"""One flat vector is updated as Keras updates many variables."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from job.training.optimizers import FlatOptimizer, joined, make_optimizer

SHAPES = ((3, 3, 2, 4), (4,), (5, 3), (1,))


def variables() -> list[keras.Variable]:
    generator = np.random.default_rng(0)
    return [keras.Variable(generator.normal(size=shape).astype(np.float32)) for shape in SHAPES]


def gradients(step: int) -> list[Any]:
    generator = np.random.default_rng(step + 1)
    return [tf.constant(generator.normal(size=shape).astype(np.float32)) for shape in SHAPES]


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "sgd"])
def test_values_are_those_of_keras_bit_for_bit(name: str) -> None:
    keras_own, flat = variables(), variables()
    optimizer = make_optimizer(name, 0.1, 20)
    optimizer.build(keras_own)
    ours = FlatOptimizer(make_optimizer(name, 0.1, 20), flat)
    for step in range(6):
        optimizer.apply(gradients(step), keras_own)
        ours.apply(joined(gradients(step)))
        for expected, found in zip(keras_own, flat, strict=True):
            np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_a_reset_begins_at_the_present_values_without_memory() -> None:
    values = variables()
    optimizer = FlatOptimizer(make_optimizer("adam", 0.1, 20), values)
    ends = []
    for _ in range(2):
        for variable, start in zip(values, variables(), strict=True):
            variable.assign(start)
        optimizer.reset()
        for step in range(3):
            optimizer.apply(joined(gradients(step)))
        ends.append([variable.numpy().copy() for variable in values])
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("dtype_policy")
@pytest.mark.parametrize("dtype_policy", ["mixed_float16"], indirect=True)
def test_in_half_precision_the_loss_is_scaled_and_a_step_that_overflows_changes_nothing() -> None:
    values = variables()
    optimizer = FlatOptimizer(make_optimizer("sgd", 0.1, 20), values)
    assert float(optimizer.scale_loss(tf.constant(1.0))) > 1
    before = [variable.numpy().copy() for variable in values]
    optimizer.apply(joined([tf.fill(shape, np.float32(np.inf)) for shape in SHAPES]))
    for variable, kept in zip(values, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), kept)


def test_the_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    schedule = make_optimizer("adam", 0.5, 100)._learning_rate
    rates = [float(schedule(step)) for step in range(101)]
    assert rates[0] == 0.0
    assert max(rates) == pytest.approx(0.5)
    assert rates.index(max(rates)) == 10
    assert rates[100] == pytest.approx(0.0, abs=1e-6)
    assert float(make_optimizer("adam", 0.5, 1)._learning_rate(0)) == pytest.approx(0.5)
