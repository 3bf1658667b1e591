"""Rows of frozen layers: made once, kept with what decides them, and the same as if they were made every time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from job.arms import Part
from job.data.row_cache import RowCache
from job.data.row_files import RowFile
from job.data.rows import Rows
from job.machine import console
from job.models.classifier import Classifier
from job.models.frozen_features import Computed, Features
from job.models.inference import INFERENCE_BATCH
from tests.models.test_classifier import classifier

COUNT = 2 * INFERENCE_BATCH + 5
KEY: dict[str, Any] = {"dataset": "pets", "image_size": 32, "backbone": "MobileNet", "weights": "one", "precision": "f"}

# of the largest value: 20 times what was seen of Eigen's kernels
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def model() -> Classifier:
    keras.utils.set_random_seed(2)
    return classifier("MobileNet", 32)


@pytest.fixture(scope="module")
def pixels() -> dict[str, Rows]:
    generator = np.random.default_rng(3)
    made = {}
    for split, count in (("train", COUNT), ("test", 3)):
        values = generator.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
        ids = tuple(f"{split}__{i}" for i in range(count))
        made[split] = Rows(ids, np.zeros(count, np.int32), values, tuple(bytes([i]) * 16 for i in range(count)))
    return made


def features(pixels: dict[str, Rows], folder: Path | None, **changes: Any) -> Features:
    cache = None if folder is None else RowCache(folder)
    return Features(pixels, (Part.TAIL, Part.HEAD), cache, KEY | changes, console.Console(None))


def test_rows_are_what_the_trunk_gives_and_pooled_rows_what_the_whole_backbone_gives(
    model: Classifier, pixels: dict[str, Rows], tmp_path: Path
) -> None:
    made = features(pixels, tmp_path)
    for part in (Part.TAIL, Part.HEAD):
        rows = made.rows(model, part, "train")
        assert rows.ids == pixels["train"].ids
        expected = np.asarray(model.cut(part).trunk(pixels["train"].values[:8]))
        # not bit for bit: called without a graph around it, a convolution is not fused with what follows it
        np.testing.assert_allclose(rows.values[:8], expected, atol=1e-5 * np.abs(expected).max())
    assert isinstance(made.rows(model, Part.TAIL, "train").values, RowFile)
    assert isinstance(made.rows(model, Part.HEAD, "train").values, np.ndarray)


def test_rows_computed_at_every_reading_are_those_that_are_kept(
    model: Classifier, pixels: dict[str, Rows], tmp_path: Path
) -> None:
    """Bit for bit where kernels make the same of a photo whatever else is in its batch, elsewhere to rounding."""
    kept, computed = features(pixels, tmp_path), features(pixels, None)
    for part in (Part.TAIL, Part.HEAD):
        values = computed.rows(model, part, "train").values
        assert isinstance(values, Computed)
        expected = kept.rows(model, part, "train").values
        assert (values.shape, values.dtype, len(values)) == (expected.shape, expected.dtype, COUNT)
        sizes = (2, 7, INFERENCE_BATCH - 1, INFERENCE_BATCH, INFERENCE_BATCH)
        orders = [np.random.default_rng(seed).permutation(INFERENCE_BATCH)[:size] for seed, size in enumerate(sizes)]
        exact = all(np.array_equal(values[order], values[:INFERENCE_BATCH][order]) for order in orders)
        close = 0.0 if exact else ROUNDING * np.abs(expected[:]).max()
        # a batch of any size, of one row too, in any order
        for size in (1, 2, 7, INFERENCE_BATCH, COUNT):
            index = np.random.default_rng(size).permutation(COUNT)[:size]
            np.testing.assert_allclose(values[index], expected[index], rtol=0, atol=close)
        assert values[:0].shape == (0, *expected.shape[1:])


def test_a_second_run_takes_the_rows_from_the_cache(
    model: Classifier, pixels: dict[str, Rows], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = features(pixels, tmp_path).rows(model, Part.TAIL, "test").values[:]
    caplog.clear()
    with caplog.at_level(logging.INFO, "job"):
        again = features(pixels, tmp_path).rows(model, Part.TAIL, "test").values[:]
    np.testing.assert_array_equal(first, again)
    assert [record.computed for record in caplog.records] == [False, False]  # type: ignore[attr-defined]
    assert "from the cache" in caplog.text


def _other_examples(pixels: dict[str, Rows]) -> dict[str, Rows]:
    train = pixels["train"]
    digests = (b"\xff" * 16, *train.digests[1:])
    return pixels | {"train": Rows(train.ids, train.labels, train.values, digests)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weights": "two"}, "weights changed from one to two"),
        ({"precision": "mixed_float16"}, "precision changed"),
        ({"preprocessing": "caffe"}, "preprocessing"),
        ({"data": {"name": "pets/2.0.0"}}, "data"),
        ("examples", "examples changed"),
        ("cut short", "cut short"),
        ("flipped", "checksum"),
    ],
)
def test_stale_or_damaged_rows_are_made_anew_and_the_log_says_why(
    model: Classifier,
    pixels: dict[str, Rows],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any] | str,
    reason: str,
) -> None:
    expected = features(pixels, tmp_path).rows(model, Part.TAIL, "train").values[:]
    (file,) = tmp_path.glob(f"pets-train-*{model.cut(Part.TAIL).name}.npy")
    whole = file.read_bytes()
    if change == "cut short":
        file.write_bytes(whole[:-100])
    if change == "flipped":
        file.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    other = _other_examples(pixels) if change == "examples" else pixels
    changes = change if isinstance(change, dict) else {}
    with caplog.at_level(logging.INFO, "job"):
        again = features(other, tmp_path, **changes).rows(model, Part.TAIL, "train").values[:]
    np.testing.assert_array_equal(again, expected)
    lines = [record.getMessage() for record in caplog.records]
    assert any("made anew" in line and reason in line and model.cut(Part.TAIL).name in line for line in lines), lines
    assert any(line.startswith("features of train") and "computed" in line for line in lines)
