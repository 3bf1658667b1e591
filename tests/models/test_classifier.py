"""The composed model: its cut, its head, and what trains in each part."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from job.arms import Part
from job.backbone_table import BACKBONES
from job.models.backbones import build, first_trainable, preprocessing
from job.models.classifier import Classifier, Head
from job.models.cuts import candidates
from job.models.randomness import Chance


def classifier(name: str, size: int = 64, head: Head | None = None) -> Classifier:
    row = BACKBONES[name]
    backbone = build(row, size)
    first = first_trainable(backbone, row.fine_tune_from)
    latest = candidates(backbone, first)[-1]
    return Classifier(backbone, preprocessing(row), head or Head(3), first, latest.operation)


@pytest.fixture(scope="module")
def mobilenet() -> Classifier:
    keras.utils.set_random_seed(1)
    return classifier("MobileNetV2")


@pytest.fixture(scope="module")
def pixels() -> Any:
    return np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", ["MobileNetV2", "MobileNetV3Small", "DenseNet121", "ConvNeXtTiny"])
def test_trunk_and_tail_compose_to_the_whole_bit_for_bit(name: str, pixels: Any) -> None:
    model = classifier(name)
    cut = model.cut(Part.TAIL)
    rows = cut.trunk(pixels)
    assert tuple(rows.shape[1:]) == cut.shape
    pooled = model.cut(Part.HEAD)
    np.testing.assert_array_equal(cut.tail(rows, False), pooled.trunk(pixels))
    np.testing.assert_array_equal(model.inference(cut)(rows), model.inference(model.cut(Part.ALL))(pixels))


def test_a_backbone_that_trains_from_its_first_layer_is_cut_at_the_pixels(mobilenet: Classifier) -> None:
    assert mobilenet.cut(Part.ALL).at_pixels
    assert Classifier(mobilenet.backbone, lambda x: x, Head(2), 0).cut(Part.TAIL).at_pixels


def test_what_trains_in_each_part(mobilenet: Classifier) -> None:
    count = {part: sum(int(np.prod(v.shape)) for v in mobilenet.backbone_variables(part)) for part in Part}
    assert count == {Part.HEAD: 0, Part.TAIL: 1_862_592, Part.ALL: 2_223_872}
    assert [variable.name for variable in mobilenet.trainable_variables(Part.HEAD)] == ["kernel", "bias"]
    moving = {id(norm.moving_mean) for norm in mobilenet.batch_norms()}
    assert len(moving) == 52
    assert not moving & {id(variable) for variable in mobilenet.trainable_variables(Part.ALL)}


def test_a_head_standardises_its_input_and_starts_undecided() -> None:
    head = Head(3, (8,))
    head.build((None, 5))
    features = np.random.default_rng(0).normal(4, 3, (50, 5)).astype(np.float32)
    np.testing.assert_array_equal(head(features), np.zeros((50, 3), np.float32))
    assert [tuple(variable.shape) for variable in head.trainable_variables] == [(5, 8), (8,), (8, 3), (3,)]

    plain = Head(5)
    plain.build((None, 5))
    plain.standardise(features.mean(axis=0), features.std(axis=0))
    plain.trainable_variables[0].assign(np.eye(5))
    standardised = np.asarray(plain(features))
    np.testing.assert_allclose(standardised.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(standardised.std(axis=0), 1, atol=1e-4)


def test_dropout_is_a_function_of_its_seed_and_absent_without_one() -> None:
    head = Head(16, dropout=0.5)
    head.build((None, 16))
    head.trainable_variables[0].assign(np.eye(16))
    features = tf.ones((8, 16))

    def drop(seed: list[int] | None) -> Any:
        return np.asarray(head(features, chance=None if seed is None else Chance(tf.constant(seed, tf.int32))))

    np.testing.assert_array_equal(drop(None), features)
    np.testing.assert_array_equal(drop([1, 2]), drop([1, 2]))
    assert not np.array_equal(drop([1, 2]), drop([1, 3]))
    assert set(np.unique(drop([1, 2]))) == {0.0, 2.0}
