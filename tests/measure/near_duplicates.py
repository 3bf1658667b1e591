"""How far photos encoded anew lie from their originals, and how near different ones come, as job/duplicates.py tells.

    python -m tests.measure.near_duplicates [SIZE ...]    ten minutes on two cores; ends in JSON

Of each real data set, 200 photos are encoded anew in every way of ``WAYS``; the copies of a way are the test split and
all photos of the set the train split of a search like the job's. Then the photos themselves are dealt to three splits,
and what is found there is listed: these pairs want looking at. Sizes are 32 and 160 px unless told.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
import tensorflow_datasets as tfds

import job.data.solar_cells  # noqa: F401  (registers solar_cells)
from job.data import duplicates
from job.data.decoding import decode_rows
from job.data.rows import Rows
from job.machine.replicas import Replicas
from tests.support.running import SHARED

COPIES = 200
Pixels = npt.NDArray[np.uint8]


def jpeg(pixels: Pixels, quality: int) -> bytes:
    return bytes(tf.io.encode_jpeg(pixels, quality=quality).numpy())


def resized(pixels: Pixels, factor: float, method: str) -> Pixels:
    size = [max(1, round(factor * side)) for side in pixels.shape[:2]]
    return np.asarray(tf.saturate_cast(tf.round(tf.image.resize(pixels, size, method, antialias=True)), tf.uint8))


WAYS: dict[str, Callable[[Pixels], bytes]] = {
    "JPEG 95": lambda pixels: jpeg(pixels, 95),
    "JPEG 70": lambda pixels: jpeg(pixels, 70),
    "JPEG 50": lambda pixels: jpeg(pixels, 50),
    "JPEG 30": lambda pixels: jpeg(pixels, 30),
    "PNG": lambda pixels: bytes(tf.io.encode_png(pixels).numpy()),
    "colour, JPEG 70": lambda pixels: jpeg(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), 70),
    "50%, JPEG 90": lambda pixels: jpeg(resized(pixels, 0.5, "bicubic"), 90),
    "75%, JPEG 90": lambda pixels: jpeg(resized(pixels, 0.75, "lanczos3"), 90),
    "125%, JPEG 90": lambda pixels: jpeg(resized(pixels, 1.25, "bicubic"), 90),
    "150%, JPEG 90": lambda pixels: jpeg(resized(pixels, 1.5, "bilinear"), 90),
    "75%, PNG": lambda pixels: bytes(tf.io.encode_png(resized(pixels, 0.75, "area")).numpy()),
    "50%, JPEG 50": lambda pixels: jpeg(resized(pixels, 0.5, "bilinear"), 50),
}


def read(name: str, folder: Path) -> list[tuple[str, int, bytes]]:
    """Return id, label and encoded image of every example, as the job reads them."""
    builder = tfds.builder(name, data_dir=folder)
    builder.download_and_prepare()
    examples = builder.as_dataset(
        split="train",
        decoders=tfds.decode.PartialDecoding({"image": True}, decoders={"image": tfds.decode.SkipDecoding()}),
        read_config=tfds.ReadConfig(add_tfds_id=True),
    )
    return [(example["tfds_id"].decode(), 0, example["image"]) for example in examples.as_numpy_iterator()]


def decoded(examples: list[tuple[str, int, bytes]], size: int, path: Path) -> Rows:
    return decode_rows(examples, len(examples), size, path, lambda _example, _decoded: None)


def thumbnails(rows: Rows) -> npt.NDArray[np.float32]:
    parts = [duplicates.cell_means(rows.values[i : i + 256], 12) for i in range(0, len(rows), 256)]
    return np.concatenate(parts).astype(np.float32) / 256


def taken(rows: Rows, index: npt.NDArray[np.int64]) -> Rows:
    digests = tuple(rows.digests[i] for i in index)
    return Rows(tuple(rows.ids[i] for i in index), rows.labels[index], rows.values[index], digests)


def measure(examples: list[tuple[str, int, bytes]], size: int, folder: Path) -> dict[str, Any]:
    rows = decoded(examples, size, folder / "all.npy")
    chosen = np.sort(np.random.default_rng(5).permutation(len(examples))[:COPIES])
    pixels = [tf.io.decode_image(examples[i][2], expand_animations=False).numpy() for i in chosen]
    originals = thumbnails(rows)
    found: dict[str, Any] = {"copies": {}}
    for way, encode in WAYS.items():
        encoded = [(f"copy of {examples[i][0]}", 0, encode(each)) for i, each in zip(chosen, pixels, strict=True)]
        copies = decoded(encoded, size, folder / "copies.npy")
        groups = duplicates.find({"train": rows, "test": copies}, Replicas()).listed
        together = [{example.example_id for example in group.examples} for group in groups]
        hits = sum(any({name, name.removeprefix("copy of ")} <= group for group in together) for name in copies.ids)
        away = np.sort(duplicates.differences(originals[chosen], thumbnails(copies)))
        found["copies"][way] = {
            "found": hits / len(chosen),
            "differences": [float(each) for each in away[-3:].round(4)],
        }
    split = np.random.default_rng(6).permutation(len(rows)) % 3
    parts = {name: taken(rows, np.flatnonzero(split == i)) for i, name in enumerate(("train", "validation", "test"))}
    listed = duplicates.find(parts, Replicas()).listed
    found["unplanted"] = [[group.kind, *(example.example_id for example in group.examples)] for group in listed]
    found["nearest"] = nearest(originals)
    return found


def nearest(all_of: npt.NDArray[np.float32]) -> list[float]:
    """Return the smallest differences between any two photos of a set."""
    flat = all_of.reshape(len(all_of), -1)
    units = flat - flat.mean(axis=1, keepdims=True)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    one, other = np.nonzero(np.triu(units @ units.T, 1) >= 0.985)
    return [float(each) for each in np.sort(duplicates.differences(all_of[one], all_of[other]))[:16].round(4)]


def main() -> None:
    sizes = [int(each) for each in sys.argv[1:]] or [32, 160]
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for dataset in ("solar_cells", "tf_flowers", "cats_vs_dogs"):
            place = Path(name) if dataset == "solar_cells" else SHARED / "tfds"
            if dataset != "solar_cells" and not (place / dataset).is_dir():
                sys.stderr.write(f"left out: {dataset}, which is not prepared in {os.path.relpath(place)}\n")
                continue
            examples = read(dataset, place)
            told[dataset] = {f"{size} px": measure(examples, size, Path(name)) for size in sizes}
            sys.stderr.write(f"{dataset}: {json.dumps(told[dataset])}\n")
    sys.stdout.write(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
