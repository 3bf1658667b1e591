"""Encoded images to pixels: one way, for training and for serving."""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.data.photo_headers import decoding_bytes
from job.data.row_files import RowFileWriter
from job.data.rows import Rows
from job.errors import ConfigError
from job.machine.limits import cpus, gigabytes, memory_left

_BMP_HEADER_BYTES = 54
# For each thread, so many photos may be under way: decoded while an older one is waited for.
_WAITING = 4


@dataclass(frozen=True)
class Room:
    """What decoding may take.

    threads: so many photos are decoded at a time at most. together: bytes of memory for all of them; a larger one is
    decoded alone. alone: bytes for a single one; a larger one is refused.
    """

    threads: int
    together: int
    alone: int


def whole_machine() -> Room:
    """Return all that this process may use."""
    left = memory_left()
    return Room(cpus(), left, left)


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
    room: Room | None = None,
) -> Rows:
    """Decode examples on all CPUs, in order, to a file of pixels; memory does not grow with their number.

    Args:
        examples: id, label and encoded image of each.
        expected: how many there are.
        size: height and width of the rows in pixels.
        path: the .npy file to write, uint8 [n, size, size, 3].
        on_example: called after each example with its id and whether it could be decoded; those that could not are
            left out. What it raises ends the work.
        room: what decoding may take; the whole machine where it is not given.

    Returns:
        The rows, with their pixels in the file; perhaps none.

    Raises:
        ConfigError: there is too little memory to decode one of the photos.
    """
    ids: list[str] = []
    labels: list[int] = []
    digests: list[bytes] = []
    with RowFileWriter(path, (size, size, 3), np.uint8, expected) as file:
        for example_id, label, pixels, digest in _in_order(examples, size, room or whole_machine()):
            if pixels is not None:
                file.write_row(pixels)
                ids.append(example_id)
                labels.append(label)
                digests.append(digest)
            on_example(example_id, pixels is not None)
    return Rows(tuple(ids), np.array(labels, np.int32), file.rows, tuple(digests))


@dataclass(frozen=True)
class _Waiting:
    """A photo that is being decoded, or waits for one before it. needed: bytes of memory that decoding it takes."""

    example_id: str
    label: int
    needed: int
    decoded: Future[tuple[npt.NDArray[np.uint8] | None, bytes]]


def _in_order(
    examples: Iterable[tuple[str, int, bytes]], size: int, room: Room
) -> Iterator[tuple[str, int, npt.NDArray[np.uint8] | None, bytes]]:
    decode = _decoder(size)
    waiting: deque[_Waiting] = deque()
    taken = 0
    with ThreadPoolExecutor(room.threads, thread_name_prefix="decode") as pool:
        for example_id, label, encoded in examples:
            needed = decoding_bytes(encoded, size)
            if needed > room.alone:
                raise _too_large(example_id, needed, room)
            while waiting and (len(waiting) >= _WAITING * room.threads or taken + needed > room.together):
                oldest = waiting.popleft()
                yield oldest.example_id, oldest.label, *oldest.decoded.result()
                taken -= oldest.needed
            waiting.append(_Waiting(example_id, label, needed, pool.submit(_decode_one, decode, encoded)))
            taken += needed
        for oldest in waiting:
            yield oldest.example_id, oldest.label, *oldest.decoded.result()


def _too_large(example_id: str, needed: int, room: Room) -> ConfigError:
    return ConfigError.of(
        "TRANSFER_DATASET",
        f"decoding the photo {example_id} takes about {gigabytes(needed)} of memory, and {gigabytes(room.alone)} may "
        "be used for it beside what the run takes; make the photo smaller or leave it out, or give more memory",
    )


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
