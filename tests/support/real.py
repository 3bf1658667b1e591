"""The experiments on real photos: settings, and what each must reach. Data and weights lie beside the project."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.running import ROOT, SHARED, environment_of

WEIGHTS = SHARED / "weights" / "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"


@dataclass(frozen=True)
class Real:
    """One experiment: its environment, the file that must be there for it, and the least test accuracies."""

    environment: dict[str, str]
    needs: Path
    floors: dict[str, float] = field(default_factory=dict)

    def missing(self) -> str | None:
        """Return what is absent, None if the experiment can be run."""
        absent = [path for path in (self.needs, WEIGHTS) if not path.exists()]
        return f"not there: {', '.join(str(path) for path in absent)}" if absent else None

    def required(self) -> Real:
        """Return the experiment itself; skip the test if it cannot be run."""
        return self if (absent := self.missing()) is None else pytest.skip(absent)

    def run(self, output: Path, **changes: str) -> dict[str, Any]:
        """Run the real command, its log to standard error, and return the manifest."""
        changed = {f"TRANSFER_{name.upper()}": value for name, value in changes.items()}
        environment = environment_of(self.environment | changed | {"TRANSFER_OUTPUT_URI": str(output)})
        command = [sys.executable, "-m", "job"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
        newest = max(output.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
        return dict(json.loads(newest.read_text(encoding="utf-8")))


def read_env_file(name: str) -> dict[str, str]:
    """Return the settings of ``deploy/env/<name>.env``."""
    lines = (ROOT / "deploy" / "env" / f"{name}.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _shared(dataset: str, version: str, train: str, validation: str, test: str, **floors: float) -> Real:
    environment = {
        "TRANSFER_DATASET": dataset,
        "TRANSFER_DATA_DIR": str(SHARED / "tfds"),
        "TRANSFER_WEIGHTS": str(WEIGHTS),
        "TRANSFER_TRAIN_SPLIT": train,
        "TRANSFER_VALIDATION_SPLIT": validation,
        "TRANSFER_TEST_SPLIT": test,
    }
    return Real(environment, SHARED / "tfds" / dataset / version, floors)


CATS = _shared("cats_vs_dogs", "4.0.1", "train[:50%]", "train[50%:75%]", "train[75%:]", frozen=0.970, fine_tune=0.975)
FLOWERS = _shared("tf_flowers", "3.0.1", "train[:80%]", "train[80%:90%]", "train[90%:]", frozen=0.87, fine_tune=0.92)
XCEPTION_WEIGHTS = WEIGHTS.with_name("xception_weights_tf_dim_ordering_tf_kernels_notop.h5")
# The Xception tutorial's recipe, and the same with the network whose weights are there. scratch would take hours.
_FLOWERS_RECIPE = read_env_file("flowers-xception") | {
    "TRANSFER_DATA_DIR": str(SHARED / "tfds"),
    "TRANSFER_ARMS": "frozen,fine_tune",
}
XCEPTION = Real(
    _FLOWERS_RECIPE | {"TRANSFER_WEIGHTS": str(XCEPTION_WEIGHTS)},
    XCEPTION_WEIGHTS,
    {"fine_tune": 0.93},
)
LIKE_XCEPTION = Real(
    _FLOWERS_RECIPE | {"TRANSFER_BACKBONE": "MobileNetV2", "TRANSFER_WEIGHTS": str(WEIGHTS)},
    SHARED / "tfds" / "tf_flowers" / "3.0.1",
    {"fine_tune": 0.93},
)
# Deitsch et al. 2019, Table 3: SVM and fine-tuned VGG-19, on 656 test cells.
SOLAR = Real(
    read_env_file("solar-paper") | {"TRANSFER_WEIGHTS": str(WEIGHTS)},
    WEIGHTS,
    {"frozen": 0.8244, "fine_tune": 0.8842},
)
