"""The same comparison in plain Keras, to measure the job against: ``fit`` on tf.data, one process, nothing exported.

    python -m tests.measure.plain_keras article    as tutorials write it: map, shuffle(1000), batch
    python -m tests.measure.plain_keras tuned      what tf.data offers an expert: photos cached, all else parallel

Both read the job's own TRANSFER_ variables, train every arm at every fraction, at the first of the seeds, and end in
one line of JSON. Both train in the job's phases, so fine_tune begins with the head on a frozen backbone: of the ways
to write it in Keras that is the cheapest, since no gradient enters the backbone in those epochs. Hidden layers,
dropout, truncation and augmentation are not written here: leave them unset.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
import tensorflow_datasets as tfds

from job.arms import ARMS, Part, Recipe
from job.backbone_table import BACKBONES
from job.data import dataset
from job.machine import runtime
from job.models.backbones import first_trainable, preprocessing
from job.settings.environment import Settings, load
from job.training.optimizers import make_optimizer, schedule

AUTOTUNE = tf.data.AUTOTUNE
TUTORIAL_SHUFFLE = 1000


@dataclass(frozen=True)
class Batches:
    """The splits as ``fit`` takes them. seconds: spent before the first epoch, on filling a cache.

    train: of a number of photos.
    """

    train: Callable[[int], tf.data.Dataset]
    validation: tf.data.Dataset
    test: tf.data.Dataset
    seconds: float = 0.0


def cosine(peak: float, steps: int) -> Any:
    """Return Keras's own schedule with as many steps of warm-up and decay as the job's."""
    warm_up, decay = schedule(steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warm_up else peak, decay, warmup_target=peak if warm_up else None, warmup_steps=warm_up
    )


def article_batches(source: dataset.Source, settings: Settings) -> Batches:
    """Decode, resize and scale in every epoch, one photo after the other, and shuffle in a window.

    How the records are read is left to TFDS's defaults, as it is where nobody thinks of it: of a data set below
    250 MiB they keep the decoded photos in memory at their full size, so there only resizing and scaling are repeated.
    """
    size, scale = settings.model.image_size, preprocessing(BACKBONES[settings.model.backbone])

    def prepare(example: dict[str, Any]) -> tuple[Any, Any]:
        image = tf.image.resize(tf.cast(example[source.image_key], tf.float32), (size, size))
        return scale(image), example[source.label_key]

    def read(split: str) -> tf.data.Dataset:
        return source.builder.as_dataset(split=source.splits[split].expression).map(prepare)

    batch = settings.training.batch_size
    train = read("train")
    return Batches(
        lambda examples: train.take(examples).shuffle(TUTORIAL_SHUFFLE).batch(batch),
        read("validation").batch(batch),
        read("test").batch(batch),
    )


def tuned_batches(source: dataset.Source, settings: Settings) -> Batches:
    """Decode and resize once, in parallel, to uint8 in memory; shuffle perfectly; scale whole batches ahead of time.

    The pixels are the job's own: resized with antialiasing and rounded.
    """
    size, scale = settings.model.image_size, preprocessing(BACKBONES[settings.model.backbone])
    # TFDS would keep the photos in memory a second time, at their full size
    reading = tfds.ReadConfig(try_autocache=False)

    def shrink(example: dict[str, Any]) -> tuple[Any, Any]:
        image = tf.image.resize(example[source.image_key], (size, size), antialias=True)
        return tf.saturate_cast(tf.round(image), tf.uint8), example[source.label_key]

    def cached(split: str) -> tf.data.Dataset:
        read = source.builder.as_dataset(split=source.splits[split].expression, read_config=reading)
        return read.map(shrink, num_parallel_calls=AUTOTUNE).cache()

    def batched(pixels: tf.data.Dataset) -> tf.data.Dataset:
        batches = pixels.batch(settings.training.batch_size, num_parallel_calls=AUTOTUNE)
        scaled = batches.map(lambda images, labels: (scale(tf.cast(images, tf.float32)), labels), AUTOTUNE)
        return scaled.prefetch(AUTOTUNE)

    start = time.perf_counter()
    train, validation, test = (cached(split) for split in ("train", "validation", "test"))
    for pixels in (train, validation, test):
        pixels.reduce(0, lambda count, *_: count + 1)
    seconds = time.perf_counter() - start
    return Batches(
        lambda examples: batched(train.take(examples).shuffle(examples)), batched(validation), batched(test), seconds
    )


VARIANTS = {"article": article_batches, "tuned": tuned_batches}


def train_arm(name: str, source: dataset.Source, settings: Settings, batches: Batches, examples: int) -> float:
    """Build, fit and evaluate one arm on so many of the photos; return its test accuracy."""
    arm, model_settings, training = ARMS[name], settings.model, settings.training
    keras.utils.set_random_seed(training.seeds[0])
    shape = (model_settings.image_size, model_settings.image_size, 3)
    base = getattr(keras.applications, model_settings.backbone)(
        include_top=False, weights=model_settings.weights if arm.pretrained else None, input_shape=shape
    )
    inputs = keras.Input(shape)
    features = base(inputs, training=False) if arm.pretrained else base(inputs)
    pooled = keras.layers.GlobalAveragePooling2D()(features)
    model = keras.Model(inputs, keras.layers.Dense(len(source.classes))(pooled))

    recipe = Recipe(
        training.epochs, training.resolved_head_epochs, training.learning_rate, training.fine_tune_learning_rate
    )
    steps_per_epoch = -(-examples // training.batch_size)
    train, done = batches.train(examples), 0
    for phase in arm.phases(recipe):
        base.trainable = phase.trains is not Part.HEAD
        if phase.trains is Part.TAIL:
            for layer in base.layers[: first_trainable(base, settings.resolved()["fine_tune_from"])]:
                layer.trainable = False
        optimizer = make_optimizer(training.optimizer, cosine(phase.learning_rate, phase.epochs * steps_per_epoch))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        # jit_compile is left at "auto", which means no XLA where there is only a CPU: there XLA is the slower one.
        # steps_per_execution is left at 1: over six paired epochs 8 made no difference that stood out of the noise
        # (median ratio 0.98 with the head alone, 1.06 with the tail; single pairs from 0.5 to 2)
        model.compile(optimizer, loss, metrics=["accuracy"])
        model.fit(
            train,
            initial_epoch=done,
            epochs=done + phase.epochs,
            validation_data=batches.validation,
            shuffle=False,  # the data set does; fit would only warn that it cannot
            verbose=2,
        )
        done += phase.epochs
    return float(model.evaluate(batches.test, verbose=0, return_dict=True)["accuracy"])


def measure(variant: Callable[[dataset.Source, Settings], Batches], settings: Settings) -> list[dict[str, Any]]:
    """Return for each arm and fraction its seconds, those of them spent on filling the cache, and its test accuracy.

    The data sets are made once, as in a notebook; the first result bears their cost, as it does in the job.
    """
    keras.utils.set_random_seed(settings.training.seeds[0])  # the order of the photos is drawn from it too
    source = dataset.open_source(settings.data)
    results: list[dict[str, Any]] = []
    batches = None
    for name, fraction in itertools.product(settings.training.arms, settings.data.train_fractions):
        start = time.perf_counter()
        batches = batches or variant(source, settings)
        examples = max(1, round(fraction * source.splits["train"].examples))
        accuracy = train_arm(name, source, settings, batches, examples)
        results.append(
            {
                "arm": name,
                "train_examples": examples,
                "seconds": time.perf_counter() - start,
                "data_seconds": 0.0 if results else batches.seconds,
                "test_accuracy": accuracy,
                "test_examples": source.splits["test"].examples,
            }
        )
    return results


def main(name: str) -> None:
    settings = load()
    runtime.start(settings.runtime)
    results = measure(VARIANTS[name], settings)
    sys.stdout.write(json.dumps({"variant": name, "results": results}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
