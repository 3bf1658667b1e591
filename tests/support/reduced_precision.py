"""The job on a machine whose kernels round by the shape of the batch, as a GPU's do; emulated on the CPU.

    python -m tests.support.reduced_precision MODE    the settings are the environment's, as of python -m job run

cuDNN chooses kernels by shape, so the proof's 24 photos may see others than evaluation's 32. Here TensorFlow's
functions of convolutions and matrix products are replaced by some that round in one way for batches of 32 and more, and
in another for smaller ones:

    float32   sums in two parts
    tf32      float32's 23 bits, where larger batches, and their gradients, are rounded to TF32's 10
    float16   sums in two parts that are rounded each, where larger batches are rounded once
    bfloat16  the same; in both, products of float32, which are the head's, are as in tf32

It is the worst that kernels of such arithmetic can do. In the quickstart (MobileNetV2, three arms, 27 times 24 photos)
logits differed by at most 1e-5, 0.055, 0.024 and 0.41 of their spread; in the last three by 0.013, 0.011 and 0.086
where nothing but the order of sums is another. An H100's features were 0.003 to 0.007 of their deviation off in TF32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import tensorflow as tf

MODES = ("float32", "tf32", "float16", "bfloat16")
# Evaluation takes batches of 32, the proof one of 24.
FEW = 32
Product = Callable[..., tf.Tensor]


def emulate(mode: str) -> None:
    """Replace TensorFlow's own functions, in this process and in every graph that it writes."""
    # of a filter or matrix, the axis along which sums are taken apart: input channels, or rows of a depthwise filter
    for module, name, axis in (
        (tf.nn, "convolution", -2),
        (tf.nn, "conv2d", -2),
        (tf.nn, "depthwise_conv2d", 0),
        (tf, "matmul", -2),
        (tf.linalg, "matmul", -2),
    ):
        setattr(module, name, _rounding(getattr(module, name), axis, tf32=mode != "float32"))


def _rounding(product: Product, axis: int, *, tf32: bool) -> Product:
    """Return ``product`` of float [batch, ...] and weights, in one of two ways by the size of the batch."""

    def rounding(x: tf.Tensor, weights: tf.Tensor, *args: object, **kwargs: object) -> tf.Tensor:
        x, weights = tf.convert_to_tensor(x), tf.convert_to_tensor(weights)
        few = tf.shape(x)[0] < FEW
        if tf32 and x.dtype == tf.float32:
            return _rounded_gradient(product(_rounded(x, few), _rounded(weights, few), *args, **kwargs), few)

        def once(part: tf.Tensor) -> tf.Tensor:
            return tf.cast(product(tf.cast(x, tf.float32), tf.cast(part, tf.float32), *args, **kwargs), x.dtype)

        def in_parts() -> tf.Tensor:
            shape = [1] * len(weights.shape)
            shape[axis] = weights.shape[axis]
            every_other = tf.cast(tf.reshape(tf.range(shape[axis]) % 2, shape), weights.dtype)
            return once(weights * every_other) + once(weights * (1 - every_other))

        return tf.cond(few, in_parts, lambda: once(weights))

    return rounding


def _rounded(x: tf.Tensor, few: tf.Tensor) -> tf.Tensor:
    """Return float32 ``x`` in TF32, unless it is of few; the gradient passes as it is."""
    return tf.custom_gradient(lambda x: (tf.cond(few, lambda: x, lambda: _to_tf32(x)), lambda upstream: upstream))(x)


def _rounded_gradient(y: tf.Tensor, few: tf.Tensor) -> tf.Tensor:
    """Return ``y`` as it is; its gradient is taken in TF32, unless it is of few."""

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        return tf.cond(few, lambda: upstream, lambda: _to_tf32(upstream))

    return tf.custom_gradient(lambda y: (tf.identity(y), gradient))(y)


def _to_tf32(x: tf.Tensor) -> tf.Tensor:
    """Return float32 ``x`` rounded to the nearest number of 10 bits after the point, ties to even."""
    bits, one, dropped = tf.bitcast(x, tf.uint32), tf.constant(1, tf.uint32), tf.constant(23 - 10, tf.uint32)
    last_kept = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, dropped), one)
    below_half = tf.bitwise.left_shift(one, dropped - one) - one
    raised = tf.bitwise.right_shift(bits + below_half + last_kept, dropped)
    return tf.bitcast(tf.bitwise.left_shift(raised, dropped), tf.float32)


def main() -> None:
    (mode,) = sys.argv[1:]
    if mode not in MODES:
        raise SystemExit(f"received {mode}; accepted: {', '.join(MODES)}")
    emulate(mode)
    from job.experiment import run
    from job.machine import console, runtime
    from job.settings import environment

    settings = environment.load()
    screen = console.start(settings.runtime.log_format)
    machine = runtime.start(settings.runtime, settings.platform)
    # what a GPU's runtime says of itself
    run.run(settings, replace(machine, tf32=mode != "float32"), screen)


if __name__ == "__main__":
    main()
