"""The results that the project stands for, on real photos and ImageNet weights; long, and run by ``make test-real``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.kills import variables_of
from tests.support.real import CATS, FLOWERS, LIKE_XCEPTION, SOLAR, XCEPTION, Real

pytestmark = pytest.mark.slow

TRAINABLE = {"scratch": 2_223_872, "frozen": 0, "fine_tune": 1_862_592}


@pytest.fixture(scope="module", params=[CATS, FLOWERS, SOLAR], ids=["cats_vs_dogs", "tf_flowers", "solar_cells"])
def experiment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Real, dict[str, Any]]:
    real: Real = request.param.required()
    return real, real.run(tmp_path_factory.mktemp("output"))


def accuracies(manifest: dict[str, Any]) -> dict[str, float]:
    return {result["arm"]: result["metrics"]["test"]["accuracy"] for result in manifest["results"]}


def test_each_arm_reaches_its_test_accuracy(experiment: tuple[Real, dict[str, Any]]) -> None:
    real, manifest = experiment
    reached = accuracies(manifest)
    short = {arm for arm, floor in real.floors.items() if reached[arm] < floor}
    if real is SOLAR:
        # 0.854 was reached without augmentation (docs/measurements.md, The recipe)
        assert short == {"fine_tune"}, f"the known shortfall has changed: {reached}"
        pytest.xfail(f"fine_tune reaches {reached['fine_tune']:.4f} of {real.floors['fine_tune']}")
    assert not short, reached


def test_fine_tune_does_not_end_below_frozen(experiment: tuple[Real, dict[str, Any]]) -> None:
    reached = accuracies(experiment[1])
    assert reached["fine_tune"] >= reached["frozen"]


def test_the_backbone_trains_as_many_parameters_as_published(experiment: tuple[Real, dict[str, Any]]) -> None:
    _, manifest = experiment
    counted = {result["arm"]: result["parameters"]["backbone_trainable"] for result in manifest["results"]}
    assert counted == {arm: TRAINABLE[arm] for arm in counted}
    assert {"frozen", "fine_tune"} <= set(counted)


def test_scratch_is_published_with_re_estimated_statistics(experiment: tuple[Real, dict[str, Any]]) -> None:
    _, manifest = experiment
    scratch = [result for result in manifest["results"] if result["arm"] == "scratch"]
    for result in scratch:
        assert result["batch_norm"]["test_accuracy_recalibrated"] == result["metrics"]["test"]["accuracy"]
        assert result["batch_norm"]["test_accuracy_raw"] <= result["metrics"]["test"]["accuracy"] + 0.02


@pytest.mark.parametrize("recipe", [XCEPTION, LIKE_XCEPTION], ids=["Xception", "MobileNetV2"])
def test_the_recipe_of_the_xception_tutorial_reaches_its_test_accuracy(recipe: Real, tmp_path: Path) -> None:
    reached = accuracies(recipe.required().run(tmp_path))
    assert reached["fine_tune"] >= recipe.floors["fine_tune"], reached


def test_the_test_split_has_the_published_number_of_cells(tmp_path: Path) -> None:
    from job.data.dataset import open_source
    from job.settings.environment import load

    settings = load(SOLAR.required().environment | {"TRANSFER_DATA_DIR": str(tmp_path)})
    assert open_source(settings.data).splits["test"].examples == 656


@pytest.mark.parametrize("deterministic", ["true", "false"])
def test_rows_that_are_kept_train_as_frozen_layers_run_in_every_step(deterministic: str, tmp_path: Path) -> None:
    changes = {
        "train_split": "train[:4%]",
        "validation_split": "train[50%:52%]",
        "test_split": "train[90%:]",
        "arms": "frozen,fine_tune",
        "epochs": "3",
        "deterministic": deterministic,
    }
    kept = {cache: CATS.required().run(tmp_path / cache, feature_cache=cache, **changes) for cache in ("auto", "off")}
    for result in kept["auto"]["results"]:
        where = [tmp_path / cache / manifest["run_id"] / result["saved_model"] for cache, manifest in kept.items()]
        files = [(folder.parent / "predictions.csv").read_text(encoding="utf-8") for folder in where]
        cached, end_to_end = (variables_of(folder) for folder in where)
        assert len(cached) > 100
        largest = max(float(np.abs(cached[name] - value).max()) for name, value in end_to_end.items())
        logits = [logits_of(text) for text in files]
        difference = np.abs(logits[0] - logits[1]).max() / np.ptp(logits[0])
        told = f"weights differ by {largest:.1e}, logits by {difference:.1e} of their range"
        sys.stderr.write(f"deterministic {deterministic}, {result['arm']}: {told}\n")
        if deterministic == "true":
            assert files[0] == files[1]
            assert largest == 0.0
        assert difference <= 1e-4


def logits_of(predictions: str) -> Any:
    """Return the logits of ``predictions.csv`` up to a constant per example: logarithms of the probabilities."""
    rows = [line.split(",")[2:] for line in predictions.splitlines()[1:]]
    return np.log(np.maximum(np.array(rows, np.float64), 1e-30))
