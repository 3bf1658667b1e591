from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from job.data.dataset import Source, open_source
from job.data.decoding import decode_image
from job.data.reading import read_splits
from job.data.rows import stratified_subset
from job.errors import ConfigError, UnavailableError
from job.settings.environment import load
from tests.support.photos import (
    encode_bmp,
    encode_gif,
    examples_of,
    photo,
    write_dataset,
    write_examples,
    write_features,
)  # fmt: skip
from tests.support.refusals import refused as refused_for
from tests.support.running import python
from tests.support.servers import Handler, serving

SIZES = {"train": 20, "validation": 10, "test": 10}
WHOLE = {"train_split": "train", "validation_split": "validation", "test_split": "test"}
SPLITS = {"train_split": "train[:50%]", "validation_split": "train[50%:75%]", "test_split": "train[75%:]"}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every attempt to leave this machine fail."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("tfds"), splits={"train": 40, "extra": 6}, shards=3)


def open_with(dataset: Path | str, **values: Any) -> Source:
    given = {"dataset": str(dataset), **SPLITS, **values}
    environ = {f"TRANSFER_{name.upper()}": str(value) for name, value in given.items()}
    return open_source(load(environ).data)


def refused(dataset: Path | str, **values: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        open_with(dataset, **values)
    return {problem.variable: problem.message for problem in caught.value.problems}


# Finding the data set


def test_a_prepared_set_is_found_by_its_path_and_by_name_in_a_data_folder(photos: Path) -> None:
    by_path = open_with(photos)
    by_name = open_with("photos", data_dir=photos.parents[1])
    by_version = open_with("photos:1.0.0", data_dir=photos.parents[1])
    assert by_path == by_name == by_version
    assert (by_path.name, by_path.version, by_path.classes) == ("photos", "1.0.0", ("cat", "dog"))
    assert {part: split.examples for part, split in by_path.splits.items()} == {
        "train": 20,
        "validation": 10,
        "test": 10,
    }


def test_identity_does_not_depend_on_the_place_but_on_content_and_splits(photos: Path, tmp_path: Path) -> None:
    copy = write_dataset(tmp_path / "elsewhere", splits={"train": 40, "extra": 6}, shards=3)
    other = write_dataset(tmp_path / "other", splits={"train": 40, "extra": 6}, shards=3, seed=1)
    identity = open_with(photos).identity
    assert open_with(copy).identity == identity
    assert open_with(other).identity != identity
    assert open_with(photos, test_split="train[75%:]+extra").identity != identity
    assert str(photos.parent) not in json.dumps(identity)


def test_an_unknown_name_is_refused_with_near_names(tmp_path: Path) -> None:
    message = refused("cats_vs_dog", data_dir=tmp_path)["TRANSFER_DATASET"]
    assert "'cats_vs_dog'" in message
    assert "did you mean cats_vs_dogs" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dataset", "said"),
    [("tf_flowers:1.2.3", "3.0.1"), ("mnist_corrupted/zoom", "shot_noise"), ("solar_cells:0.1.0", "1.0.0")],
)
def test_an_unknown_version_or_configuration_is_refused_with_those_there_are(
    dataset: str, said: str, tmp_path: Path
) -> None:
    assert said in refused(dataset, data_dir=tmp_path)["TRANSFER_DATASET"]


def test_a_folder_without_a_prepared_set_is_refused_and_the_one_below_it_named(photos: Path, tmp_path: Path) -> None:
    assert "no dataset_info.json" in refused(tmp_path)["TRANSFER_DATASET"]
    assert str(photos) in refused(photos.parent)["TRANSFER_DATASET"]


def test_a_folder_with_spoiled_metadata_is_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path)
    (folder / "features.json").write_text("{")
    assert "metadata" in refused(folder)["TRANSFER_DATASET"]


def test_a_set_that_must_be_fetched_by_hand_is_refused_with_tfds_words(tmp_path: Path) -> None:
    assert "Manual directory" in refused("imagenet2012", data_dir=tmp_path)["TRANSFER_DATASET"]


def test_a_set_without_photos_is_refused_before_it_is_downloaded(tmp_path: Path) -> None:
    assert "features" in refused("imdb_reviews", data_dir=tmp_path)["TRANSFER_DATASET"]
    assert list(tmp_path.iterdir()) == []


def test_a_data_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "tf_flowers" in refused("tf_flowers", data_dir=tmp_path / "file" / "below")["TRANSFER_DATA_DIR"]


class _Gone(Handler):
    def respond(self) -> None:
        self.send_error(403)


class ElsewherePhotos(tfds.core.GeneratorBasedBuilder):
    """A set whose source answers, but gives nothing."""

    VERSION = tfds.core.Version("1.0.0")
    url = ""

    def _info(self) -> Any:
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(dl_manager.download(self.url))}

    def _generate_examples(self, path: Any) -> Iterator[Any]:
        yield str(path), {}


def test_a_failed_download_is_unavailable_and_says_how_to_bring_the_data(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(_Gone) as port:
        ElsewherePhotos.url = f"http://127.0.0.1:{port}/photos.zip"
        with pytest.raises(UnavailableError, match="TRANSFER_DATA_DIR"):
            open_with("elsewhere_photos", data_dir=tmp_path)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("features", "row", "said"),
    [
        (
            {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)},
            {"text": "a", "label": 1},
            "text",
        ),
        (
            {
                "left": tfds.features.Image(),
                "right": tfds.features.Image(),
                "label": tfds.features.ClassLabel(num_classes=2),
            },
            {"left": b"", "right": b"", "label": 1},
            "right (Image)",
        ),
        (
            {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=1)},
            {"image": b"", "label": 0},
            "1 classes",
        ),
    ],
    ids=["no photo", "two photos", "one class"],
)
def test_a_set_without_one_photo_and_one_class_label_is_refused(
    features: dict[str, Any], row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    assert said in refused(write_features(tmp_path, "odd", features, {"train": [row] * 8}))["TRANSFER_DATASET"]


# Splits


@pytest.mark.parametrize(
    ("train", "validation", "test", "variable", "shared"),
    [
        ("train[:50%]", "train[80%:]", "train[40%:60%]", "TRANSFER_TEST_SPLIT", 4),
        ("train", "extra", "train[:1]", "TRANSFER_TEST_SPLIT", 1),
        ("train[:10]", "train[9:20]", "extra", "TRANSFER_VALIDATION_SPLIT", 1),
        ("extra", "train[:30]", "train[-15:]", "TRANSFER_TEST_SPLIT", 5),
        ("train[:10]+extra", "train[10:20]", "extra[4:]", "TRANSFER_TEST_SPLIT", 2),
        ("train[1shard:]", "extra", "train[:2shard]", "TRANSFER_TEST_SPLIT", 14),
    ],
)
def test_overlapping_splits_are_refused_with_both_variables_the_number_and_an_example(
    photos: Path, train: str, validation: str, test: str, variable: str, shared: int
) -> None:
    expressions = {"train_split": train, "validation_split": validation, "test_split": test}
    problems = refused(photos, **expressions)
    assert list(problems) == [variable]
    other, common = shared_ids(photos, expressions, variable)
    assert len(common) == shared
    assert f"share {shared} examples" in problems[variable]
    assert other in problems[variable]
    assert any(f" {example}; " in problems[variable] for example in common)


def shared_ids(folder: Path, expressions: dict[str, str], variable: str) -> tuple[str, set[str]]:
    """Read the splits with TFDS, and return which other one has examples of this variable's split, and which."""
    ids = {f"TRANSFER_{name.upper()}": set(examples_of(folder, split)) for name, split in expressions.items()}
    mine = ids.pop(variable)
    ((other, common),) = ((name, mine & theirs) for name, theirs in ids.items() if mine & theirs)
    return other, common


def test_a_split_that_takes_examples_twice_is_refused(photos: Path) -> None:
    problems = refused(photos, train_split="train[:10]+train[5:20]")
    assert "takes twice 5 examples" in problems["TRANSFER_TRAIN_SPLIT"]
    problems = refused(photos, train_split="train+train", validation_split="extra[:2]", test_split="extra[2:]")
    assert "takes twice 40 examples" in problems["TRANSFER_TRAIN_SPLIT"]


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train[:10]", "train[10:20]", "train[20:]"),
        ("train[:33%]", "train[33%:67%]", "train[67%:]"),
        ("train[:-10]", "extra", "train[-10:]"),
        ("train[:5]+train[10:15]", "train[5:10]", "train[15:]+extra"),
        ("train[1shard:]", "train[:1shard]", "extra"),
    ],
)
def test_disjoint_splits_are_accepted(photos: Path, train: str, validation: str, test: str) -> None:
    source = open_with(photos, train_split=train, validation_split=validation, test_split=test)
    info = tfds.builder_from_directory(photos).info
    assert {part: split.examples for part, split in source.splits.items()} == {
        "train": info.splits[train].num_examples,
        "validation": info.splits[validation].num_examples,
        "test": info.splits[test].num_examples,
    }


@pytest.mark.parametrize("expression", ["dev", "train[", "train[:200%]", "train[:1000]", "train[a:b]", "train+dev"])
def test_a_split_that_is_unknown_or_malformed_is_refused_with_those_there_are(photos: Path, expression: str) -> None:
    problems = refused(photos, test_split=expression)
    assert list(problems) == ["TRANSFER_TEST_SPLIT"]
    assert repr(expression) in problems["TRANSFER_TEST_SPLIT"]
    assert "train (40 examples), extra (6 examples)" in problems["TRANSFER_TEST_SPLIT"]


@pytest.mark.parametrize("expression", ["train[:0]", "train[:1%]", "train[30:20]"])
def test_an_empty_split_is_refused(photos: Path, expression: str) -> None:
    problems = refused(photos, validation_split=expression)
    assert list(problems) == ["TRANSFER_VALIDATION_SPLIT"]
    assert repr(expression) in problems["TRANSFER_VALIDATION_SPLIT"]


def test_all_that_is_wrong_with_the_splits_is_reported_together(photos: Path) -> None:
    problems = refused(photos, train_split="train+train", validation_split="dev", test_split="train[:0]")
    assert sorted(problems) == ["TRANSFER_TEST_SPLIT", "TRANSFER_TRAIN_SPLIT", "TRANSFER_VALIDATION_SPLIT"]


# Decoding

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 128, (9, 7), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (9, 7, 1), dtype=np.uint8)
PALETTE = RNG.integers(0, 256, (128, 3), dtype=np.uint8)
GREY_RGB = np.repeat(GREY[..., np.newaxis], 3, axis=-1)


def png(pixels: Any) -> bytes:
    return bytes(tf.io.encode_png(pixels).numpy())


LOSSLESS = {
    "PNG colour": (png(RGB), RGB),
    "PNG grey": (png(GREY[..., np.newaxis]), GREY_RGB),
    "PNG grey and alpha": (png(np.concatenate([GREY[..., np.newaxis], ALPHA], -1)), GREY_RGB),
    "PNG RGBA": (png(np.concatenate([RGB, ALPHA], -1)), RGB),
    "PNG 16 bit": (png(RGB.astype(np.uint16) * 256 + 77), RGB),
    "PNG grey 16 bit": (png(GREY[..., np.newaxis].astype(np.uint16) * 256 + 200), GREY_RGB),
    "PNG one pixel wide": (png(RGB[:, :1]), RGB[:, :1]),
    "PNG one pixel": (png(RGB[:1, :1]), RGB[:1, :1]),
    "GIF animated": (encode_gif([GREY, GREY // 2, GREY // 3]), GREY_RGB),
    "BMP 24 bit": (encode_bmp(RGB), RGB),
    "BMP 32 bit": (encode_bmp(np.concatenate([RGB, ALPHA], -1)), RGB),
    "BMP grey": (encode_bmp(GREY), GREY_RGB),
    "BMP palette": (encode_bmp(GREY, PALETTE), PALETTE[GREY]),
    "BMP one pixel wide": (encode_bmp(GREY[:, :1]), GREY_RGB[:, :1]),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_format_is_decoded_to_its_colours_and_resized_with_antialias(name: str) -> None:
    encoded, pixels = LOSSLESS[name]
    for size in (4, 16):
        expected = tf.image.resize(pixels, [size, size], "bilinear", antialias=True)
        decoded = decode_image(encoded, size)
        assert decoded.shape == (size, size, 3)
        assert decoded.dtype == tf.uint8
        np.testing.assert_array_equal(decoded, np.clip(np.round(expected), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("pixels", [RGB, RGB[..., :1], RGB[:, :1]], ids=["colour", "grey", "one pixel wide"])
def test_jpeg_is_decoded_as_tensorflow_decodes_it(pixels: Any) -> None:
    encoded = tf.io.encode_jpeg(pixels)
    expected = tf.image.resize(tf.io.decode_jpeg(encoded, channels=3), [5, 5], "bilinear", antialias=True)
    np.testing.assert_array_equal(decode_image(encoded, 5), np.round(expected).astype(np.uint8))


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"BM",
        b"no image at all",
        png(RGB)[:60],
        encode_bmp(GREY)[:900],
        encode_gif([GREY])[:-200],
        LOSSLESS["BMP palette"][0][:14],
    ],
    ids=["empty", "two bytes", "text", "cut PNG", "cut BMP", "cut GIF", "header of BMP"],
)
def test_bytes_that_are_no_image_raise(encoded: bytes) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode_image(encoded, 8)


def test_a_bmp_pixel_beyond_its_palette_raises() -> None:
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode_image(encode_bmp(GREY, PALETTE[:5]), 8)


def test_decoding_can_be_saved_and_gives_the_same_pixels(tmp_path: Path) -> None:
    module = tf.Module()
    signature = [tf.TensorSpec([], tf.string)]
    module.decode = tf.function(lambda encoded: decode_image(encoded, 6), input_signature=signature)
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for encoded, _ in LOSSLESS.values():
        np.testing.assert_array_equal(loaded.decode(tf.constant(encoded)), decode_image(encoded, 6))


# Reading


def test_rows_equal_a_direct_decode_and_keep_ids_labels_and_digests(photos: Path, tmp_path: Path) -> None:
    source = open_with(photos)
    seen: list[tuple[int, int]] = []
    rows = read_splits(source, 8, tmp_path, 0.0, lambda done, total: seen.append((done, total)))
    assert seen == [(done, 40) for done in range(1, 41)]
    assert list(rows) == ["train", "validation", "test"]
    for part, read in rows.items():
        examples = examples_of(photos, source.splits[part].expression)
        assert set(read.ids) == set(examples)
        assert len(read) == len(read.labels) == len(read.values) == len(read.digests) == source.splits[part].examples
        assert read.labels.dtype == np.int32
        assert read.values.dtype == np.uint8
        values = read.values[:]
        for index, example_id in enumerate(read.ids):
            np.testing.assert_array_equal(values[index], decode_image(examples[example_id]["image"], 8))
            assert read.labels[index] == examples[example_id]["label"]
        np.testing.assert_array_equal(np.load(tmp_path / f"{part}.npy"), read.values[:])


def test_the_order_is_the_same_in_every_reading(photos: Path, tmp_path: Path) -> None:
    readings = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        readings.append(read_splits(open_with(photos), 4, tmp_path / name, 0.0)["train"])
    assert readings[0].ids == readings[1].ids
    assert readings[0].digests == readings[1].digests
    np.testing.assert_array_equal(readings[0].values[:], readings[1].values[:])


def test_odd_images_of_a_real_set_are_all_read(tmp_path: Path) -> None:
    examples = [(encoded, index % 2) for index, (encoded, _) in enumerate(LOSSLESS.values())]
    folder = write_examples(tmp_path, "odd", {"train": examples, "validation": examples, "test": examples})
    source = open_with(folder, **WHOLE)
    rows = read_splits(source, 8, tmp_path, 0.0)
    assert [len(read) for read in rows.values()] == [len(LOSSLESS)] * 3


def test_undecodable_images_are_left_out_up_to_the_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_dataset(tmp_path, splits=SIZES, bad=(3, 25))
    source = open_with(folder, **WHOLE)
    clean = write_dataset(tmp_path / "clean", splits=SIZES)
    (tmp_path / "good").mkdir()
    good = read_splits(open_with(clean, **WHOLE), 8, tmp_path / "good", 0)
    with caplog.at_level("WARNING"):
        rows = read_splits(source, 8, tmp_path, 2 / 40)
    assert {part: source.splits[part].examples - len(read) for part, read in rows.items()} == {
        "train": 1,
        "validation": 1,
        "test": 0,
    }
    messages = [record.getMessage() for record in caplog.records if record.name == "job.data.reading"]
    assert len(messages) == 3
    assert messages[-1] == "skipped 2 of 40 images that cannot be decoded"
    for part, read in rows.items():
        kept = [index for index, example_id in enumerate(good[part].ids) if example_id in set(read.ids)]
        assert tuple(good[part].ids[index] for index in kept) == read.ids
        np.testing.assert_array_equal(read.labels, good[part].labels[kept])
        np.testing.assert_array_equal(read.values[:], good[part].values[np.array(kept)])
        np.testing.assert_array_equal(np.load(tmp_path / f"{part}.npy"), read.values[:])


def test_more_undecodable_images_than_allowed_stop_the_run_with_their_ids(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, splits=SIZES, bad=(3, 4, 5, 25))
    source = open_with(folder, **WHOLE)
    with refused_for("TRANSFER_MAX_BAD_IMAGES", "photos-train.tfrecord-0000") as caught:
        read_splits(source, 8, tmp_path, 0.05)
    assert caught.value.problems[0].message.startswith("3 of the first ")


def test_a_split_or_a_class_without_a_decodable_image_is_refused(tmp_path: Path) -> None:
    sizes = {"train": 4, "validation": 2, "test": 2}
    for bad, variable in (((4, 5), "TRANSFER_VALIDATION_SPLIT"), ((1, 3), "TRANSFER_TRAIN_SPLIT")):
        folder = write_dataset(tmp_path / variable, splits=sizes, bad=bad)
        with refused_for(variable):
            read_splits(open_with(folder, **WHOLE), 8, tmp_path, 0.9)


def test_missing_labels_are_refused_with_the_variable_of_their_split(tmp_path: Path) -> None:
    encoded = png(RGB)
    labelled = [(encoded, 0), (encoded, 1)]
    folder = write_examples(tmp_path, "blind", {"train": labelled, "validation": labelled, "test": [(encoded, -1)]})
    source = open_with(folder, **WHOLE)
    with refused_for("TRANSFER_TEST_SPLIT", "without a label"):
        read_splits(source, 8, tmp_path, 0.0)


@pytest.mark.parametrize("kept", [0.5, 0.0], ids=["within a record", "empty"])
def test_a_record_file_cut_short_is_unavailable_and_its_folder_named(tmp_path: Path, kept: float) -> None:
    folder = write_dataset(tmp_path)
    source = open_with(folder)
    file = sorted(folder.glob("*.tfrecord*"))[-1]
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(UnavailableError, match=str(folder)):
        read_splits(source, 8, tmp_path, 0.0)


def test_a_record_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path)
    source = open_with(folder)
    sorted(folder.glob("*.tfrecord*"))[-1].unlink()
    with pytest.raises(ConfigError, match="tfrecord-00001-of-00002"):
        read_splits(source, 8, tmp_path, 0.0)


def test_what_the_progress_callback_raises_ends_the_reading(photos: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_splits(open_with(photos), 8, tmp_path, 0.0, stop)


# Rows


def test_a_subset_is_nested_stratified_sorted_and_depends_on_the_seed() -> None:
    labels = np.random.default_rng(3).choice(4, 1000, p=[0.6, 0.3, 0.098, 0.002]).astype(np.int32)
    labels[:2] = 3
    smaller: set[int] = set()
    for fraction in (0.001, 0.01, 0.1, 0.33, 0.5, 1.0):
        chosen = stratified_subset(labels, fraction, seed=7)
        assert chosen.dtype == np.int64
        assert np.all(np.diff(chosen) > 0)
        assert smaller <= set(chosen.tolist())
        smaller = set(chosen.tolist())
        counts, all_counts = np.bincount(labels[chosen], minlength=4), np.bincount(labels, minlength=4)
        assert np.all(counts >= 1)
        assert np.all(np.abs(counts - fraction * all_counts) <= 1)
    assert len(chosen) == 1000
    half = stratified_subset(labels, 0.5, seed=7)
    np.testing.assert_array_equal(half, stratified_subset(labels, 0.5, seed=7))
    assert set(half.tolist()) != set(stratified_subset(labels, 0.5, seed=8).tolist())


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        stratified_subset(np.zeros(4, np.int32), fraction, seed=0)


# The photos of the tests themselves, and the built-in set


def test_the_generated_photos_can_be_told_apart_by_their_colour() -> None:
    rng = np.random.default_rng(0)
    means = np.array([[photo(rng, label, 3, 16).mean(axis=(0, 1)) for _ in range(20)] for label in range(3)])
    centres = means.mean(axis=1)
    nearest = np.linalg.norm(means[:, :, np.newaxis] - centres, axis=-1).argmin(axis=-1)
    np.testing.assert_array_equal(nearest, np.arange(3)[:, np.newaxis].repeat(20, axis=1))


@pytest.mark.skipif(
    importlib.util.find_spec("elpv_dataset") is None, reason="needs the demo extra: pip install '.[demo]'"
)
def test_solar_cells_are_prepared_whole_without_network_and_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = open_with("solar_cells", data_dir=tmp_path)
    assert capfd.readouterr().out == ""
    assert (source.name, source.version, source.classes) == ("solar_cells", "1.0.0", ("functional", "defective"))
    assert sum(split.examples for split in source.splits.values()) == 2624
    dataset = source.builder.as_dataset(split="train", decoders={"image": tfds.decode.SkipDecoding()})
    examples = list(dataset.as_numpy_iterator())
    assert sum(int(example["label"]) for example in examples) == 715 + 106
    assert all((example["probability"] >= 0.5) == bool(example["label"]) for example in examples)
    assert {int(example["type"]) for example in examples} == {0, 1}
    assert len({example["filename"] for example in examples}) == 2624
    assert tf.io.decode_png(examples[0]["image"]).shape == (300, 300, 1)


def test_without_the_demo_extra_the_solar_cells_name_the_install_command(tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules["elpv_dataset"] = None
from job import errors
from job.data import dataset
from job.settings import environment
try:
    chosen = {{"TRANSFER_DATASET": "solar_cells", "TRANSFER_DATA_DIR": {str(tmp_path)!r}}}
    dataset.open_source(environment.load(chosen).data)
except errors.ConfigError as error:
    print(error)
"""
    done = python(program)
    assert done.stdout.startswith("TRANSFER_DATASET: ")
    assert "pip install '.[demo]'" in done.stdout
    assert not list(tmp_path.rglob("*.tfrecord*"))
