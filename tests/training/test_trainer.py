"""The loop, the rows it trains on, and BatchNorm's statistics, on real small models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from job.arms import Part, Phase
from job.backbone_table import BACKBONES
from job.data.row_files import RowFileWriter
from job.data.rows import Rows
from job.errors import ConfigError
from job.machine import console
from job.machine.replicas import Replicas
from job.models.backbones import build, preprocessing
from job.models.classifier import Classifier, Cut, Head
from job.models.frozen_features import mean_and_deviation
from job.models.inference import INFERENCE_BATCH, inference_batch, run_over
from job.models.randomness import derived_seed, initial_values
from job.models.recalibration import Recalibrator, assign, statistics
from job.settings.groups import TrainingSettings
from job.training.checkpoints import Checkpoint, Checkpoints
from job.training.feeds import Feeder, Residents
from job.training.stages import Stage
from job.training.trainer import Saving, Trainer

FEATURES = 6


def rows_of(values: Any, labels: Any) -> Rows:
    count = len(values)
    return Rows(tuple(f"e{i}" for i in range(count)), np.asarray(labels, np.int32), values, (b"",) * count)


@pytest.fixture
def separable() -> Rows:
    """Pooled rows [90, 6] of three classes that a linear head can tell apart."""
    generator = np.random.default_rng(0)
    labels = np.arange(90) % 3
    values = generator.normal(0, 0.5, (90, FEATURES)).astype(np.float32)
    values[np.arange(90), labels] += 3
    return rows_of(values, labels)


class Pooled:
    """A model whose backbone was left behind: rows are pooled features, only the head is there."""

    def __init__(self, seed: int = 0) -> None:
        with initial_values(seed):
            self.head = Head(3, (8,), dropout=0.25)
        self.head.build((None, FEATURES))
        self.replicas = Replicas()

    @property
    def variables(self) -> list[Any]:
        return list(self.head.variables)

    def trainable_variables(self, _part: Part) -> list[Any]:
        return list(self.head.trainable_variables)

    def inference(self, _cut: Cut) -> Any:
        return tf.function(lambda rows: self.head(rows), autograph=False)


POOLED = Cut("pooled", (FEATURES,), np.dtype(np.float32), lambda pixels: pixels, lambda rows, _: rows)


def stage_of(rows: Rows, index: Any = None, rate: float = 0.05) -> Stage:
    chosen = np.arange(len(rows)) if index is None else index
    return Stage(Phase("head", Part.HEAD, 4, rate), POOLED, rows, chosen, rows)


def trainer_of(model: Pooled, batch_size: int = 16, **changes: Any) -> Trainer:
    settings = TrainingSettings(epochs=4, batch_size=batch_size, **changes)
    return Trainer("frozen", model, settings, console.Console(None))  # type: ignore[arg-type]


def fit(rows: Rows, index: Any = None, rate: float = 0.05, **changes: Any) -> tuple[Pooled, Any]:
    model = Pooled()
    return model, trainer_of(model, **changes).train((stage_of(rows, index, rate),), seed=3)


def on_disk(rows: Rows, path: Path) -> Rows:
    with RowFileWriter(path, rows.values.shape[1:], rows.values.dtype, len(rows)) as writer:
        writer.write(rows.values[:])
    return replace(rows, values=writer.rows)


def test_the_loop_learns_and_counts_every_example_once_an_epoch(separable: Rows) -> None:
    _, trained = fit(separable)
    assert [epoch.epoch for epoch in trained.history] == [1, 2, 3, 4]
    assert trained.images == 4 * 90
    assert trained.history[-1].validation_accuracy == 1.0
    assert trained.history[-1].train_loss < trained.history[0].train_loss
    # a share with 90 in the denominator: the last batch, of ten, was counted too
    assert (trained.history[0].train_accuracy * 90) % 1 == pytest.approx(0, abs=1e-9)


def test_the_same_seed_gives_the_same_weights_bit_for_bit(separable: Rows) -> None:
    (one, _), (other, _) = fit(separable), fit(separable)
    for a, b in zip(one.head.get_weights(), other.head.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_read_ahead_from_disk_train_as_rows_in_memory_do(separable: Rows, tmp_path: Path) -> None:
    (one, in_memory), (other, from_disk) = fit(separable), fit(on_disk(separable, tmp_path / "rows.npy"))
    for a, b in zip(one.head.get_weights(), other.head.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [epoch.train_loss for epoch in in_memory.history] == [epoch.train_loss for epoch in from_disk.history]
    assert from_disk.images == 4 * 90


class Interrupted(Checkpoints):
    """Checkpoints that are saved whenever they can be, of a process that is killed after some of them."""

    def __init__(self, saves: int, saved: Checkpoint | None = None) -> None:
        self.saves = saves
        self.saved = saved

    def newest(self, _result: str, _phases: int) -> Checkpoint | None:
        found = self.saved
        return found and replace(found, progress=replace(found.progress, resumed=found.progress.resumed + 1))

    def due(self, _share: float = 1.0) -> bool:
        return True

    def save(self, _result: str, checkpoint: Checkpoint) -> None:
        self.saved = checkpoint
        self.saves -= 1
        if self.saves == 0:
            raise SystemExit("killed")

    hold = save


@pytest.mark.parametrize(
    ("optimizer", "lives"), [("adam", range(1, 30)), ("sgd", [5]), ("rmsprop", [5]), ("adamw", [5])]
)
def test_killed_at_any_checkpoint_training_ends_with_the_same_weights_and_history(
    separable: Rows, optimizer: str, lives: Iterable[int]
) -> None:
    first, second = stage_of(separable), stage_of(separable, rate=0.02)
    head = replace(first, phase=replace(first.phase, epochs=1))
    stages = (head, replace(second, phase=replace(second.phase, name="tail", epochs=2)))
    undisturbed = Pooled()
    whole = trainer_of(undisturbed, optimizer=optimizer).train(stages, seed=3)
    died_in = set()
    for saves in lives:
        life = Interrupted(saves)
        try:
            trainer_of(Pooled(), optimizer=optimizer).train(stages, 3, Saving(life, "result"))
        except SystemExit:
            pass
        else:
            break
        assert life.saved is not None
        died_in.add((life.saved.progress.phase, len(life.saved.progress.history)))
        resumed = Pooled(seed=99)
        saving = Saving(Interrupted(0, life.saved), "result")
        trained = trainer_of(resumed, optimizer=optimizer).train(stages, 3, saving)
        assert trained.resumed == 1
        assert trained.images == whole.images
        assert [epoch.model_dump(exclude={"seconds"}) for epoch in trained.history] == [
            epoch.model_dump(exclude={"seconds"}) for epoch in whole.history
        ]
        for a, b in zip(undisturbed.head.get_weights(), resumed.head.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    if optimizer == "adam":
        # in each epoch, at the beginning of the second phase, and at the end of all
        assert died_in == {(0, 0), (1, 1), (1, 2), (2, 3)}


def test_several_steps_in_one_call_are_those_steps_one_by_one(separable: Rows) -> None:
    order = np.random.default_rng(1).permutation(90)[:80].reshape(5, 16)
    feeder = Feeder(POOLED, separable, 16, Replicas(), Residents(Replicas()), 5)
    sums, weights = [], []
    for calls in ([order], [batch[None] for batch in order]):
        model = Pooled()
        steps = trainer_of(model).steps(stage_of(separable))
        done = 0
        for call in calls:
            steps(feeder.read(list(call)), 5, done)
            done += len(call)
        sums.append(steps.sums())
        weights.append(model.head.get_weights())
    assert sums[0] == sums[1]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_trainer_starts_its_next_result_anew(separable: Rows) -> None:
    expected, first = fit(separable)
    model = Pooled()
    trainer = trainer_of(model)
    for _ in range(2):
        model.head.set_weights(Pooled().head.get_weights())
        again = trainer.train((stage_of(separable),), seed=3)
    assert [epoch.train_loss for epoch in again.history] == [epoch.train_loss for epoch in first.history]
    for a, b in zip(expected.head.get_weights(), model.head.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_the_rows_at_the_index_are_trained_on(separable: Rows) -> None:
    index = np.flatnonzero(separable.labels != 2)
    spoiled = replace(separable, values=separable.values[:].copy())
    spoiled.values[separable.labels == 2] = np.nan
    _, trained = fit(separable, index)
    _, same = fit(replace(spoiled, values=np.nan_to_num(spoiled.values)), index)
    assert [e.train_loss for e in trained.history] == [e.train_loss for e in same.history]
    assert trained.images == 4 * 60


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "sgd"])
def test_every_optimizer_learns(separable: Rows, name: str) -> None:
    _, trained = fit(separable, optimizer=name)
    assert trained.history[-1].train_loss < trained.history[0].train_loss


def test_a_loss_that_diverges_is_refused_by_the_name_of_its_rate(separable: Rows) -> None:
    spoiled = replace(separable, values=separable.values * np.float32(3e37))
    with pytest.raises(ConfigError, match="TRANSFER_LEARNING_RATE"):
        fit(spoiled, rate=10.0)


def test_derived_seeds_differ_by_every_argument() -> None:
    seeds = {derived_seed(seed, purpose, step) for seed in (0, 1) for purpose in ("a", "b") for step in (0, 1)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derived_seed(5, "order", 2) == derived_seed(5, "order", 2)


def test_rows_are_run_in_batches_of_one_shape_and_come_back_in_order() -> None:
    shapes = []
    values = np.arange(2 * INFERENCE_BATCH + 1, dtype=np.float32)[:, None]

    def double(batch: Any) -> Any:
        shapes.append(tuple(batch.shape))
        return batch * 2

    np.testing.assert_array_equal(run_over(double, values), values * 2)
    assert set(shapes) == {(INFERENCE_BATCH, 1)}
    np.testing.assert_array_equal(run_over(double, values, index=np.array([5, 2])), [[10], [4]])
    with pytest.raises(ValueError, match="no rows"):
        run_over(double, values[:0])


def test_a_gpu_takes_more_rows_at_once_the_smaller_they_are() -> None:
    assert {inference_batch(shape, gpu=False) for shape in ((160, 160, 3), (1280,), (512, 512, 3))} == {32}
    sizes = {(1280,): 256, (160, 160, 3): 256, (224, 224, 3): 128, (299, 299, 3): 64, (512, 512, 3): 32}
    assert {shape: inference_batch(shape, gpu=True) for shape in sizes} == sizes


def test_mean_and_deviation_never_blow_up_a_feature_that_hardly_varies() -> None:
    values = np.random.default_rng(0).normal(2, 1, (1000, 4)).astype(np.float32)
    values[:, 3] = 7
    mean, deviation = mean_and_deviation(rows_of(values, np.zeros(1000)), np.arange(1000))
    np.testing.assert_allclose(mean, [2, 2, 2, 7], atol=0.1)
    np.testing.assert_allclose(deviation[:3], 1.04, atol=0.05)
    assert deviation[3] > 0.2


@pytest.fixture(scope="module")
def mobilenet() -> Classifier:
    keras.utils.set_random_seed(3)
    row = BACKBONES["MobileNet"]
    return Classifier(build(row, 32), preprocessing(row), Head(2), 0)


def test_recalibration_gives_the_statistics_of_all_rows(mobilenet: Classifier) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (24, 32, 32, 3)).astype(np.uint8)
    rows = rows_of(pixels, np.zeros(24))
    cut = mobilenet.cut(Part.ALL)
    recalibrator = Recalibrator(mobilenet, cut)
    layers = recalibrator.layers
    kept, momenta = statistics(layers), [layer.momentum for layer in layers]
    trained = [np.asarray(variable.value.numpy()) for variable in mobilenet.trainable_variables(Part.ALL)]

    recalibrator.recalibrate(rows, np.arange(24), 10)  # batches of 10, 10 and 4: each weighs as its size
    first = keras.Model(mobilenet.backbone.input, mobilenet.backbone.get_layer("conv1").output)
    maps = np.asarray(first(preprocessing(BACKBONES["MobileNet"])(pixels.astype(np.float32)))).astype(np.float64)
    mean, variance = statistics(layers)[0]
    np.testing.assert_allclose(mean, maps.mean(axis=(0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(variance, maps.var(axis=(0, 1, 2)), rtol=1e-4, atol=1e-6)

    assert [layer.momentum for layer in layers] == momenta
    for before, variable in zip(trained, mobilenet.trainable_variables(Part.ALL), strict=True):
        np.testing.assert_array_equal(before, variable.value.numpy())
    assign(layers, kept)
    for (a, b), (c, d) in zip(statistics(layers), kept, strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)
