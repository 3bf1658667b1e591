"""TFDS data sets: find one, prepare it, and prove its splits disjoint."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from job.data import solar_cells  # noqa: F401  (TFDS registers a builder when its module is imported)
from job.data.access import DESCRIPTION, Place, storage_error
from job.data.splits import SPLIT_VARIABLES, resolve_splits
from job.errors import ConfigError, UnavailableError, first_line
from job.settings.groups import DataSettings

logger = logging.getLogger(__name__)

TFDS_VERSION: str = tfds.__version__

_NAMED = 10  # of a long list, this many are named in a message
# What the operating system says of a folder that cannot be written; a failed download carries no errno.
_FOLDER_FAULTS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
}


@dataclass(frozen=True)
class Split:
    """A part of the data set. expression: as the user gave it. examples: how many it holds, undecodable ones too."""

    expression: str
    examples: int


@dataclass(frozen=True)
class Source:
    """A prepared data set whose three splits exist and are disjoint.

    name: TFDS name, with the configuration if it has one. version: e.g. ``4.0.1``.
    classes: class names in the order of the labels.
    splits: train, validation and test.
    identity: JSON that tells this data from any other, wherever it lies: no path is in it.
    builder, image_key, label_key: the TFDS builder, and which of its features are used.
    licence, citation, homepage: as the builder states them.
    """

    name: str
    version: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    identity: dict[str, Any]
    builder: Any = field(repr=False, compare=False)
    image_key: str = field(repr=False)
    label_key: str = field(repr=False)
    licence: str | None = None
    citation: str | None = None
    homepage: str | None = None


def open_source(settings: DataSettings, *, prepare: bool = True) -> Source:
    """Find the data set, prepare it if need be, and check its features and splits.

    Args:
        settings: the data group. ``data_dir`` None means TFDS's own default folder.
        prepare: whether a data set that is not prepared is, which may mean a long download. Where not, ConfigError
            without a problem is raised for it: nothing can be said of its splits.

    Returns:
        The data set, ready for ``read_splits``.

    Raises:
        ConfigError: no such data set, no prepared data set at the path, no image with a class label, or splits that
            are malformed, unknown, empty or overlapping (all of them reported together).
        UnavailableError: the data set could not be downloaded, or its storage could not be reached.
    """
    builder = _open_builder(settings, prepare)
    image_key, label_key = _find_features(builder)
    # Asked only of a prepared set: some builders learn the names while they prepare.
    label = builder.info.features[label_key]
    if not label.num_classes or label.num_classes < 2:
        raise _wrong(
            f"{label_key} of {builder.info.full_name} has {label.num_classes or 'no'} classes; at least 2 are needed",
        )
    classes = tuple(label.names)
    expressions = {part: str(getattr(settings, f"{part}_split")) for part in SPLIT_VARIABLES}
    intervals = resolve_splits(builder.info, expressions)
    config = builder.builder_config
    return Source(
        name=f"{builder.name}/{config.name}" if config else builder.name,
        version=str(builder.version),
        classes=classes,
        splits={
            part: Split(expressions[part], sum(stop - start for _, start, stop in found))
            for part, found in intervals.items()
        },
        identity={
            "name": builder.info.full_name,
            "classes": list(classes),
            "features": [image_key, label_key],
            "splits": {part: [list(interval) for interval in found] for part, found in intervals.items()},
            "files": {
                name: {"shard_lengths": list(info.shard_lengths), "num_bytes": int(info.num_bytes)}
                for name, info in sorted(builder.info.splits.items())
            },
        },
        builder=builder,
        image_key=image_key,
        label_key=label_key,
        licence=builder.info.redistribution_info.license or None,
        citation=builder.info.citation or None,
        homepage=builder.info.homepage or None,
    )


def _wrong(message: str) -> ConfigError:
    return ConfigError.of("TRANSFER_DATASET", message)


def _open_builder(settings: DataSettings, prepare: bool) -> Any:
    dataset = settings.dataset
    is_path = "://" in dataset or dataset.startswith(("/", ".", "~")) or (Path(dataset) / DESCRIPTION).is_file()
    if is_path:
        place = Place(dataset, "TRANSFER_DATASET", is_prepared=True)
    else:
        name = dataset.split(":")[0].split("/")[0]
        place = Place(f"{settings.data_dir or '.'}/{name}", "TRANSFER_DATA_DIR", is_prepared=False)
    place.ask()
    with place.errors(dataset if is_path else f"{dataset} in {settings.data_dir or 'the data folder of TFDS'}"):
        if is_path:
            return _builder_from_directory(dataset)
        builder = _builder_by_name(dataset, settings.data_dir)
        if not builder.is_prepared() and settings.data_dir and "://" in settings.data_dir:
            logger.info("%s is not prepared in %s, so it is looked for locally", dataset, settings.data_dir)
            builder = _builder_by_name(dataset, None)
        if not builder.is_prepared():
            _find_features(builder)  # before gigabytes are downloaded in vain
            if not prepare:
                raise ConfigError([])
            _prepare(builder, dataset)
    if not builder.info.splits:
        raise _wrong(
            f"{builder.data_dir} holds no complete data set (it has no splits); remove the folder to prepare it anew",
        )
    return builder


def _builder_from_directory(folder: str) -> Any:
    place = str(Path(folder).expanduser()) if "://" not in folder else folder.rstrip("/")
    if not tf.io.gfile.exists(f"{place}/{DESCRIPTION}"):
        inside = [found for depth in ("*", "*/*") for found in tf.io.gfile.glob(f"{place}/{depth}/{DESCRIPTION}")]
        hint = f"; below it there is {str(inside[0]).removesuffix(f'/{DESCRIPTION}')}" if inside else ""
        raise _wrong(
            f"{folder!r} is no prepared TFDS data set: it has no dataset_info.json{hint}. "
            "Give the folder that holds dataset_info.json, features.json and the record files",
        )
    try:
        return tfds.builder_from_directory(place)
    except Exception as error:
        if storage_error(error):
            raise
        # Whatever TFDS trips over in metadata that the user pointed at is theirs to mend.
        raise _wrong(f"the metadata of {folder!r} cannot be read by TFDS: {first_line(error)}") from error


def _builder_by_name(dataset: str, data_dir: str | None) -> Any:
    try:
        return tfds.builder(dataset, data_dir=data_dir)
    except ImportError as error:
        raise _wrong(f"{dataset!r} needs a Python package that is not installed: {first_line(error)}") from error
    except (ValueError, AssertionError, KeyError) as error:
        known = sorted(set(tfds.list_builders(with_community_datasets=False)))  # of the installed package: no network
        name = dataset.split(":")[0].split("/")[0]
        if name in known:
            builder = tfds.builder_cls(name)
            versions = ", ".join(str(version) for version in (builder.VERSION, *builder.SUPPORTED_VERSIONS))
            configs = ", ".join(list(builder.builder_configs)[:_NAMED])
            message = (
                f"{dataset!r} cannot be opened: {first_line(error)}. The versions of {name} are {versions}"
                f"{'; configurations: ' + configs if configs else ''}"
            )
        else:
            near = difflib.get_close_matches(name, known, n=3)
            message = (
                f"there is no TFDS data set {dataset!r}{' in ' + data_dir if data_dir else ''}"
                f"{'; did you mean ' + ' or '.join(near) + '?' if near else '.'} Accepted: a TFDS name, name:version, "
                "name/config, or the path or gs:// URI of a prepared TFDS directory"
            )
        raise _wrong(message) from error


def _prepare(builder: Any, dataset: str) -> None:
    logger.info("preparing %s in %s (download: %s)", dataset, builder.data_dir, builder.info.download_size)
    start = time.monotonic()
    on_terminal = sys.stderr.isatty()
    if not on_terminal:
        tfds.disable_progress_bar()
    try:
        # TFDS prints to standard output, which belongs to the log.
        with contextlib.redirect_stdout(sys.stderr if on_terminal else io.StringIO()):
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except ConfigError:
        raise
    except (ImportError, AssertionError, ValueError) as error:
        raise _wrong(f"TFDS cannot prepare {dataset}: {first_line(error)}") from error
    except (OSError, tfds.download.DownloadError, tf.errors.OpError) as error:
        if getattr(error, "errno", None) in _FOLDER_FAULTS or "Not enough disk space" in str(error):
            raise ConfigError.of(
                "TRANSFER_DATA_DIR", f"{dataset} cannot be prepared in {builder.data_dir}: {first_line(error)}"
            ) from error
        raise UnavailableError(
            f"{dataset} is not prepared in {builder.data_dir} and could not be downloaded: {first_line(error)}. "
            "Prepare it where its source can be reached (tfds.builder(name, data_dir=folder).download_and_prepare()) "
            "and give that folder, or a copy of it on gs://, as TRANSFER_DATA_DIR"
        ) from error
    logger.info("prepared %s: %d examples, %.0f s", dataset, _total(builder), time.monotonic() - start)


def _total(builder: Any) -> int:
    return sum(split.num_examples for split in builder.info.splits.values())


def _find_features(builder: Any) -> tuple[str, str]:
    """Return the names of the image and of the label."""
    features = dict(builder.info.features.items()) if hasattr(builder.info.features, "items") else {}
    keys = builder.info.supervised_keys
    images, labels = [], []
    for key, feature in features.items():
        # A LabeledImage is a mask; float images hide their bits in a PNG of four channels.
        is_photo = isinstance(feature, tfds.features.Image) and not isinstance(feature, tfds.features.LabeledImage)
        if is_photo and np.dtype(feature.np_dtype) in (np.dtype(np.uint8), np.dtype(np.uint16)):
            images.append(key)
        elif isinstance(feature, tfds.features.ClassLabel):
            labels.append(key)
    if isinstance(keys, tuple) and len(keys) == 2 and keys[0] in images and keys[1] in labels:
        images, labels = [keys[0]], [keys[1]]
    if len(images) != 1 or len(labels) != 1:
        listed = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
        raise _wrong(
            f"{builder.info.full_name} does not say which image and which class label to learn from: it has "
            f"{len(images)} photos and {len(labels)} class labels among its features {listed}",
        )
    return images[0], labels[0]
