"""The parts of the GPU acceptance run that look for themselves instead of starting the command.

    python -m tests.measure.gpu_inside machine decode    of what gpu_data prepared in output/gpu/work

TensorFlow is imported where it is used: a part says before which devices it may see.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from tests.measure.gpu_data import HIDE_GPUS, Found, Place, alone, demo, rated, run_program

_BATCH = 32
_DECODE_ROUNDS = 3
_TIMES_OVER = 4


def machine(place: Place) -> Found:
    """Return what the driver and TensorFlow say of the GPUs, and the machine around them."""
    if place.cpu:
        os.environ.update(HIDE_GPUS)
    import tensorflow as tf

    from job.machine import gpu_diagnosis
    from job.machine.limits import memory_limit

    gpus = tf.config.list_physical_devices("GPU")
    build = tf.sysconfig.get_build_info()
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    found: Found = {
        "gpus": [
            {"name": each.get("device_name"), "compute_capability": ".".join(map(str, each["compute_capability"]))}
            for each in details
        ],
        "driver": None,
        "tensorflow": tf.__version__,
        "cuda": build.get("cuda_version"),
        "cudnn": build.get("cudnn_version"),
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory_limit(),
        "python": sys.version.split()[0],
    }
    if not gpus and not place.cpu:
        asked = os.environ.get("NVIDIA_VISIBLE_DEVICES"), os.environ.get("CUDA_VISIBLE_DEVICES")
        problem = gpu_diagnosis.missing(*asked)
        found["why_none"] = problem[0].message if problem else "TensorFlow lists none"
    return found | ({} if place.cpu else _driver())


def _driver() -> Found:
    """Return what NVML says, of all GPUs of the machine, whichever of them this process may use."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "driver_cuda": _version(pynvml.nvmlSystemGetCudaDriverVersion_v2()),
            "nvml": [
                {
                    "name": pynvml.nvmlDeviceGetName(handle),
                    "memory": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                    "used": int(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
                }
                for handle in handles
            ],
        }
    except pynvml.NVMLError as error:
        return {"nvml": [], "nvml_fault": str(error)}


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def serve(place: Place) -> Found:
    """Let the models of ``run`` predict its test photos in this process, on the CPU, from the encoded files."""
    os.environ.update(HIDE_GPUS)
    import tensorflow as tf

    from job.models.export import centred_logits
    from tests.support.photos import examples_of

    settings = demo(place)
    published = next(Path(place.places("run")["TRANSFER_OUTPUT_URI"]).glob("*/manifest.json"), None)
    if published is None:
        raise SystemExit("there is no model to serve: the part run has published nothing")
    prepared = next((place.work / "tfds" / settings["TRANSFER_DATASET"]).glob("*"))
    photos = examples_of(prepared, settings["TRANSFER_TEST_SPLIT"])
    arms: Found = {}
    for result in json.loads(published.read_text(encoding="utf-8"))["results"]:
        model = published.parent / result["saved_model"]
        with (model.parent / "predictions.csv").open(newline="") as file:
            _, *rows = csv.reader(file)
        measured = np.array([row[2:] for row in rows], np.float32)
        served_by = tf.saved_model.load(str(model)).signatures["serving_default"]
        parts = []
        for start in range(0, len(rows), _BATCH):
            encoded = [photos[row[0]]["image"] for row in rows[start : start + _BATCH]]
            parts.append(served_by(image_bytes=tf.constant(encoded))["probabilities"].numpy())
        served = np.concatenate(parts)
        arms[result["arm"]] = {
            "examples": len(rows),
            "largest_difference": float(np.abs(served - measured).max()),
            "largest_logit_difference": float(np.abs(centred_logits(served) - centred_logits(measured)).max()),
            "agreement": float((served.argmax(axis=1) == measured.argmax(axis=1)).mean()),
            "proof": result.get("export_proof"),
        }
    return {"arms": arms}


def decode(place: Place) -> Found:
    """Return photos a second of the job's reading, and of the same decoding alone in tf.data, by turns."""
    os.environ.update(HIDE_GPUS)  # neither decodes on a GPU, and TensorFlow would take its memory
    import tensorflow as tf
    import tensorflow_datasets as tfds

    from job.data import reading
    from job.data.dataset import Split, open_source
    from job.data.decoding import decode_image
    from job.settings.environment import load

    size = place.sizes.image
    source = open_source(load(rated(place)).data)
    # all photos, several times over, so that how reading begins does not count
    expression = "+".join(["train"] * _TIMES_OVER)
    source = replace(source, splits={"train": Split(expression, _TIMES_OVER * place.sizes.photos)})
    raw = source.builder.as_dataset(split=expression, decoders={source.image_key: tfds.decode.SkipDecoding()})
    encoded = [example[source.image_key] for example in raw.as_numpy_iterator()]
    photos = tf.data.Dataset.from_tensor_slices(encoded)
    decoding = photos.map(lambda each: decode_image(each, size), num_parallel_calls=tf.data.AUTOTUNE).prefetch(64)

    def read() -> None:
        with tempfile.TemporaryDirectory(dir=place.work) as folder:
            reading.read_splits(source, size, Path(folder), 0.0)

    def decoded() -> None:
        decoding.reduce(0, lambda count, _: count + 1)

    read()  # the first of each traces
    decoded()
    pairs = [(_timed(read), _timed(decoded)) for _ in range(_DECODE_ROUNDS)]
    return {
        "photos": len(encoded),
        "cores": len(os.sched_getaffinity(0)),
        "job": median(len(encoded) / mine for mine, _ in pairs),
        "alone": median(len(encoded) / theirs for _, theirs in pairs),
        "share": median(theirs / mine for mine, theirs in pairs),
    }


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


PARTS = {function.__name__: alone(function) for function in (machine, serve, decode)}

if __name__ == "__main__":
    run_program("gpu_inside", "parts of the GPU acceptance run", PARTS)
