"""Rates of tuned plain Keras, an arm at a time when it is told to: one of the processes of ``gpu_turns``.

    python -m tests.measure.gpu_keras plain    reads TRANSFER_ variables; an arm's name on standard input measures it

Tuned as ``plain_keras`` does it: photos decoded once to uint8 in memory, everything else parallel and ahead of time;
in the job's precision, and compiled by XLA where ``xla`` is said instead of ``plain``.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import keras

from job.arms import ARMS, Part
from job.data import dataset
from job.machine import runtime
from job.models.backbones import first_trainable
from job.settings.environment import Settings, load
from job.training.stages import phases_of
from tests.measure.gpu_turns import answer
from tests.measure.plain_keras import tuned_batches


class Fitted:
    """One arm that is compiled: epochs of its last phase.

    train: the photos as ``fit`` takes them, ``examples`` of them. seconds: of a turn.
    """

    def __init__(self, model: keras.Model, train: Any, examples: int, seconds: float) -> None:
        self._model, self._train, self._examples, self._seconds = model, train, examples, seconds
        self.compile_seconds = self._fit(1)
        self._epoch_seconds = self._fit(1)

    def _fit(self, epochs: int) -> float:
        start = time.perf_counter()
        # not to be shuffled: the data set does that, and fit would only warn that it cannot
        self._model.fit(self._train, epochs=epochs, shuffle=False, verbose=0)
        return time.perf_counter() - start

    def turn(self) -> dict[str, Any]:
        """Return its rate, in images a second."""
        epochs = math.ceil(self._seconds / self._epoch_seconds)
        return {"training": epochs * self._examples / self._fit(epochs)}


def compiled(name: str, settings: Settings, classes: int, *, xla: bool) -> keras.Model:
    """Return an arm as it trains in its last phase, with the variables of the job."""
    arm, chosen = ARMS[name], settings.model
    shape = (chosen.image_size, chosen.image_size, 3)
    weights = chosen.weights if arm.pretrained else None
    base = getattr(keras.applications, chosen.backbone)(include_top=False, weights=weights, input_shape=shape)
    if chosen.truncate_at:
        base = keras.Model(base.input, base.get_layer(chosen.truncate_at).output)
    inputs = keras.Input(shape)
    features = base(inputs, training=False) if arm.pretrained else base(inputs)
    pooled = keras.layers.GlobalAveragePooling2D()(features)
    # in half precision a loss is computed in float32, as Keras's guide has it
    model = keras.Model(inputs, keras.layers.Dense(classes, dtype="float32")(pooled))
    phase = phases_of(settings.training)[name][-1]
    base.trainable = phase.trains is not Part.HEAD
    if phase.trains is Part.TAIL:
        for layer in base.layers[: first_trainable(base, settings.resolved()["fine_tune_from"])]:
            layer.trainable = False
    model.compile(
        keras.optimizers.Adam(phase.learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=xla,
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.gpu_keras", description="rates of tuned Keras")
    parser.add_argument("way", choices=["plain", "xla"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    chosen = parser.parse_args()
    settings = load()
    machine = runtime.start(settings.runtime)
    source = dataset.open_source(settings.data)
    examples, batches = source.splits["train"].examples, tuned_batches(source, settings)
    arms: dict[str, Fitted] = {}
    for name in settings.training.arms:
        model = compiled(name, settings, len(source.classes), xla=chosen.way == "xla")
        arms[name] = Fitted(model, batches.train(examples), examples, chosen.seconds)
    ready = {
        "precision": machine.precision,
        "compile_seconds": {name: arm.compile_seconds for name, arm in arms.items()},
    }
    answer(ready, lambda arm: arms[arm].turn())


if __name__ == "__main__":
    main()
