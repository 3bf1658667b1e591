"""Photos changed at random in every step, so that a network sees each of them in many ways.

``tf.image`` and Keras's layers draw random numbers of their own, or one for a whole batch, and transform by an
operation that XLA cannot compile (ImageProjectiveTransformV3). Here the numbers belong to the example's place in the
batch, and moving is two gathers along each axis, which everything compiles.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from job.models.randomness import AUGMENTATION, Chance

Augment = Callable[[tf.Tensor, Chance], tf.Tensor]

# The largest change of each kind: a share of the side, of the size, of the contrast.
SHIFT = 0.1
ZOOM = 0.1
CONTRAST = 0.2


def augmenter(kind: str) -> Augment | None:
    """Return what ``TRANSFER_AUGMENTATION`` names: (pixels [n, size, size, 3], chance) -> the same shape.

    None for ``none``. ``flip`` mirrors half of the photos, by chance, from left to right and keeps the dtype.
    ``standard`` also shifts by up to a tenth of each side, zooms by up to a tenth in or out (what comes in at the edges
    is mirrored) and changes the contrast about the photo's mean by up to a fifth; it returns float32 within 0 to 255.
    """
    return {"none": None, "flip": _flip, "standard": _standard}[kind]


def _flip(pixels: tf.Tensor, chance: Chance) -> tf.Tensor:
    mirrored = chance.uniform(AUGMENTATION, pixels, 1)[:, :, None, None] < 0.5
    return tf.where(mirrored, tf.reverse(pixels, [2]), pixels)


def _standard(pixels: tf.Tensor, chance: Chance) -> tf.Tensor:
    flip, shift_y, shift_x, zoom, contrast = tf.unstack(chance.uniform(AUGMENTATION, pixels, 5), axis=1)
    direction = tf.where(flip < 0.5, -1.0, 1.0)
    scale = 1.0 + ZOOM * _signed(zoom)
    moved = _resampled(tf.cast(pixels, tf.float32), 1, scale, SHIFT * _signed(shift_y))
    moved = _resampled(moved, 2, direction * scale, SHIFT * _signed(shift_x))
    mean = tf.reduce_mean(moved, axis=(1, 2, 3), keepdims=True)
    changed = mean + (moved - mean) * (1.0 + CONTRAST * _signed(contrast))[:, None, None, None]
    return tf.clip_by_value(changed, 0.0, 255.0)


def _signed(uniform: tf.Tensor) -> tf.Tensor:
    return 2.0 * uniform - 1.0


def _resampled(images: tf.Tensor, axis: int, scale: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """Return ``images`` [n, height, width, c] read along ``axis`` at other places, linearly interpolated.

    scale, shift: float32 [n]; a place is ``scale`` times as far from the centre, and ``shift`` sides further on.
    """
    size = images.shape[axis]
    centre = (size - 1) / 2
    offsets = np.arange(size, dtype=np.float32) - np.float32(centre)
    at = centre + offsets[None] * scale[:, None] + size * shift[:, None]
    # beyond an edge the photo is mirrored, its outermost pixel twice
    at = tf.math.floormod(at + 0.5, 2.0 * size)
    at = tf.clip_by_value(tf.minimum(at, 2.0 * size - at) - 0.5, 0.0, size - 1.0)
    low = tf.minimum(tf.floor(at), size - 2.0)
    weight = at - low
    weight = weight[:, :, None, None] if axis == 1 else weight[:, None, :, None]
    # int64: a GPU has no arithmetic of int32, which would go to the host and back
    below, above = (tf.gather(images, tf.cast(each, tf.int64), axis=axis, batch_dims=1) for each in (low, low + 1.0))
    return below + weight * (above - below)
