"""Examples as rows with ids: one way to decode for training and serving, nested subsets."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.row_files import RowFileWriter

_BMP_HEADER_BYTES = 54


class RowValues(Protocol):
    """Rows [n, ...] that can be read by index, wherever they lie: an array, a file, or computed when read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the number of rows and the shape of one."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of the values."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, index: npt.NDArray[np.int64] | slice, /) -> npt.NDArray[Any]:
        """Return these rows, in this order, as an array."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the row of each example lies.

    holders: int32 [n], the worker that read it. positions: int64 [n], its row among those of that worker. worker: which
    of them this one is.
    """

    holders: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    worker: int = 0


@dataclass(frozen=True, eq=False)
class Rows:
    """The examples of one split, in the order of the data set's files, whoever read them in whatever order.

    ids: TFDS's id of each example, ``file__index``; unique over all splits of a data set.
    labels: int32 [n], index into the class names.
    values: [m, ...], the pixels (uint8 [m, size, size, 3]) or what was computed from them, of the m examples that this
        worker read; may lie on disk.
    digests: BLAKE2b-128 of each encoded image, 16 bytes each.
    placement: where in ``values`` the examples are; None where the first is the first, and so on.
    """

    ids: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    values: RowValues
    digests: tuple[bytes, ...]
    placement: Placement | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def held(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of the examples at ``index`` (int64 [...]) this worker holds, bool [...]."""
        if self.placement is None:
            return np.ones(index.shape, bool)
        return np.asarray(self.placement.holders[index] == self.placement.worker)

    def positions(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return where in ``values`` those of the examples at ``index`` (int64 [k]) are that this worker holds."""
        return index if self.placement is None else self.placement.positions[index[self.held(index)]]

    def read(self, index: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return the rows of those of the examples at ``index`` (int64 [k]) that this worker holds, in that order."""
        return self.values[self.positions(index)]

    def in_place(self) -> npt.NDArray[np.int64]:
        """Return the examples that this worker holds in the order of ``values``, int64 [m]."""
        if self.placement is None:
            return np.arange(len(self))
        mine = np.flatnonzero(self.placement.holders == self.placement.worker)
        return mine[np.argsort(self.placement.positions[mine])]


def decode_image(encoded: Any, size: int) -> Any:
    """Decode an image of any size to RGB and resize it: the one function for training rows and for serving.

    TensorFlow operations only, so that it can be part of a SavedModel. Grey is repeated over the channels, alpha and
    the lower 8 of 16 bits are dropped, of a GIF the first frame is taken. The aspect ratio is not kept; shrinking
    averages (antialias), which plain bilinear resizing does not.

    Args:
        encoded: string scalar, JPEG, PNG, GIF or BMP bytes.
        size: height and width of the result in pixels.

    Returns:
        uint8 [size, size, 3].

    Raises:
        tf.errors.InvalidArgumentError: the bytes are no image that TensorFlow can decode.
    """
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    header = tf.cast(tf.io.decode_raw(tf.strings.substr(encoded, 0, _BMP_HEADER_BYTES), tf.uint8), tf.int32)
    is_indexed_bmp = tf.logical_and(
        tf.equal(tf.strings.substr(encoded, 0, 2), "BM"),
        tf.logical_and(tf.equal(tf.size(header), _BMP_HEADER_BYTES), tf.equal(_at(header, 28), 8)),
    )
    image = tf.cond(is_indexed_bmp, lambda: _apply_bmp_palette(encoded, header, image), lambda: image)
    resized = tf.image.resize(image, [size, size], method="bilinear", antialias=True)
    return tf.saturate_cast(tf.round(resized), tf.uint8)


def _at(header: Any, position: int) -> Any:
    """Return one byte of the header, and 0 where it is shorter: all images pass here, whatever their format."""
    return tf.reduce_sum(header[position : position + 1])


def _apply_bmp_palette(encoded: Any, header: Any, image: Any) -> Any:
    """Look the colours of an 8-bit BMP up, which TensorFlow's decoder returns as bare palette indices."""
    palette_start = 14 + _at(header, 14) + 256 * _at(header, 15)
    pixels_start = _at(header, 10) + 256 * _at(header, 11)
    blue_green_red_unused = tf.strings.substr(encoded, palette_start, pixels_start - palette_start)
    palette = tf.reshape(tf.io.decode_raw(blue_green_red_unused, tf.uint8), [-1, 4])[:, 2::-1]
    return tf.gather(palette, tf.cast(image[..., 0], tf.int32))


def decode_rows(
    examples: Iterable[tuple[str, int, bytes]],
    expected: int,
    size: int,
    path: Path,
    on_example: Callable[[str, bool], None],
) -> Rows:
    """Decode examples on all cores, in order, to a file of pixels; memory does not grow with their number.

    Args:
        examples: id, label and encoded image of each.
        expected: how many there are.
        size: height and width of the rows in pixels.
        path: the .npy file to write, uint8 [n, size, size, 3].
        on_example: called after each example with its id and whether it could be decoded; those that could not are
            left out. What it raises ends the work.

    Returns:
        The rows, with their pixels in the file; perhaps none.
    """
    ids: list[str] = []
    labels: list[int] = []
    digests: list[bytes] = []
    with RowFileWriter(path, (size, size, 3), np.uint8, expected) as file:
        for example_id, label, pixels, digest in _in_order(examples, size):
            if pixels is not None:
                file.write_row(pixels)
                ids.append(example_id)
                labels.append(label)
                digests.append(digest)
            on_example(example_id, pixels is not None)
    return Rows(tuple(ids), np.array(labels, np.int32), file.rows, tuple(digests))


def _in_order(
    examples: Iterable[tuple[str, int, bytes]], size: int
) -> Iterator[tuple[str, int, npt.NDArray[np.uint8] | None, bytes]]:
    threads = os.cpu_count() or 1
    decode = _decoder(size)
    waiting: deque[tuple[str, int, Future[tuple[npt.NDArray[np.uint8] | None, bytes]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for example_id, label, encoded in examples:
            waiting.append((example_id, label, pool.submit(_decode_one, decode, encoded)))
            if len(waiting) > 4 * threads:
                oldest_id, oldest_label, future = waiting.popleft()
                yield oldest_id, oldest_label, *future.result()
        for oldest_id, oldest_label, future in waiting:
            yield oldest_id, oldest_label, *future.result()


@functools.cache
def _decoder(size: int) -> Callable[[Any], Any]:
    """Return ``decode_image`` as a graph, traced once: TensorFlow runs it without holding Python's lock."""
    signature = [tf.TensorSpec([], tf.string)]
    return tf.function(lambda encoded: decode_image(encoded, size), input_signature=signature).get_concrete_function()  # type: ignore[no-any-return]


def _decode_one(decode: Callable[[Any], Any], encoded: bytes) -> tuple[npt.NDArray[np.uint8] | None, bytes]:
    digest = hashlib.blake2b(encoded, digest_size=16).digest()
    try:
        with tf.device("CPU:0"):  # no other device can decode, and the rows would only be copied back
            return decode(tf.constant(encoded)).numpy(), digest
    except tf.errors.InvalidArgumentError:
        return None, digest


def stratified_subset(labels: npt.NDArray[np.integer[Any]], fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Choose a part of the examples in which every class keeps its share.

    Each class is cut on its own from an order that depends on the seed alone, so at one seed the smaller fraction lies
    inside the larger. (Rounding to an exact total would break this: a class could lose an example as the total grows.)

    Args:
        labels: integers [n].
        fraction: more than 0, at most 1.
        seed: not negative.

    Returns:
        int64 indices into ``labels``, ascending; of every class at least one.

    Raises:
        ValueError: the fraction is outside its range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    return np.sort(np.concatenate(list(_class_parts(labels, fraction, seed)))) if len(labels) else np.empty(0, np.int64)


def _class_parts(labels: npt.NDArray[np.integer[Any]], fraction: float, seed: int) -> Iterable[npt.NDArray[np.int64]]:
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).astype(np.int64)
        order = np.random.default_rng([seed, int(label)]).permutation(len(members))
        yield members[order[: max(1, int(fraction * len(members) + 0.5))]]
