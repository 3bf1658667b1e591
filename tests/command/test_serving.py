"""The published SavedModel in programs that know neither Keras nor the project, as deploy/serving/README.md tells."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.running import ROOT, Published, python

# In probability; another batch size rounds otherwise.
TOLERANCE = 1e-4

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


@dataclass(frozen=True)
class Images:
    """Encoded images as a client would send them; of the test split's among them, TFDS's ids and labels."""

    folder: Path
    ids: list[str]
    labels: list[int]

    @property
    def tested(self) -> list[str]:
        """Return the names of the test split's files."""
        return [f"test-{index:03}.jpg" for index in range(len(self.ids))]


@pytest.fixture(scope="module")
def images(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Images:
    import numpy as np
    import tensorflow as tf

    from tests.support.photos import encode_bmp, encode_gif, examples_of

    folder = tmp_path_factory.mktemp("images")
    examples = examples_of(photos, "train[80%:]")
    for index, example in enumerate(examples.values()):
        (folder / f"test-{index:03}.jpg").write_bytes(example["image"])
    colour = np.random.default_rng(0).integers(0, 255, (30, 20, 4), dtype=np.uint8)
    (folder / "rgba.png").write_bytes(tf.io.encode_png(colour).numpy())
    (folder / "grey.png").write_bytes(tf.io.encode_png(colour[..., :1]).numpy())
    (folder / "thin.png").write_bytes(tf.io.encode_png(colour[:, :1, :3]).numpy())
    (folder / "animated.gif").write_bytes(encode_gif([colour[..., 0] // 2, colour[..., 1] // 2]))
    (folder / "colour.bmp").write_bytes(encode_bmp(colour[..., :3]))
    (folder / "no-image.txt").write_bytes(b"these bytes are no image")
    (folder / "cut-short.jpg").write_bytes((folder / "test-000.jpg").read_bytes()[:200])
    return Images(folder, list(examples), [int(example["label"]) for example in examples.values()])


@pytest.fixture(scope="module")
def without_keras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which Keras and the job are found first, and fail.

    TensorFlow looks where Keras lies when it is imported, and imports it only at need.
    """
    folder = tmp_path_factory.mktemp("blocked")
    for name in ("keras", "job"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('blocked')\n")
    return folder


@pytest.mark.parametrize("arm", ["scratch", "fine_tune"])
def test_a_program_without_keras_serves_what_was_measured(
    published: Published, images: Images, without_keras: Path, tmp_path: Path, arm: str
) -> None:
    result = next(result for result in published.manifest["results"] if result["arm"] == arm)
    model = published.folder / result["saved_model"]
    done = python(SERVE, model, images.folder, cwd=tmp_path, PYTHONPATH=str(without_keras))
    answers = json.loads(done.stdout.partition("ANSWERS")[2])
    assert answers["from_pixels"] == [[None, 32, 32, 3], "uint8"]

    labels = images.labels
    single = [answers[name][1] for name in images.tested]
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


GUIDE = (ROOT / "deploy" / "serving" / "README.md").read_text(encoding="utf-8")
needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler: install gcc or clang, so that there is a command cc"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, flags=re.MULTILINE | re.DOTALL)


def block(language: str, word: str) -> str:
    (only,) = [text for text in blocks(language) if word in text]
    return only


@dataclass(frozen=True)
class Desk:
    """Where a reader of the guide types: a folder with the run, the program's source and a photo."""

    folder: Path
    environment: dict[str, str]

    def type(self, commands: str, ends: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the commands as written, until the first that fails; the code at the end must be ``ends``."""
        environment = self.environment | variables
        command = ["bash", "-euo", "pipefail", "-c", commands]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == ends, done.stderr
        return done


@pytest.fixture(scope="module")
def desk(published: Published, images: Images, without_keras: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    (folder / "output").symlink_to(published.folder.parent)
    (folder / "deploy").symlink_to(ROOT / "deploy")
    (folder / "photo.jpg").write_bytes((images.folder / images.tested[0]).read_bytes())
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(without_keras), "TF_CPP_MIN_LOG_LEVEL": "3"}
    (exported,) = [words for line in block("sh", "export").splitlines() if (words := shlex.split(line))]
    name, value = exported[1].replace("RUN_ID", published.folder.name).split("=")
    return Desk(folder, environment | {name: value})


@pytest.fixture(scope="module")
def published_answers(published: Published) -> dict[str, tuple[str, list[float]]]:
    """Class and probabilities of each test photo, by TFDS's id, in ``predictions.csv`` of the guide's model."""
    (path,) = published.folder.glob("arms/fine_tune/fraction-1/seed-0/predictions.csv")
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    classes = [name.removeprefix("probability_") for name in header[2:]]
    answers = {example_id: [float(value) for value in columns] for example_id, _, *columns in rows}
    # a model that says the same of every photo would agree with itself however wrongly it is served
    firsts = [first for first, *_ in answers.values()]
    assert max(firsts) - min(firsts) > 0.05
    return {key: (classes[row.index(max(row))], row) for key, row in answers.items()}


def compile_as_written(desk: Desk, marker: str, **variables: str) -> None:
    # of the linkers, the usual one takes 10 s over the symbols of TensorFlow's library, gold 2 s
    flags = " -Wextra -Wpedantic -Werror" + (" -fuse-ld=gold" if shutil.which("ld.gold") else "")
    done = desk.type(block("sh", marker).replace(" -Wextra", flags), **variables)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.fixture(scope="module")
def predict(desk: Desk) -> None:
    """The program in C on the desk, compiled as the guide says."""
    compile_as_written(desk, "platlib")


def lines_of(done: subprocess.CompletedProcess[str]) -> list[tuple[str, str, list[float]]]:
    """Return file, class and probabilities in each line of the program's output."""
    fields = [line.split("\t") for line in done.stdout.splitlines()]
    return [(path, name, [float(value) for value in values]) for path, name, *values in fields]


@needs_compiler
@pytest.mark.usefixtures("predict")
def test_the_program_in_c_agrees_with_the_published_predictions(
    desk: Desk, images: Images, published_answers: dict[str, tuple[str, list[float]]]
) -> None:
    assert set(images.ids) == set(published_answers)
    # more than one of its batches, the last of them not full
    paths = [str(images.folder / name) for name in images.tested] * 2
    done = desk.type(block("sh", "./predict").replace("photo.jpg", shlex.join(paths)))
    lines = lines_of(done)
    assert [path for path, _, _ in lines] == paths
    for example_id, (_, name, probabilities) in zip(images.ids * 2, lines, strict=True):
        expected_name, expected = published_answers[example_id]
        assert name == expected_name
        assert probabilities == pytest.approx(expected, abs=TOLERANCE)


@needs_compiler
@pytest.mark.usefixtures("predict")
def test_the_program_in_c_names_what_it_cannot_classify_and_goes_on(desk: Desk, images: Images, tmp_path: Path) -> None:
    good = [str(images.folder / name) for name in ("rgba.png", "grey.png", "thin.png", "animated.gif", "colour.bmp")]
    (tmp_path / "empty.jpg").touch()
    bad = [str(images.folder / name) for name in ("no-image.txt", "cut-short.jpg")]
    bad += [str(tmp_path / "empty.jpg"), str(tmp_path / "absent.jpg"), str(tmp_path)]
    paths = [path for pair in zip(good, bad, strict=True) for path in pair]
    done = desk.type(f'./predict "$MODEL" {shlex.join(paths)}', ends=1)
    assert [path for path, _, _ in lines_of(done)] == good
    assert all(sum(probabilities) == pytest.approx(1, abs=1e-5) for _, _, probabilities in lines_of(done))
    said = dict(re.findall(r"^predict: (.+?): (.+)$", done.stderr, flags=re.MULTILINE))
    assert set(said) == set(bad)
    reasons = ["Unknown image file format", "Invalid JPEG data", "Input is empty"]
    reasons += ["No such file or directory", "Is a directory"]
    for path, reason in zip(bad, reasons, strict=True):
        assert reason in said[path]


@needs_compiler
@pytest.mark.usefixtures("predict")
def test_the_program_in_c_refuses_what_is_no_published_model(desk: Desk, tmp_path: Path) -> None:
    import tensorflow as tf

    module = tf.Module()
    module.double = tf.function(lambda image_bytes: {"probabilities": image_bytes + image_bytes})
    signature = module.double.get_concrete_function(tf.TensorSpec([None], tf.string, "image_bytes"))
    tf.saved_model.save(module, tmp_path / "other", {"serving_default": signature})
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "saved_model.pb").write_bytes((tmp_path / "other" / "saved_model.pb").read_bytes()[:200])
    cases = {
        "": "usage: predict MODEL_DIR FILE...",
        '"$MODEL"': "usage: predict MODEL_DIR FILE...",
        "absent photo.jpg": "MODEL_DIR is a folder saved_model of a published run",
        f"{damaged} photo.jpg": "cannot be loaded",
        f"{tmp_path / 'other'} photo.jpg": "has no signature serving_default that takes image_bytes and returns",
    }
    for arguments, said in cases.items():
        done = desk.type(f"./predict {arguments}", ends=2)
        assert done.stdout == "", arguments
        assert said in done.stderr


@pytest.mark.slow
@needs_compiler
def test_the_command_for_the_archive_compiles_the_program_against_a_folder_of_its_layout(
    desk: Desk, images: Images, published_answers: dict[str, tuple[str, list[float]]], tmp_path: Path
) -> None:
    # The archive itself is not to be had from a package registry: its names, with the wheel's headers and libraries.
    wheel = Path(sysconfig.get_path("platlib")) / "tensorflow"
    archive = tmp_path / "libtensorflow"
    (archive / "lib").mkdir(parents=True)
    (archive / "include").symlink_to(wheel / "include")
    for name, library in (("tensorflow", "cc"), ("tensorflow_framework", "framework")):
        for link in (f"libtensorflow_{library}.so.2", f"lib{name}.so"):
            (archive / "lib" / link).symlink_to(wheel / f"libtensorflow_{library}.so.2")
    for each in ("deploy", "output", "photo.jpg"):
        (tmp_path / each).symlink_to(desk.folder / each)
    here = Desk(tmp_path, desk.environment)
    compile_as_written(here, "LIBTENSORFLOW", HOME=str(tmp_path))
    ((_, name, _),) = lines_of(here.type(block("sh", "./predict")))
    assert name == published_answers[images.ids[0]][0]


@pytest.mark.slow
def test_saved_model_cli_agrees_with_the_published_predictions_without_keras(
    desk: Desk, images: Images, published_answers: dict[str, tuple[str, list[float]]]
) -> None:
    import numpy as np

    photos = shlex.join(str(images.folder / name) for name in images.tested)
    done = desk.type(block("sh", "saved_model_cli").replace("photo.jpg", photos))
    assert "inputs['image_bytes'] tensor_info" in done.stdout
    answers = desk.folder / "answers"
    names = [name.decode() for name in np.load(answers / "class_name.npy", allow_pickle=True)]
    assert names == [published_answers[example_id][0] for example_id in images.ids]
    expected = [published_answers[example_id][1] for example_id in images.ids]
    np.testing.assert_allclose(np.load(answers / "probabilities.npy"), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_the_guide_s_python_runs_where_keras_cannot_be_imported(
    desk: Desk, images: Images, published_answers: dict[str, tuple[str, list[float]]]
) -> None:
    (code,) = blocks("python")
    done = desk.type(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}")
    assert done.stdout.split()[0] == published_answers[images.ids[0]][0]


def input_by_tensorflow_serving_s_rule(request: dict[str, Any], name: str) -> list[bytes]:
    """Return what TensorFlow Serving makes of a request in rows for a signature whose one input, a string, is ``name``.

    After its documentation (RESTful API, "Encoding binary values") and FillTensorMapFromInstancesList in
    tensorflow_serving/util/json_tensor.cc: an instance is the value itself or an object of named values, all alike; a
    value is base64 if it is an object with the one key b64.
    """

    def is_value(item: Any) -> bool:
        return isinstance(item, str) or (isinstance(item, dict) and set(item) == {"b64"} and type(item["b64"]) is str)

    assert set(request) <= {"signature_name", "instances"}
    assert request.get("signature_name", "serving_default") == "serving_default"
    instances = request["instances"]
    assert isinstance(instances, list)
    if not is_value(instances[0]):
        assert all(set(item) == {name} for item in instances)
        instances = [item[name] for item in instances]
    assert all(is_value(item) for item in instances)
    return [
        item.encode() if isinstance(item, str) else base64.b64decode(item["b64"], validate=True) for item in instances
    ]


def test_the_rest_requests_carry_the_photo_by_tensorflow_serving_s_documented_rule(
    desk: Desk, images: Images, published_answers: dict[str, tuple[str, list[float]]]
) -> None:
    # The server is in no package registry: what it makes of the request by its documentation goes into the model here.
    import tensorflow as tf

    shell = "\n".join(text for text in blocks("sh") if "models/photos" in text)
    commands = re.sub(r"\\\n\s*", "", shell).splitlines()
    ours = [line for line in commands if not line.startswith(("docker ", "curl "))]
    assert len(commands) == len(ours) + 2
    desk.type("\n".join(ours))

    (docker,) = [shlex.split(line) for line in commands if line.startswith("docker ")]
    (curl,) = [shlex.split(line) for line in commands if line.startswith("curl ")]
    options = dict(zip(docker[3:-1:2], docker[4:-1:2], strict=True))
    mount = dict(part.split("=") for part in options["--mount"].split(","))
    served = Path(mount["source"].replace("$PWD", str(desk.folder)))
    (version,) = served.iterdir()
    assert version.name.isdecimal()
    model_name = options["--env"].removeprefix("MODEL_NAME=")
    # the image serves /models/$MODEL_NAME on port 8501
    assert mount["target"] == f"/models/{model_name}"
    assert options["--publish"].endswith(":8501")
    address = options["--publish"].partition(":")[0]
    assert curl[-1] == f"http://localhost:{address}/v1/models/{model_name}:predict"

    photo = (desk.folder / "photo.jpg").read_bytes()
    sent = (desk.folder / curl[curl.index("--data") + 1].removeprefix("@")).read_text()
    named = json.loads(block("json", "image_bytes"))
    assert base64.b64decode(named["instances"][0]["image_bytes"]["b64"]) == photo[:6]
    named["instances"][0]["image_bytes"]["b64"] = base64.b64encode(photo).decode()
    for request in (json.loads(sent), named):
        assert input_by_tensorflow_serving_s_rule(request, "image_bytes") == [photo]

    signature = tf.saved_model.load(str(version)).signatures["serving_default"]
    assert list(signature.structured_input_signature[1]) == ["image_bytes"]
    outputs = signature(image_bytes=tf.constant([photo]))
    expected_name, expected = published_answers[images.ids[0]]
    assert outputs["class_name"].numpy()[0].decode() == expected_name
    assert outputs["probabilities"].numpy()[0].tolist() == pytest.approx(expected, abs=TOLERANCE)
    # in rows, an answer of several outputs is a list of objects
    (example,) = json.loads(block("json", "predictions"))["predictions"]
    assert set(example) == set(outputs)
    assert not any(name.endswith("_bytes") for name in outputs)
    assert example["probabilities"].index(max(example["probabilities"])) == example["class_index"]
