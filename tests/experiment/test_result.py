"""One result at a time, inside this process: what must not change, and what must not matter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from job.data import reading
from job.experiment.plan import Plan, make_plan
from job.experiment.result import Experiment
from job.machine import console
from job.machine.runtime import Runtime
from job.models import export
from job.models.inference import run_over
from job.models.recalibration import statistics
from job.settings.environment import load

RUNTIME = Runtime(("CPU",), "float32", xla=False, deterministic=True)


def experiment(small: dict[str, str], folder: Path, **changes: str) -> tuple[Plan, Experiment]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFER_")}
    changed = {f"TRANSFER_{name.upper()}": value for name, value in changes.items()}
    settings = load(environment | small | {"TRANSFER_OUTPUT_URI": str(folder / "output")} | changed)
    (folder / "scratch").mkdir()
    plan = make_plan(settings, RUNTIME, folder / "scratch")
    pixels = reading.read_splits(plan.source, plan.settings.model.image_size, folder / "scratch", 0.05)
    return plan, Experiment(plan, pixels, 0.0, folder / "scratch", console.Console(None))


def norms(plan: Plan) -> Any:
    from keras.layers import BatchNormalization

    return [layer for layer in plan.network.backbone.layers if isinstance(layer, BatchNormalization)]


@pytest.fixture(scope="module", autouse=True)
def _deterministic() -> None:
    tf.config.experimental.enable_op_determinism()


def test_fine_tune_trains_the_tail_and_leaves_batch_norm_statistics_bit_identical(
    small: dict[str, str], tmp_path: Path
) -> None:
    plan, run = experiment(small, tmp_path)
    before, weights = statistics(norms(plan)), [np.array(w.numpy()) for w in plan.network.backbone.weights]
    run.result("fine_tune", 1.0, 0)
    for (mean, variance), (mean_after, variance_after) in zip(before, statistics(norms(plan)), strict=True):
        np.testing.assert_array_equal(mean, mean_after)
        np.testing.assert_array_equal(variance, variance_after)
    changed = {
        w.path.split("/")[0]
        for w, b in zip(plan.network.backbone.weights, weights, strict=True)
        if (w.numpy() != b).any()
    }
    assert {"conv_pw_12", "conv_pw_12_bn", "conv_dw_13", "conv_pw_13_bn"} <= changed
    assert not [name for name in changed if not name.startswith(("conv_pw_12", "conv_dw_13", "conv_pw_13"))]


@pytest.mark.slow
def test_a_deeper_head_dropout_truncation_and_a_fraction_train_and_export(
    small: dict[str, str], tmp_path: Path
) -> None:
    changes = {"head_units": "16,8", "dropout": "0.3", "truncate_at": "conv_pw_12_relu", "train_fractions": "0.5"}
    plan, run = experiment(small, tmp_path, arms="fine_tune", optimizer="sgd", **changes)
    assert plan.network.backbone.layers[-1].name == "conv_pw_12_relu"
    outcome = run.result("fine_tune", 0.5, 0)
    assert 0.4 * 71 < outcome.record.train_examples < 0.6 * 71
    assert outcome.record.saved_model == "arms/fine_tune/fraction-0.5/seed-0/saved_model"
    head = 1024 * 16 + 16 + 16 * 8 + 8 + 8 * 3 + 3
    assert outcome.record.parameters.trainable - outcome.record.parameters.backbone_trainable == head


@pytest.mark.slow
def test_fine_tuning_everything_trains_the_whole_backbone(small: dict[str, str], tmp_path: Path) -> None:
    plan, run = experiment(small, tmp_path, arms="fine_tune", fine_tune_from="all", head_epochs="0", epochs="1")
    outcome = run.result("fine_tune", 1.0, 0)
    whole = sum(int(np.prod(w.shape)) for w in plan.network.backbone.trainable_weights)
    assert outcome.record.parameters.backbone_trainable == whole
    assert [epoch.phase for epoch in outcome.record.history] == ["tail"]


def test_a_saved_model_that_predicts_otherwise_is_never_published(small: dict[str, str], tmp_path: Path) -> None:
    _, run = experiment(small, tmp_path, arms="frozen", epochs="1")
    outcome = run.result("frozen", 1.0, 0)
    pixels = run._pixels["test"].values[:]
    folder = outcome.folder / outcome.record.saved_model
    proof = export.prove(folder, pixels, outcome.test.probabilities)
    assert proof.largest_logit_difference <= proof.tolerance == pytest.approx(2**-14 * max(proof.logit_spread, 1))
    assert proof.same_class == proof.examples == len(pixels)
    with pytest.raises(RuntimeError, match="differs from the evaluated model"):
        export.prove(folder, 255 - pixels, outcome.test.probabilities)


@pytest.mark.slow
def test_only_scratch_needs_no_weights(small: dict[str, str], tmp_path: Path) -> None:
    plan, run = experiment(small, tmp_path, arms="scratch", epochs="1", weights=str(tmp_path / "absent.h5"))
    assert plan.network.weights is None
    outcome = run.result("scratch", 1.0, 0)
    assert outcome.record.batch_norm is not None
    # the published model is the re-estimated one
    reloaded = tf.saved_model.load(outcome.folder / outcome.record.saved_model)
    serve = reloaded.signatures["from_pixels"]
    served = run_over(lambda batch: serve(pixels=batch)["probabilities"], run._pixels["test"].values)
    np.testing.assert_allclose(served, outcome.test.probabilities, atol=1e-6)
    accuracy = outcome.record.metrics.test.accuracy
    assert accuracy == outcome.record.batch_norm.test_accuracy_recalibrated
    assert (served.argmax(axis=1) == run._pixels["test"].labels).mean() == accuracy
