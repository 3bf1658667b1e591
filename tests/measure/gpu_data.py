"""Photos, weights and settings of the GPU acceptance run: what its parts share.

    python -m tests.measure.gpu_data FOLDER    prepares the photos below FOLDER (--cpu: a few small ones); seconds

The solar cells where the package elpv-dataset is installed, and generated photos. Weights are those of
GPU_ACCEPTANCE_WEIGHTS, else the MobileNetV2 file of ../shared, else random values.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support.real import WEIGHTS, read_env_file
from tests.support.running import ROOT, environment_of

Found = dict[str, Any]
HIDE_GPUS = {"CUDA_VISIBLE_DEVICES": "-1"}
CLASSES = ("cat", "dog", "owl")
# With --cpu: a few blocks of the network on tiny photos, so that every process is about its start.
TINY_NETWORK = {"TRANSFER_TRUNCATE_AT": "block_1_project_BN", "TRANSFER_FINE_TUNE_FROM": "block_1_expand"}


@dataclass(frozen=True)
class Sizes:
    """Of the generated photos: how many, their side in pixels, and that of the images trained on for the rates.

    batches: those whose rates are measured. rated: photos to train on, to validate on and to test on there.
    """

    photos: int
    side: int
    image: int
    batches: tuple[int, ...]
    rated: tuple[int, int, int]


# 2,048 photos are whole batches of either size; half a second of an H100's time.
GPU = Sizes(3072, 200, 160, (32, 256), (2048, 512, 512))
CPU = Sizes(1000, 40, 32, (8, 16), (32, 16, 16))


@dataclass(frozen=True)
class Place:
    """Where the acceptance works. work: scratch space of all parts. output: what is kept. cpu: small, without a GPU."""

    work: Path
    output: Path
    cpu: bool

    @property
    def sizes(self) -> Sizes:
        """Return how many photos there are, and how large; GPU_ACCEPTANCE_BATCHES=32,256 names other batch sizes."""
        sizes, batches = CPU if self.cpu else GPU, os.environ.get("GPU_ACCEPTANCE_BATCHES")
        return replace(sizes, batches=tuple(map(int, batches.split(",")))) if batches else sizes

    def found(self, part: str) -> Found | None:
        """Return what a part found; None where nothing is known of it yet."""
        path = self.work / "found" / f"{part}.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def keep(self, part: str, found: Mapping[str, Any], *, whole: bool = True) -> None:
        """Keep what a part found so far. whole: whether the part is through, so that nothing is missing."""
        write_json(self.work / "found" / f"{part}.json", {**found, "whole": whole})

    def log(self, name: str) -> Path:
        """Return the file for what a process prints."""
        path = self.output / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def environment(self, changes: Mapping[str, str], *, all_gpus: bool = False) -> dict[str, str]:
        """Return the environment of a process of the job: this one's without its settings, with ``changes``.

        Of several GPUs it is given the first, so that what is found on one machine can be compared with another.
        """
        # where TensorFlow itself lies on PYTHONPATH, as on machines without a virtual environment, it stays there
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        seen = {} if all_gpus else {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
        seen = HIDE_GPUS if self.cpu else seen
        return environment_of({"TRANSFER_LOG_FORMAT": "json", "PYTHONPATH": path} | seen | dict(changes))

    def places(self, name: str) -> dict[str, str]:
        """Return the settings by which a process publishes to, and keeps its files in, a folder of its own."""
        own = self.work / "jobs" / name
        return {"TRANSFER_OUTPUT_URI": str(own / "output"), "TRANSFER_CACHE_DIR": str(own / "cache")}

    @property
    def arguments(self) -> list[str]:
        """Return what tells a program of the acceptance of this place."""
        return ["--work", str(self.work), "--output", str(self.output), *(["--cpu"] if self.cpu else [])]


def write_json(path: Path, value: object) -> None:
    """Write JSON in one step, so that whoever reads it, or kills the writer, finds it whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


# Takes the place, the parts that are wanted of it, and the seconds that it has; keeps what it found.
Measure = Callable[[Place, Sequence[str], float], None]


def alone(function: Callable[[Place], Found]) -> Measure:
    """Return what keeps the result of a function under its name."""
    return lambda place, _, __: place.keep(function.__name__, function(place))


def run_program(program: str, description: str, functions: Mapping[str, Measure]) -> None:
    """Run the parts named on the command line, each by its function; one that several share is called once."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.measure.{program}", description=description)
    parser.add_argument("parts", nargs="+", choices=list(functions), metavar="PART", help=", ".join(functions))
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "gpu" / "work", help="with what parts prepared")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu", help="for logs")
    parser.add_argument("--cpu", action="store_true", help="everything small, on the CPU")
    parser.add_argument("--seconds", type=float, default=600.0, help="that it may take")
    chosen = parser.parse_args()
    place = Place(chosen.work.absolute(), chosen.output.absolute(), chosen.cpu)
    for function in dict.fromkeys(functions[part] for part in chosen.parts):
        function(place, [part for part in chosen.parts if functions[part] is function], chosen.seconds)
    for part in chosen.parts:
        print(json.dumps({part: place.found(part)}))  # noqa: T201


# --- settings ----------------------------------------------------------------------------------------------------


def has_solar_cells() -> bool:
    """Return whether the package with the solar cells is installed."""
    return importlib.util.find_spec("elpv_dataset") is not None


def weights_of(place: Place) -> tuple[Path, str]:
    """Return the weights file, and in words which it is."""
    if given := os.environ.get("GPU_ACCEPTANCE_WEIGHTS"):
        return Path(given).absolute(), f"{Path(given).name} (GPU_ACCEPTANCE_WEIGHTS)"
    if WEIGHTS.is_file():
        return WEIGHTS, f"{WEIGHTS.name} (../shared/weights)"
    return place.work / "random.weights.h5", "random values: accuracies of frozen and fine_tune say nothing"


def demo(place: Place, **changes: str) -> dict[str, str]:
    """Return the quickstart's settings, with ``changes``; with --cpu those of a small run that has everything."""
    if place.cpu:
        settings = generated(place, (96, 64, 64), image_size="32", epochs="2", batch_size="16")
    elif has_solar_cells():
        settings = read_env_file("solar-demo") | {"TRANSFER_DATA_DIR": str(place.work / "tfds")}
    else:
        settings = generated(place, (512, 384, 640), image_size="96")
    return settings | {"TRANSFER_WEIGHTS": str(weights_of(place)[0])} | _variables(changes)


def generated(place: Place, examples: tuple[int, int, int], **changes: str) -> dict[str, str]:
    """Return settings for so many generated photos to train on, to validate on and to test on."""
    train, validation, test = examples
    ends = train, train + validation, train + validation + test
    small = TINY_NETWORK if place.cpu else {}
    return small | {
        "TRANSFER_DATASET": "photos",
        "TRANSFER_DATA_DIR": str(place.work / "tfds"),
        "TRANSFER_TRAIN_SPLIT": f"train[:{ends[0]}]",
        "TRANSFER_VALIDATION_SPLIT": f"train[{ends[0]}:{ends[1]}]",
        "TRANSFER_TEST_SPLIT": f"train[{ends[1]}:{ends[2]}]",
        "TRANSFER_WEIGHTS": str(weights_of(place)[0]),
    } | _variables(changes)  # fmt: skip


def rated(place: Place, **changes: str) -> dict[str, str]:
    """Return the settings under which rates are measured."""
    sizes = place.sizes
    return generated(place, sizes.rated, image_size=str(sizes.image), **changes)


def _variables(changes: Mapping[str, str]) -> dict[str, str]:
    return {f"TRANSFER_{name.upper()}": value for name, value in changes.items()}


# --- preparing ---------------------------------------------------------------------------------------------------


def prepare(place: Place) -> None:
    """Write the photos and, where there are no others, random weights; keep what was made."""
    # encoding photos needs no GPU, and TensorFlow would take all of its memory for it
    os.environ.update(HIDE_GPUS)
    from job.data.dataset import open_source
    from job.settings.environment import load

    size = _write_photos(place)
    weights, said = weights_of(place)
    if not weights.is_file():
        if os.environ.get("GPU_ACCEPTANCE_WEIGHTS"):
            raise SystemExit(f"GPU_ACCEPTANCE_WEIGHTS: there is no file {weights}")
        _write_random_weights(weights)
    # prepared here, once: several processes of the job would write to one folder
    source = open_source(load(demo(place)).data)
    place.keep(
        "data",
        {
            "weights": said,
            "photos": f"{source.name} {source.version}",
            "examples": {name: split.examples for name, split in source.splits.items()},
            "generated": {"photos": place.sizes.photos, "side": place.sizes.side, "bytes_of_photo": size},
        },
    )


def _write_photos(place: Place) -> int:
    """Write the generated photos; return the mean bytes of one."""
    import numpy as np
    import tensorflow as tf

    from tests.support.photos import photo, write_examples

    sizes = place.sizes

    def encoded(number: int) -> bytes:
        pixels = photo(np.random.default_rng(number), number % len(CLASSES), len(CLASSES), sizes.side)
        return bytes(tf.io.encode_jpeg(pixels, quality=95).numpy())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        photos = list(pool.map(encoded, range(sizes.photos)))
    examples = [(each, number % len(CLASSES)) for number, each in enumerate(photos)]
    write_examples(place.work / "tfds", "photos", {"train": examples}, CLASSES, shards=4)
    return sum(map(len, photos)) // len(photos)


def _write_random_weights(path: Path) -> None:
    """Write random weights whose BatchNorm statistics are those of photos: else activations shrink to nothing."""
    import keras
    import numpy as np

    from tests.support.photos import photo

    keras.utils.set_random_seed(7)
    network = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(96, 96, 3))
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # the statistics are then those of the last batch
    generator = np.random.default_rng(7)
    photos = np.stack([photo(generator, number % len(CLASSES), len(CLASSES), 96) for number in range(32)])
    network(photos / 127.5 - 1.0, training=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    network.save_weights(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.gpu_data", description="photos and weights")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cpu", action="store_true", help="a few small photos")
    chosen = parser.parse_args()
    prepare(Place(chosen.folder.absolute(), chosen.folder.absolute(), chosen.cpu))


if __name__ == "__main__":
    main()
