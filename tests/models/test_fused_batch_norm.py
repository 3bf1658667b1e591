"""The fused BatchNorm computes what Keras's own does."""

from __future__ import annotations

import os
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from job.models.fused_batch_norm import FusedBatchNormalization, fuse

# (output or gradient) of two implementations, each accurate to float32, after a sum over 1,568 values
CLOSE = 2e-5


def _pair(momentum: float, **options: bool) -> tuple[keras.Model, keras.Model]:
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((7, 7, 6))
        norm = keras.layers.BatchNormalization(momentum=momentum, epsilon=1e-3, **options)
        models.append(keras.Model(inputs, norm(inputs)))
        values = [
            np.random.default_rng(i).uniform(0.5, 2, w.shape).astype(np.float32) for i, w in enumerate(norm.weights)
        ]
        norm.set_weights(values)
    fuse(models[1].layers)
    return models[0], models[1]


def _run(model: keras.Model, training: bool) -> list[Any]:
    x = tf.constant(np.random.default_rng(7).normal(3, 2, (32, 7, 7, 6)).astype(np.float32))
    weight = tf.constant(np.random.default_rng(8).normal(size=(32, 7, 7, 6)).astype(np.float32))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = model(x, training=training)
        loss = tf.reduce_mean(tf.cast(y, tf.float32) * weight)
    gradients = tape.gradient(loss, [x, *(variable.value for variable in model.trainable_variables)])
    return [y, *gradients, *(variable.numpy() for variable in model.non_trainable_variables)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.999, 0.9, 0.0])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}])
def test_outputs_gradients_and_moving_averages_are_those_of_keras(
    training: bool, momentum: float, options: dict[str, bool]
) -> None:
    plain, fused = _pair(momentum, **options)
    assert isinstance(fused.layers[1], FusedBatchNormalization)
    for expected, found in zip(_run(plain, training), _run(fused, training), strict=True):
        np.testing.assert_allclose(found, expected, atol=CLOSE, rtol=CLOSE)


def test_a_batch_of_one_value_per_channel_has_no_variance() -> None:
    layers = [keras.layers.BatchNormalization(momentum=0.0)]
    inputs = keras.Input((1, 1, 3))
    model = keras.Model(inputs, layers[0](inputs))
    fuse(layers)
    model(tf.ones([1, 1, 1, 3]), training=True)
    assert layers[0].moving_variance.numpy().tolist() == [0.0] * 3


def test_batch_norm_of_dense_features_stays_as_it_is() -> None:
    layer = keras.layers.BatchNormalization()
    layer(keras.Input((5,)))
    fuse([layer])
    assert type(layer) is keras.layers.BatchNormalization


@pytest.mark.skipif(
    "ONEDNN_MAX_CPU_ISA" in os.environ and os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0",
    reason="TensorFlow asks oneDNN for bfloat16 by what the CPU has, whatever oneDNN is limited to, and is refused",
)
@pytest.mark.usefixtures("dtype_policy")
@pytest.mark.parametrize("dtype_policy", ["mixed_bfloat16"], indirect=True)
def test_under_mixed_precision_statistics_stay_in_single_precision() -> None:
    plain, fused = _pair(0.9)
    expected, found = _run(plain, training=True), _run(fused, training=True)
    assert found[0].dtype == expected[0].dtype == tf.bfloat16
    for one, other in zip(expected[-2:], found[-2:], strict=True):
        assert other.dtype == np.float32
        np.testing.assert_allclose(other, one, rtol=1e-2)
