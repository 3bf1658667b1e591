"""The published SavedModel, served in a process where Keras cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Published

# The serving side knows TensorFlow and a file of encoded images, and nothing of the project.
SERVE = """
import json, pathlib, sys

for name in ("keras", "job"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} could be imported")
import tensorflow as tf

model = tf.saved_model.load(sys.argv[1])
folder = pathlib.Path(sys.argv[2])
serve = model.signatures["serving_default"]
answers = {}
for path in sorted(folder.iterdir()):
    try:
        served = serve(image_bytes=tf.constant([path.read_bytes()]))
    except tf.errors.InvalidArgumentError as error:
        answers[path.name] = str(error)
    else:
        assert served["probabilities"].dtype == tf.float32 and served["class_index"].dtype == tf.int64
        answers[path.name] = [served["probabilities"].numpy()[0].tolist(), int(served["class_index"][0]),
                              served["class_name"].numpy()[0].decode()]
batch = [path.read_bytes() for path in sorted(folder.glob("test-*"))]
served = serve(image_bytes=tf.constant(batch))
answers["batch"] = served["class_index"].numpy().tolist()
pixels = model.signatures["from_pixels"].structured_input_signature[1]["pixels"]
answers["from_pixels"] = [pixels.shape.as_list(), pixels.dtype.name]
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def images(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """Encoded images as a client would send them, and the labels of the test split's among them."""
    import numpy as np
    import tensorflow as tf
    import tensorflow_datasets as tfds

    from tests.photos import encode_bmp, encode_gif

    folder = tmp_path_factory.mktemp("images")
    builder = tfds.builder_from_directory(str(photos))
    test = builder.as_dataset(split="train[80%:]", decoders={"image": tfds.decode.SkipDecoding()}, shuffle_files=False)
    labels = []
    for index, example in enumerate(tfds.as_numpy(test)):
        (folder / f"test-{index:03}.jpg").write_bytes(example["image"])
        labels.append(int(example["label"]))
    colour = np.random.default_rng(0).integers(0, 255, (30, 20, 4), dtype=np.uint8)
    (folder / "rgba.png").write_bytes(tf.io.encode_png(colour).numpy())
    (folder / "grey.png").write_bytes(tf.io.encode_png(colour[..., :1]).numpy())
    (folder / "thin.png").write_bytes(tf.io.encode_png(colour[:, :1, :3]).numpy())
    (folder / "animated.gif").write_bytes(encode_gif([colour[..., 0] // 2, colour[..., 1] // 2]))
    (folder / "colour.bmp").write_bytes(encode_bmp(colour[..., :3]))
    (folder / "no-image.txt").write_bytes(b"these bytes are no image")
    (folder / "cut-short.jpg").write_bytes((folder / "test-000.jpg").read_bytes()[:200])
    return folder, labels


@pytest.mark.parametrize("arm", ["scratch", "fine_tune"])
def test_a_program_without_keras_serves_what_was_measured(
    published: Published, images: tuple[Path, list[int]], tmp_path: Path, arm: str
) -> None:
    # Found first, and failing: TensorFlow looks where Keras lies when it is imported, and imports it only at need.
    for name in ("keras", "job"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('blocked')\n")
    folder, labels = images
    result = next(result for result in published.manifest["results"] if result["arm"] == arm)
    command = [sys.executable, "-c", SERVE, str(published.folder / result["saved_model"]), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.partition("ANSWERS")[2])
    assert answers["from_pixels"] == [[None, 32, 32, 3], "uint8"]

    single = [answers[f"test-{index:03}.jpg"][1] for index in range(len(labels))]
    for predicted in (single, answers["batch"]):
        hits = sum(a == b for a, b in zip(predicted, labels, strict=True))
        assert hits / len(labels) == result["metrics"]["test"]["accuracy"]

    classes = published.manifest["dataset"]["classes"]
    for name in ("rgba.png", "grey.png", "thin.png", "animated.gif", "colour.bmp"):
        probabilities, index, class_name = answers[name]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert class_name == classes[index]
    assert "Unknown image file format" in answers["no-image.txt"]
    assert "Invalid JPEG data" in answers["cut-short.jpg"]
