"""What single parts of the job are worth, each beside what it replaced: the figures of ARCHITECTURE.md.

    python -m tests.measure.parts    a few minutes on two cores; ends in JSON

MobileNetV2 at 160 px, batches of 32 random photos. Rates alternate between the two and are medians; ``ratio`` is the
median over the pairs. What traces a graph (first updates, exports) is timed once each, in seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from job.arms import Part, Phase
from job.backbone_table import BACKBONES
from job.data.row_files import RowFileWriter
from job.data.rows import Rows
from job.machine.replicas import Replicas
from job.models.backbones import build, preprocessing
from job.models.classifier import Classifier, Head
from job.models.export import Exporter
from job.models.inference import run_over
from job.training.feeds import Feeder, Residents
from job.training.optimizers import FlatOptimizer, joined, make_optimizer
from job.training.stages import Stage
from job.training.steps import Steps

ROW = BACKBONES["MobileNetV2"]
SIZE, BATCH, PAIRS = 160, 32, 6


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(ours: Callable[[], Any], instead: Callable[[], Any], examples: int) -> dict[str, float]:
    """Return both rates, in examples per second, and their ratio."""
    ours()
    instead()
    pairs = [(seconds(ours), seconds(instead)) for _ in range(PAIRS)]
    return {
        "ours": median(examples / mine for mine, _ in pairs),
        "instead": median(examples / theirs for _, theirs in pairs),
        "ratio": median(theirs / ours for ours, theirs in pairs),
    }


def classifier(backbone: keras.Model) -> Classifier:
    return Classifier(backbone, preprocessing(ROW), Head(2), 0)


def main() -> None:
    pixels = tf.constant(np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8))
    labels = tf.constant(np.arange(BATCH) % 2, tf.int32)
    plain = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    rows = Rows(("",) * BATCH, labels.numpy(), pixels.numpy(), (b"",) * BATCH)
    steps, forward = {}, {}
    for name, model in (("ours", classifier(build(ROW, SIZE))), ("keras", classifier(plain))):
        phase = Phase("all", Part.ALL, 1, 1e-3, trains_batch_norm=True)
        stage = Stage(phase, model.cut(Part.ALL), rows, np.arange(BATCH), rows)
        steps[name] = Steps(model, stage, "adam", BATCH, xla=False)
        call = Feeder(*stage.stepped, BATCH, Replicas(), Residents(Replicas()), 1).read([np.arange(BATCH)])
        forward[name] = model.inference(model.cut(Part.ALL))

    def step(name: str) -> Callable[[], Any]:
        return lambda: (steps[name](call, 0, 0), steps[name].sums())

    found = {
        "BatchNorm, training step": compare(step("ours"), step("keras"), BATCH),
        "BatchNorm, forward pass": compare(
            lambda: forward["ours"](pixels).numpy(), lambda: forward["keras"](pixels).numpy(), BATCH
        ),
    }

    variables = plain.trainable_variables
    gradients = [tf.ones(variable.shape) for variable in variables]
    own = make_optimizer("adam", 1e-3)
    own.build(variables)
    flat = FlatOptimizer(make_optimizer("adam"), [variable.value for variable in variables])
    rate = tf.constant(1e-3)
    updates = {
        "ours": tf.function(lambda: flat.apply(joined(gradients), rate), autograph=False),
        "keras": tf.function(lambda: own.apply(gradients, variables), autograph=False),
    }
    first = {name: seconds(update) for name, update in updates.items()}
    found["optimizer, first update"] = {**first, "ratio": first["keras"] / first["ours"]}
    found["optimizer, updates"] = compare(updates["ours"], updates["keras"], 1)

    many = np.resize(pixels.numpy(), (512, SIZE, SIZE, 3))
    one_by_one = [tf.constant(many[start : start + BATCH]) for start in range(0, len(many), BATCH)]
    found["inference, two batches in flight"] = compare(
        lambda: run_over(forward["ours"], many),
        lambda: [forward["ours"](batch).numpy() for batch in one_by_one],
        len(many),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = np.random.default_rng(1).normal(size=(1600, 10, 10, 96)).astype(np.float32)
        with RowFileWriter(folder / "rows.npy", rows.shape[1:], rows.dtype, len(rows)) as writer:
            writer.write(rows)
        index = np.random.default_rng(2).permutation(len(rows))[:BATCH]
        found["rows from a file, beside an array"] = compare(
            lambda: [writer.rows[index] for _ in range(100)], lambda: [rows[index] for _ in range(100)], 100 * BATCH
        )
        exporter, model = Exporter(["a", "b"]), classifier(build(ROW, SIZE))
        times = {
            which: seconds(lambda which=which: exporter.export(model, folder / which)) for which in ("first", "next")
        }
        found["export"] = {**times, "ratio": times["first"] / times["next"]}
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
