"""Runs without training: a manifest that is sound in itself, and the files that it lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from job.manifest import Artifact, Manifest, json_schema
from job.storage.commit import Outcome, commit
from job.storage.finished import Pending
from job.storage.store import Store

FINGERPRINT = "ab" * 32
MODEL = "arms/frozen/fraction-1.0/seed-0/saved_model"
FILES = {
    f"{MODEL}/saved_model.pb": b"graph",
    f"{MODEL}/variables/variables.index": b"index",
    "arms/frozen/fraction-1.0/seed-0/predictions.csv": b"id,label,cat,dog\r\n",
    "report.html": b"<html></html>",
    "manifest.schema.json": json.dumps(json_schema()).encode(),
}


def metrics(examples: int, correct: int) -> dict[str, Any]:
    half = examples // 2
    wrong = examples - correct
    names = [("cat", half), ("dog", examples - half)]
    return {
        "examples": examples,
        "loss": 0.5,
        "accuracy": correct / examples,
        "accuracy_interval": [0.0, 1.0],
        "auc": 0.9,
        "calibration_error": 0.1,
        "confusion": [[half - wrong, wrong], [0, examples - half]],
        "per_class": [{"name": name, "precision": 0.9, "recall": 0.9, "f1": 0.9, "support": n} for name, n in names],
    }


def fields() -> dict[str, Any]:
    """Return the manifest of a run without artifacts, as JSON values."""
    names = ("data", "features", "training", "evaluation", "export", "total")
    sizes = {"train": 30, "validation": 10, "test": 12}
    return {
        "schema_version": "1.0",
        "run_id": "run",
        "created": "2025-01-02T00:00:00Z",
        "fingerprint": FINGERPRINT,
        "settings": {"dataset": "cats_vs_dogs"},
        "environment": {
            **dict.fromkeys(("python", "tensorflow", "keras", "tensorflow_datasets", "job"), "1"),
            "devices": ["CPU"],
            "workers": 1,
            "precision": "float32",
            "xla": False,
            "deterministic": False,
        },
        "dataset": {
            "name": "cats_vs_dogs",
            "version": "4.0.1",
            "classes": ["cat", "dog"],
            "skipped_examples": 0,
            "duplicates_across_splits": 0,
            "splits": {split: {"expression": split, "examples": size} for split, size in sizes.items()},
        },
        "backbone": {
            "name": "MobileNetV2",
            "image_size": 160,
            "layers": 154,
            "parameters": 2257984,
            "weights": {"source": "imagenet", "sha256": "0" * 64},
        },
        "results": [
            {
                "arm": "frozen",
                "train_fraction": 1.0,
                "seed": 0,
                "train_examples": 30,
                "resumed": 0,
                "parameters": {"total": 10, "trainable": 5, "backbone_trainable": 0},
                "history": [],
                "metrics": {split: metrics(size, size - 1) for split, size in sizes.items()},
                "seconds": dict.fromkeys(names, 1.0),
                "rows": {"cut": "pooled", "row_bytes": 5120, "kept": "memory"},
                "examples_per_second": 10.0,
                "saved_model": MODEL,
            }
        ],
        "comparisons": [],
        "artifacts": [],
    }


def manifest(artifacts: list[Artifact], **changes: Any) -> Manifest:
    return Manifest.model_validate(fields() | {"artifacts": artifacts} | changes)


def write_tree(folder: Path, extra: bytes = b"") -> Path:
    """Write the files of a run, each with ``extra`` at its end, but for the schema."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if name == "manifest.schema.json" else content + extra)
    (folder / MODEL / "assets").mkdir()
    return folder


def publish(store: Store, tree: Path, **changes: Any) -> tuple[Outcome, Manifest]:
    """Store the files of ``tree`` and commit a manifest that lists them; return it too."""
    place, artifacts = Pending(store, changes.get("fingerprint", FINGERPRINT)).add_files(tree)
    record = manifest(artifacts, **changes)
    return commit(store, record, [(place, artifacts)]), record
