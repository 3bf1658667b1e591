"""Every backbone of the table, by the real command: it trains in the three arms, and serves what was measured."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from job.backbone_table import BACKBONES
from job.models.weights import sha256_of
from tests.support.running import CLASSES, places, published_in, python, run_job

Probabilities = npt.NDArray[np.float32]

# Photos of another size than any network here takes, so that serving resizes.
PHOTO_SIZE = 90
PHOTOS = 40
TEST_PHOTOS = 8
# In probability; another batch size rounds otherwise.
TOLERANCE = 1e-4
# The largest network needs 19 GB with Adam's two slots for each weight, 15 GB with one; the next one 11 GB.
LARGEST = "ConvNeXtXLarge"


@dataclass(frozen=True)
class Variant:
    """A backbone, and the settings that make another network of it."""

    backbone: str
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {f"TRANSFER_{name.upper()}": value for name, value in self.settings.items()}


DEEPENED = {"head_units": "64,32", "dropout": "0.3"}
VARIANTS = {name: Variant(name) for name in BACKBONES} | {
    # the first layer that trains by default is still there
    "MobileNetV2-truncated": Variant("MobileNetV2", {"truncate_at": "block_13_expand_relu"}),
    "Xception-truncated": Variant("Xception", {"truncate_at": "block13_sepconv2_bn"}),
    # it is not
    "ResNet50-truncated": Variant(
        "ResNet50", {"truncate_at": "conv4_block6_out", "fine_tune_from": "conv4_block4_1_conv"}
    ),
    "EfficientNetV2B0-truncated": Variant(
        "EfficientNetV2B0", {"truncate_at": "block5e_add", "fine_tune_from": "block5a_expand_conv"}
    ),
    **{
        f"{name}-deepened": Variant(name, DEEPENED)
        for name in ("MobileNetV2", "Xception", "ResNet50", "EfficientNetV2B0")
    },
    "MobileNetV2-truncated-deepened": Variant("MobileNetV2", {"truncate_at": "block_12_add", **DEEPENED}),
}

# The serving side: encoded images and pixels in, probabilities out, without Keras and without the project.
SERVE = """
import json, pathlib, sys

sys.modules["keras"] = sys.modules["job"] = None
import numpy as np
import tensorflow as tf

folder = pathlib.Path(sys.argv[1])
encoded = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
pixels = np.load(folder / "pixels.npy")
answers = []
for path in sys.argv[2:]:
    signatures = tf.saved_model.load(path).signatures
    served = [signatures["serving_default"](image_bytes=tf.constant(encoded)),
              signatures["from_pixels"](pixels=tf.constant(pixels))]
    answers.append([each["probabilities"].numpy().tolist() for each in served])
print("ANSWERS" + json.dumps(answers))
"""


def save_weights(name: str, size: str, path: str) -> None:
    """Save random weights without top in the layout of Keras's ImageNet files.

    With the initial BatchNorm statistics the activations of deep networks shrink to nothing, and every photo gets the
    same answer: they are re-estimated on photos.
    """
    import h5py
    import keras

    from job.arms import Part
    from job.data.rows import Rows
    from job.models.backbones import preprocessing
    from job.models.classifier import Classifier, Head
    from job.models.recalibration import Recalibrator
    from tests.support.photos import photo

    keras.utils.set_random_seed(7)
    side = int(size)
    # as users have them, from Keras's own layers
    backbone = getattr(keras.applications, name)(include_top=False, weights=None, input_shape=(side, side, 3))
    model = Classifier(backbone, preprocessing(BACKBONES[name]), Head(len(CLASSES)), 0)
    generator = np.random.default_rng(7)
    pixels = np.stack([photo(generator, index % len(CLASSES), len(CLASSES), side) for index in range(32)])
    rows = Rows(("",) * len(pixels), np.zeros(len(pixels), np.int32), pixels, (b"",) * len(pixels))
    if model.batch_norms():
        Recalibrator(model, model.cut(Part.ALL)).recalibrate(rows, np.arange(len(rows)), len(rows))
    whole = Path(path).with_name("whole.h5")
    backbone.save(whole)
    with h5py.File(whole) as source, h5py.File(path, "w") as target:
        target.attrs.update(source["model_weights"].attrs)
        for group in source["model_weights"]:
            source.copy(source["model_weights"][group], target, group)
    whole.unlink()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.photos import write_dataset

    return write_dataset(tmp_path_factory.mktemp("tfds"), "pets", {"train": PHOTOS}, CLASSES, size=PHOTO_SIZE)


@pytest.fixture(scope="module")
def test_photos(data: Path) -> dict[str, bytes]:
    """The encoded photos of the test split, by TFDS's id."""
    from tests.support.photos import examples_of

    found = {name: example["image"] for name, example in examples_of(data, "train[80%:]").items()}
    assert len(found) == TEST_PHOTOS
    return found


def write_requests(folder: Path, photos: Mapping[str, bytes], size: int) -> None:
    """Write the photos as files named by their ids, and as pixels of the size that the network takes."""
    from job.data.decoding import decode_image

    folder.mkdir()
    for example_id, encoded in photos.items():
        (folder / f"{example_id}.jpg").write_bytes(encoded)
    np.save(folder / "pixels.npy", np.stack([decode_image(photos[name], size).numpy() for name in sorted(photos)]))


def published_probabilities(path: Path) -> tuple[list[str], Probabilities]:
    """Return the ids in ``predictions.csv``, sorted, and their probabilities float32 [n, classes]."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["example_id", "label", *(f"probability_{name}" for name in CLASSES)]
    lines.sort()
    return [line[0] for line in lines], np.array([line[2:] for line in lines], np.float32)


def check_parameters(results: Sequence[Mapping[str, Any]], backbone_parameters: int, hidden: Sequence[int]) -> None:
    """Check what trains in each arm: everything, the head alone, a part."""
    scratch, frozen, fine_tune = (result["parameters"] for result in results)
    # of the head, the standardisation alone never trains: a shift and a scale for each feature
    features, odd = divmod(frozen["total"] - backbone_parameters - frozen["trainable"], 2)
    head = sum((inputs + 1) * outputs for inputs, outputs in pairwise([features, *hidden, len(CLASSES)]))
    assert odd == 0
    assert frozen == frozen | {"trainable": head, "backbone_trainable": 0}
    for each in (scratch, fine_tune):
        assert each["total"] == frozen["total"]
        assert each["trainable"] == head + each["backbone_trainable"]
    assert 0 < fine_tune["backbone_trainable"] < scratch["backbone_trainable"] <= backbone_parameters


def check(variant: Variant, data: Path, photos: Mapping[str, bytes], folder: Path) -> None:
    row = BACKBONES[variant.backbone]
    weights = folder / "weights.h5"
    code = "import sys; from tests.models.test_every_backbone import save_weights; save_weights(*sys.argv[1:])"
    python(code, row.name, row.minimum_size, weights)  # a process of its own, whose memory is given back
    environment = {
        "TRANSFER_DATASET": str(data),
        "TRANSFER_TRAIN_SPLIT": "train[:60%]",
        "TRANSFER_VALIDATION_SPLIT": "train[60%:80%]",
        "TRANSFER_TEST_SPLIT": "train[80%:]",
        "TRANSFER_BACKBONE": row.name,
        "TRANSFER_IMAGE_SIZE": str(row.minimum_size),
        "TRANSFER_WEIGHTS": str(weights),
        "TRANSFER_EPOCHS": "2",
        "TRANSFER_HEAD_EPOCHS": "1",
        "TRANSFER_BATCH_SIZE": "8",
        "TRANSFER_OPTIMIZER": "sgd" if row.name == LARGEST else "adam",
    }
    process = run_job(environment | places(folder) | variant.environment)
    if process.code == 78 and row.name == LARGEST and "of memory, and" in process.errors:
        pytest.skip(f"{row.name} does not fit this machine: {process.text}")
    assert process.code == 0, process.errors
    published, manifest = published_in(folder / "output")
    assert manifest["backbone"]["weights"]["sha256"] == sha256_of(weights)

    results = manifest["results"]
    assert [result["arm"] for result in results] == ["scratch", "frozen", "fine_tune"]
    phases = [[epoch["phase"] for epoch in result["history"]] for result in results]
    assert phases == [["all", "all"], ["head", "head"], ["head", "tail"]]
    hidden = [int(units) for units in variant.settings.get("head_units", "").split(",") if units]
    check_parameters(results, manifest["backbone"]["parameters"], hidden)

    assert run_job({}, "verify", str(published)).code == 0
    requests = folder / "requests"
    write_requests(requests, photos, row.minimum_size)
    models = [published / result["saved_model"] for result in results]
    answers = json.loads(python(SERVE, requests, *models).stdout.partition("ANSWERS")[2])
    for result, served in zip(results, answers, strict=True):
        ids, expected = published_probabilities((published / result["saved_model"]).with_name("predictions.csv"))
        assert ids == sorted(photos)
        # a network that says the same of every photo would agree with itself however wrongly it is served; after so few
        # steps a deep head, whose classifier starts from zero, tells photos apart by half a percent
        spread = float(np.ptp(expected, axis=0).max())
        assert spread > 10 * TOLERANCE, result["arm"]
        for kind, probabilities in zip(("bytes", "pixels"), served, strict=True):
            difference = np.abs(np.array(probabilities, np.float32) - expected).max()
            print(f"{row.name} {result['arm']} from {kind}: largest difference {difference:.2g}")  # noqa: T201
            assert difference <= min(TOLERANCE, spread / 100), (result["arm"], kind)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_backbone_a_shorter_one_and_a_deeper_head_train_in_three_arms_and_serve_what_was_measured(
    data: Path, test_photos: dict[str, bytes], variant: Variant
) -> None:
    # pytest keeps its temporary folders; these take gigabytes
    with tempfile.TemporaryDirectory() as folder:
        check(variant, data, test_photos, Path(folder))
