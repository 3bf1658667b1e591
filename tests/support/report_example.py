"""A manifest as large as an experiment's, with everything that the report shows, from simulated predictions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import image
from scipy import special

from job.manifest import Manifest, Result, SplitMetrics, Wrong
from job.results.comparisons import comparisons, summaries, verdict
from job.results.report import wanted_photos
from job.results.statistics import split_metrics
from tests.support.small_runs import fields

FLOWERS = ("dandelion", "daisy", "tulips", "sunflowers", "roses")
SIZES = {"train": 2936, "validation": 240, "test": 240}
# how far the right class's logit stands out, at the whole split, and what a tenth of the examples costs
SKILL = {"scratch": (1.0, 0.9), "frozen": (3.0, 0.5), "fine_tune": (3.6, 1.1)}
SECONDS = {"scratch": 300.0, "frozen": 4.0, "fine_tune": 120.0}


def example(
    arms: Sequence[str] = ("scratch", "frozen", "fine_tune"),
    fractions: Sequence[float] = (0.02, 0.1, 0.5, 1.0),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    classes: Sequence[str] = FLOWERS,
    epochs: int = 10,
    price: float | None = 2.5,
    **changes: Any,
) -> Manifest:
    """Return a manifest of every arm at every fraction and seed; ``changes`` replaces fields of it."""
    generator = np.random.default_rng(0)
    truth = generator.integers(0, len(classes), SIZES["test"])
    scored: list[tuple[Result, npt.NDArray[np.bool_]]] = []
    for fraction in fractions:
        for arm in arms:
            for seed in seeds:
                metrics, logits = simulated(generator, arm, fraction, truth, classes)
                result = Result.model_validate(
                    {
                        "arm": arm,
                        "train_fraction": fraction,
                        "seed": seed,
                        "train_examples": round(fraction * SIZES["train"]),
                        "resumed": 0,
                        "parameters": {"total": 2263106, "trainable": 2562, "backbone_trainable": 0},
                        "history": history(generator, arm, epochs, metrics.accuracy),
                        "metrics": dict.fromkeys(SIZES, metrics),
                        "batch_norm": {"test_accuracy_raw": 0.31, "test_accuracy_recalibrated": 0.4}
                        if arm == "scratch"
                        else None,
                        "most_wrong": most_wrong(logits, truth, classes),
                        "rows": {"cut": "pooled", "row_bytes": 5120, "kept": "memory"},
                        "seconds": durations(arm, fraction, first=not scored),
                        "examples_per_second": 60007.5 if arm == "frozen" else 76.25,
                        "energy_joules": None if price is None else SECONDS[arm] * 70,
                        "cost": None if price is None else SECONDS[arm] * fraction * price / 3600,
                        "saved_model": f"arms/{arm}/fraction-{fraction:g}/seed-{seed}/saved_model",
                    }
                )
                scored.append((result, logits.argmax(1) == truth))
    smallest = fields()
    larger = {
        "run_id": "tf_flowers-MobileNetV2-abababababab",
        "settings": settings(arms, fractions, seeds, price),
        "environment": smallest["environment"] | {"tensorflow": "2.21.0", "devices": ["CPU (x86_64, 2 cores)"]},
        "dataset": {
            "name": "tf_flowers",
            "version": "3.0.1",
            "classes": list(classes),
            "skipped_examples": 2,
            "duplicates_across_splits": 3,
            "duplicates": [
                {
                    "kind": kind,
                    "examples": [
                        {"split": "train", "example_id": f"tf_flowers-train.tfrecord-00000-of-00002__{number}"},
                        {"split": "test", "example_id": f"tf_flowers-train.tfrecord-00001-of-00002__{number + 7}"},
                    ],
                }
                for number, kind in enumerate(("exact", "exact", "near"))
            ],
            "splits": {
                split: {"expression": f"train[{number}0%:{number + 1}0%]", "examples": size}
                for number, (split, size) in enumerate(SIZES.items())
            },
            "licence": "CC BY 2.0",
            "citation": '@ONLINE {tfflowers,\n  author = "The TensorFlow Team",\n  title = "Flowers" }',
            "homepage": "https://www.tensorflow.org/tutorials/load_data/images",
        },
        "results": [result for result, _ in scored],
        "summaries": summaries(scored),
        "verdict": verdict(scored),
        "comparisons": comparisons(scored),
    }
    smallest["backbone"]["weights"]["licence"] = "Apache-2.0"
    return Manifest.model_validate(smallest | larger | changes)


def simulated(
    generator: np.random.Generator, arm: str, fraction: float, truth: npt.NDArray[np.int64], classes: Sequence[str]
) -> tuple[SplitMetrics, npt.NDArray[np.float64]]:
    """Return the logits of the test split, and their metrics, which do for the other splits too."""
    skill, slope = SKILL[arm]
    logits = generator.gumbel(size=(len(truth), len(classes)))
    logits[np.arange(len(truth)), truth] += max(0.3, skill + slope * np.log10(fraction)) + generator.normal(0, 0.15)
    # two neighbouring classes look alike
    logits[:, 1] += 0.8 * (truth == 0)
    probabilities = special.softmax(1.3 * logits, axis=1).astype(np.float32)
    return split_metrics(truth, logits, probabilities, classes), logits


def most_wrong(
    logits: npt.NDArray[np.float64], truth: npt.NDArray[np.int64], classes: Sequence[str]
) -> list[dict[str, Any]]:
    probabilities = special.softmax(1.3 * logits, axis=1)
    own = probabilities[np.arange(len(truth)), truth]
    predicted = probabilities.argmax(axis=1)
    worst = [int(index) for index in np.argsort(own) if predicted[index] != truth[index]]
    return [
        Wrong(
            example_id=f"tf_flowers-train.tfrecord-00001-of-00002__{index}",
            label=classes[truth[index]],
            predicted=classes[predicted[index]],
            label_probability=float(own[index]),
            predicted_probability=float(probabilities[index].max()),
        ).model_dump()
        for index in worst[:12]
    ]


def history(generator: np.random.Generator, arm: str, epochs: int, end: float) -> list[dict[str, Any]]:
    rows = []
    for epoch in range(1, epochs + 1):
        near = 1 - 0.6 * np.exp(-epoch / 3)
        noise = generator.normal(0, 0.01, 2)
        rows.append(
            {
                "epoch": epoch,
                "phase": {"scratch": "all", "frozen": "head"}.get(arm, "head" if epoch <= 2 else "tail"),
                "train_loss": float(1.6 * np.exp(-epoch / 4) + 0.1 + abs(noise[0])),
                "train_accuracy": float(min(1.0, end * near + 0.04 + noise[0])),
                "validation_loss": float(1.4 * np.exp(-epoch / 3) + 0.4 + abs(noise[1])),
                "validation_accuracy": float(min(1.0, max(0.0, end * near + noise[1]))),
                "seconds": 3.5,
            }
        )
    return rows


def durations(arm: str, fraction: float, first: bool) -> dict[str, float]:
    parts = {
        "data": 21.5 if first else 0.0,
        "features": 14.25 if first else 0.0,
        "training": SECONDS[arm] * fraction,
        "evaluation": 2.5,
        "export": 1.125,
    }
    return {**parts, "total": sum(parts.values())}


def settings(
    arms: Sequence[str], fractions: Sequence[float], seeds: Sequence[int], price: float | None
) -> dict[str, Any]:
    return {
        "dataset": "tf_flowers",
        "train_split": "train[:80%]",
        "train_fractions": list(fractions),
        "image_size": 160,
        "weights_sha256": None,
        "head_units": [],
        "dropout": 0.0,
        "arms": list(arms),
        "fine_tune_from": "block_11_expand_BN",
        "epochs": 10,
        "head_epochs": 2,
        "batch_size": 32,
        "optimizer": "adam",
        "learning_rate": 0.001,
        "fine_tune_learning_rate": 0.0001,
        "augmentation": "none",
        "seeds": list(seeds),
        "deterministic": False,
        "cost_per_hour": price,
    }


def photos(manifest: Manifest, size: int = 160) -> dict[str, bytes]:
    """Return a JPEG for every photo that the report of ``manifest`` shows."""
    generator = np.random.default_rng(0)
    pictures = {}
    for example_id in wanted_photos(manifest.results):
        rows, columns = np.mgrid[:size, :size] / size
        waves = [np.sin(12 * (rows * a + columns * b)) for a, b in generator.normal(size=(3, 2))]
        pixels = 127 + 60 * np.stack(waves, axis=-1) + generator.normal(0, 20, (size, size, 3))
        file = io.BytesIO()
        image.imsave(file, pixels.clip(0, 255).astype(np.uint8), format="jpeg")
        pictures[example_id] = file.getvalue()
    return pictures
