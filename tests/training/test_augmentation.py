"""Photos changed at random: what is changed, where the randomness comes from, and that only training sees it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from job.arms import Part
from job.backbone_table import BACKBONES
from job.models.backbones import build, first_trainable, preprocessing
from job.models.classifier import Classifier, Head
from job.models.cuts import candidates
from job.models.randomness import AUGMENTATION, DROPOUT, Chance
from job.training.augmentation import CONTRAST, SHIFT, ZOOM, augmenter
from tests.support.running import published_by

SIZE = 40


def photo(seed: int = 0) -> npt.NDArray[np.uint8]:
    """A smooth photo, so that interpolation between its pixels loses little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3)).astype(np.float32)
    return np.asarray(tf.cast(tf.round(tf.image.resize(coarse, (SIZE, SIZE), "bicubic")), tf.uint8))


def augmented(kind: str, photos: npt.NDArray[np.uint8], step: int = 1, places: list[int] | None = None) -> tf.Tensor:
    augment = augmenter(kind)
    assert augment is not None
    chance = Chance(tf.constant([3, step]))
    if places is not None:
        chance = replace(chance, batch=tf.constant(len(photos)), places=tf.constant(places))
        photos = photos[places]
    return augment(tf.constant(photos), chance)


def test_flip_mirrors_about_half_of_the_photos_and_changes_nothing_else() -> None:
    photos = np.stack([photo(i) for i in range(200)])
    changed = np.asarray(augmented("flip", photos))
    assert changed.dtype == np.uint8
    mirrored = np.array([np.array_equal(new, old[:, ::-1]) for new, old in zip(changed, photos, strict=True)])
    kept = np.array([np.array_equal(new, old) for new, old in zip(changed, photos, strict=True)])
    assert np.all(mirrored ^ kept)
    assert 75 < mirrored.sum() < 125  # a binomial's bounds at 200 draws: three and a half deviations


def reference(image: npt.NDArray[np.uint8], drawn: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """What ``standard`` says that it does, one pixel at a time."""
    flip, shift_y, shift_x, zoom, contrast = drawn
    scale = 1 + ZOOM * (2 * zoom - 1)
    centre = (SIZE - 1) / 2

    def places(direction: float, shift: float) -> list[float]:
        found = []
        for i in range(SIZE):
            at = centre + direction * scale * (i - centre) + SIZE * SHIFT * (2 * shift - 1)
            at = -1 - at if at < -0.5 else at
            found.append(min(max(2 * SIZE - 1 - at if at > SIZE - 0.5 else at, 0), SIZE - 1))
        return found

    padded = np.pad(image.astype(np.float64), ((0, 1), (0, 1), (0, 0)), "edge")
    result = np.empty(image.shape)
    for i, y in enumerate(places(1, shift_y)):
        for j, x in enumerate(places(-1 if flip < 0.5 else 1, shift_x)):
            (a, v), (b, u) = divmod(y, 1), divmod(x, 1)
            a, b = int(a), int(b)
            above = (1 - u) * padded[a, b] + u * padded[a, b + 1]
            below = (1 - u) * padded[a + 1, b] + u * padded[a + 1, b + 1]
            result[i, j] = (1 - v) * above + v * below
    mean = result.mean()
    return np.clip(mean + (result - mean) * (1 + CONTRAST * (2 * contrast - 1)), 0, 255)


def test_standard_flips_shifts_zooms_and_changes_contrast_as_it_says() -> None:
    photos = np.stack([photo(i) for i in range(12)])
    drawn = Chance(tf.constant([3, 1])).uniform(AUGMENTATION, tf.constant(photos), 5).numpy()
    assert {flip < 0.5 for flip in drawn[:, 0]} == {True, False}
    changed = np.asarray(augmented("standard", photos))
    assert changed.dtype == np.float32
    for new, old, numbers in zip(changed, photos, drawn, strict=True):
        np.testing.assert_allclose(new, reference(old, numbers), atol=0.01)


def test_what_happens_to_a_photo_depends_on_its_place_in_the_batch_and_the_step_alone() -> None:
    photos = np.stack([photo(i) for i in range(8)])
    whole = np.asarray(augmented("standard", photos))
    np.testing.assert_array_equal(augmented("standard", photos), whole)
    np.testing.assert_array_equal(augmented("standard", photos, places=[6, 1, 3]), whole[[6, 1, 3]])
    assert not np.allclose(augmented("standard", photos, step=2), whole)


def test_dropout_and_augmentation_draw_from_streams_of_their_own() -> None:
    chance, rows = Chance(tf.constant([3, 1])), tf.zeros([8, 1])
    assert not np.array_equal(chance.uniform(DROPOUT, rows, 5), chance.uniform(AUGMENTATION, rows, 5))


def test_xla_compiles_it() -> None:
    """XLA draws numbers of its own; with them it does the same."""
    augment, photos = augmenter("standard"), np.stack([photo(i) for i in range(3)])
    assert augment is not None

    @tf.function(jit_compile=True, autograph=False)
    def compiled(pixels: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        chance = Chance(seed)
        return augment(pixels, chance), chance.uniform(AUGMENTATION, pixels, 5)

    changed, drawn = compiled(tf.constant(photos), tf.constant([3, 1]))
    for new, old, numbers in zip(changed.numpy(), photos, drawn.numpy(), strict=True):
        np.testing.assert_allclose(new, reference(old, numbers), atol=0.02)


@pytest.mark.parametrize("part", list(Part))
def test_from_pixels_is_the_same_network_in_one_piece(part: Part) -> None:
    keras.utils.set_random_seed(0)
    row = BACKBONES["MobileNet"]
    backbone = build(row, 32)
    first = first_trainable(backbone, "conv_pw_12")
    model = Classifier(backbone, preprocessing(row), Head(3), first, candidates(backbone, first, 4)[0].operation)
    pixels = tf.constant(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)), tf.uint8)
    cut, whole = model.cut(part), model.from_pixels(part)
    assert whole.at_pixels
    found = whole.tail(whole.trunk(pixels), False)
    np.testing.assert_allclose(found, cut.tail(cut.trunk(pixels), False), atol=1e-6)
    np.testing.assert_array_equal(found, whole.tail(tf.cast(pixels, tf.float32), False))


@pytest.mark.slow
def test_a_run_augments_training_alone_and_every_arm_of_it(tiny: dict[str, str], tmp_path: Path) -> None:
    found = {}
    for kind in ("none", "standard"):
        settings = {"TRANSFER_AUGMENTATION": kind, "TRANSFER_ARMS": "frozen,fine_tune"}
        found[kind] = published_by(tiny | settings, tmp_path / kind).manifest
    plain, changed = (found[kind]["results"] for kind in ("none", "standard"))
    for before, after in zip(plain, changed, strict=True):
        assert after["rows"] == {"cut": "pixels", "row_bytes": 32 * 32 * 3, "kept": "disk"}
        assert before["rows"]["cut"] != "pixels"
        assert after["history"][0]["train_loss"] != before["history"][0]["train_loss"]
        # changed at random, the photos would give another loss each time
        assert after["metrics"]["validation"]["loss"] == pytest.approx(after["history"][-1]["validation_loss"], 1e-6)
    assert found["none"]["fingerprint"] != found["standard"]["fingerprint"]
