"""What two parts of the training step are worth: fused BatchNorm and the flat optimizer, each beside Keras's own.

    python -m tests.parts    a few minutes on two cores; ends in one line of JSON

MobileNetV2 at 160 px, batches of 32 random photos. Rates alternate between the two and are medians; ``ratio`` is the
median over the pairs. The optimizers' first updates, which trace them, are timed once each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from job.arms import Part, Phase
from job.backbone_table import BACKBONES
from job.backbones import build, preprocessing
from job.model import Classifier, Head
from job.optimizers import FlatOptimizer, make_optimizer
from job.training import Steps

ROW = BACKBONES["MobileNetV2"]
SIZE, BATCH, PAIRS = 160, 32, 6


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(fused: Callable[[], Any], plain: Callable[[], Any], examples: int) -> dict[str, float]:
    """Return both rates, in examples per second, and their ratio."""
    fused()
    plain()
    pairs = [(seconds(fused), seconds(plain)) for _ in range(PAIRS)]
    return {
        "ours": median(examples / ours for ours, _ in pairs),
        "keras": median(examples / theirs for _, theirs in pairs),
        "ratio": median(theirs / ours for ours, theirs in pairs),
    }


def classifier(backbone: keras.Model) -> Classifier:
    return Classifier(backbone, preprocessing(ROW), Head(2), 0)


def main() -> None:
    pixels = tf.constant(np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8))
    labels = tf.constant(np.arange(BATCH) % 2, tf.int32)
    order = np.arange(BATCH)[None]
    plain = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    steps, forward = {}, {}
    for name, model in (("ours", classifier(build(ROW, SIZE))), ("keras", classifier(plain))):
        phase = Phase("all", Part.ALL, 1, 1e-3, trains_batch_norm=True)
        steps[name] = Steps(model, phase, model.cut(Part.ALL), make_optimizer("adam", 1e-3, 100), xla=False)
        forward[name] = model.inference(model.cut(Part.ALL))

    def step(name: str) -> Callable[[], Any]:
        return lambda: (steps[name](pixels, labels, order, 0, 0), steps[name].take_sums())

    found = {
        "BatchNorm, training step": compare(step("ours"), step("keras"), BATCH),
        "BatchNorm, forward pass": compare(
            lambda: forward["ours"](pixels).numpy(), lambda: forward["keras"](pixels).numpy(), BATCH
        ),
    }

    variables = plain.trainable_variables
    gradients = [tf.ones(variable.shape) for variable in variables]
    own = make_optimizer("adam", 1e-3, 100)
    own.build(variables)
    flat = FlatOptimizer(make_optimizer("adam", 1e-3, 100), variables)
    updates = {
        "ours": tf.function(lambda: flat.apply(gradients), autograph=False),
        "keras": tf.function(lambda: own.apply(gradients, variables), autograph=False),
    }
    first = {name: seconds(update) for name, update in updates.items()}
    found["optimizer, first update"] = {**first, "ratio": first["keras"] / first["ours"]}
    found["optimizer, updates"] = compare(updates["ours"], updates["keras"], 1)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
