"""Small TFDS data sets of learnable photos, written for real by TFDS itself; no network."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
import tensorflow_datasets as tfds

Pixels = npt.NDArray[np.uint8]


def write_dataset(
    folder: Path,
    name: str = "photos",
    splits: Mapping[str, int] | None = None,
    classes: Sequence[str] = ("cat", "dog"),
    size: int = 24,
    seed: int = 0,
    bad: Collection[int] = (),
    shards: int = 2,
) -> Path:
    """Write a prepared data set of JPEG photos whose classes differ in colour and in the direction of stripes.

    Args:
        folder: becomes the data folder (TRANSFER_DATA_DIR, with TRANSFER_DATASET=name).
        name: TFDS name.
        splits: examples per split; the labels go round. Default: 40 in ``train``.
        classes: class names.
        size: height and width in pixels.
        seed: of the noise.
        bad: which examples, counted over all splits, are cut short and cannot be decoded.
        shards: files per split.

    Returns:
        The prepared folder, usable as TRANSFER_DATASET alone.
    """
    rng = np.random.default_rng(seed)
    examples: dict[str, list[tuple[bytes, int]]] = {}
    number = 0
    for split, count in (splits or {"train": 40}).items():
        examples[split] = []
        for index in range(count):
            label = index % len(classes)
            encoded = tf.io.encode_jpeg(photo(rng, label, len(classes), size), quality=95).numpy()
            examples[split].append((encoded[: len(encoded) // 2] if number in bad else encoded, label))
            number += 1
    return write_examples(folder, name, examples, classes, shards)


def write_examples(
    folder: Path,
    name: str,
    splits: Mapping[str, Sequence[tuple[bytes, int]]],
    classes: Sequence[str] = ("cat", "dog"),
    shards: int = 1,
) -> Path:
    """Write a prepared data set of the given (encoded image, label); a label of -1 is a missing one."""
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=list(classes))}
    rows = {
        split: [{"image": encoded, "label": label} for encoded, label in examples] for split, examples in splits.items()
    }
    return write_features(folder, name, features, rows, shards)


def write_features(
    folder: Path,
    name: str,
    features: Mapping[str, Any],
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    shards: int = 1,
) -> Path:
    """Write a prepared data set of any features."""
    with contextlib.redirect_stdout(io.StringIO()):
        builder = tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version="1.0.0",
            features=tfds.features.FeaturesDict(features),
            split_datasets={split: list(enumerate(rows)) for split, rows in splits.items()},
            data_dir=folder,
            download_config=tfds.download.DownloadConfig(num_shards=shards),
        )
    return Path(builder.data_dir)


def examples_of(folder: Path, split: str) -> dict[str, dict[str, Any]]:
    """Return the examples of a split by TFDS's id, their photos encoded as they are."""
    read = tfds.builder_from_directory(str(folder)).as_dataset(
        split=split,
        read_config=tfds.ReadConfig(add_tfds_id=True),
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    return {example["tfds_id"].decode(): example for example in tfds.as_numpy(read)}


def photo(rng: np.random.Generator, label: int, classes: int, size: int) -> Pixels:
    """Return uint8 [size, size, 3]: a hue and a direction of stripes that belong to the class, and noise."""
    angle = np.pi * label / classes
    rows, columns = np.mgrid[:size, :size] / size
    stripes = np.sin(8 * np.pi * (rows * np.cos(angle) + columns * np.sin(angle)) + rng.uniform(0, 2 * np.pi))
    hue = 0.5 + 0.5 * np.cos(2 * np.pi * (label / classes + np.arange(3) / 3))
    image = 60 + 100 * hue + 30 * stripes[..., np.newaxis] + rng.normal(0, 20, (size, size, 3))
    return image.clip(0, 255).astype(np.uint8)


def encode_bmp(pixels: npt.NDArray[np.uint8], palette: npt.NDArray[np.uint8] | None = None) -> bytes:
    """Encode [height, width] as 8 bit with a palette (uint8 [n, 3], default grey), and RGB or RGBA as they are."""
    height, width = pixels.shape[:2]
    table = b""
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
        colours = np.arange(256, dtype=np.uint8)[:, np.newaxis].repeat(3, axis=1) if palette is None else palette
        table = b"".join(bytes([blue, green, red, 0]) for red, green, blue in colours)
    else:
        pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[-1]]]
    padding = b"\0" * (-width * pixels.shape[-1] % 4)
    body = b"".join(row.tobytes() + padding for row in pixels[::-1])
    start = 54 + len(table)
    head = struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start)
    bits = 8 * pixels.shape[-1]
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, len(body), 0, 0, len(table) // 4, 0)
    return head + info + table + body


def encode_gif(frames: Sequence[npt.NDArray[np.uint8]]) -> bytes:
    """Encode grey frames [height, width] of values below 128, without compression."""
    height, width = frames[0].shape
    screen = struct.pack("<6sHHBBB", b"GIF89a", width, height, 0b11110110, 0, 0)
    palette = bytes(value for level in range(128) for value in (level, level, level))
    body = b""
    for frame in frames:
        # Seven-bit symbols have eight-bit codes as long as the table is cleared (128) before it fills; 129 ends.
        symbols = frame.astype(np.uint8).tobytes()
        codes = b"".join(b"\x80" + symbols[at : at + 100] for at in range(0, len(symbols), 100)) + b"\x81"
        blocks = b"".join(bytes([len(codes[at : at + 255])]) + codes[at : at + 255] for at in range(0, len(codes), 255))
        control = b"\x21\xf9\x04\x00\x0a\x00\x00\x00"
        body += control + struct.pack("<BHHHHB", 0x2C, 0, 0, width, height, 0) + b"\x07" + blocks + b"\0"
    return screen + palette + body + b";"
