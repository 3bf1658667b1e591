"""What the proof of an exported model accepts, on SavedModels that give the answers they are told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from job.models.export import TOLERANCES, prove

Floats = npt.NDArray[np.float32]
PIXELS = np.zeros((4, 2, 2, 3), np.uint8)
# Of three classes; the last example is a tie, or nearly.
LOGITS = np.array([[4, 0, -4], [0, 3, -3], [-2, -2, 4], [1, 1 - 1e-7, -2]], np.float64)


def softmax(logits: npt.NDArray[np.float64]) -> Floats:
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)


def model(folder: Path, probabilities: Floats, index: npt.NDArray[np.int64] | None = None) -> Path:
    """Write a SavedModel that answers so, whatever it is asked."""
    index = probabilities.argmax(axis=1) if index is None else index

    @tf.function(input_signature=[tf.TensorSpec([None, 2, 2, 3], tf.uint8, "pixels")], autograph=False)
    def from_pixels(pixels: tf.Tensor) -> dict[str, Any]:
        n = tf.shape(pixels)[0]
        return {"probabilities": tf.constant(probabilities)[:n], "class_index": tf.constant(index)[:n]}

    tf.saved_model.save(tf.Module(), folder, {"from_pixels": from_pixels})
    return folder


def off_by(difference: float) -> Floats:
    """Return the probabilities where one logit, less the mean over the classes, is off by so much."""
    logits = LOGITS.copy()
    logits[1] += difference * np.array([-1, 0.5, 0.5])
    return softmax(logits)


@pytest.mark.parametrize("arithmetic", TOLERANCES)
def test_a_logit_may_be_off_by_the_arithmetics_share_of_their_spread(arithmetic: str, tmp_path: Path) -> None:
    measured = softmax(LOGITS)
    accepted = prove(model(tmp_path / "same", measured), PIXELS, measured, arithmetic)
    assert accepted.largest_logit_difference == 0.0
    assert accepted.logit_spread == pytest.approx(LOGITS.std(), rel=0.05)
    assert accepted.tolerance == TOLERANCES[arithmetic] * accepted.logit_spread
    near = prove(model(tmp_path / "near", off_by(0.9 * accepted.tolerance)), PIXELS, measured, arithmetic)
    assert near.largest_logit_difference == pytest.approx(0.9 * accepted.tolerance, rel=0.02)
    assert near.largest_probability_difference > 0
    assert (near.examples, near.same_class) == (4, 4)
    with pytest.raises(RuntimeError, match="in the logit of class 0 of test example 1,"):
        prove(model(tmp_path / "far", off_by(1.1 * accepted.tolerance)), PIXELS, measured, arithmetic)


@pytest.mark.parametrize(
    ("arithmetic", "advice"),
    [
        ("float32", r"\. Please report it$"),
        ("tf32", "NVIDIA_TF32_OVERRIDE=0"),
        ("mixed_float16", "TRANSFER_PRECISION=float32"),
        ("mixed_bfloat16", "TRANSFER_PRECISION=float32"),
    ],
)
def test_a_failure_says_what_to_do(arithmetic: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=advice):
        prove(model(tmp_path / "model", off_by(3.0)), PIXELS, softmax(LOGITS), arithmetic)


def test_equal_logits_are_refused_in_every_arithmetic(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", softmax(np.zeros_like(LOGITS)))
    for arithmetic in TOLERANCES:
        with pytest.raises(RuntimeError, match="differs from the evaluated model"):
            prove(folder, PIXELS, softmax(LOGITS), arithmetic)


def test_the_class_that_is_served_is_the_measured_one_but_in_a_tie(tmp_path: Path) -> None:
    measured = softmax(LOGITS)
    proof = prove(model(tmp_path / "tie", measured, np.array([0, 1, 2, 1])), PIXELS, measured)
    assert (proof.examples, proof.same_class) == (4, 3)
    with pytest.raises(RuntimeError, match="gives 1 of 4 another class"):
        prove(model(tmp_path / "other", measured, np.array([0, 1, 1, 0])), PIXELS, measured)


def test_a_head_that_is_not_trained_is_proven_too(tmp_path: Path) -> None:
    measured = softmax(np.zeros((4, 3)))
    proof = prove(model(tmp_path / "model", measured), PIXELS, measured)
    assert (proof.logit_spread, proof.largest_logit_difference) == (0.0, 0.0)
    assert proof.tolerance == TOLERANCES["float32"]


def test_probabilities_that_round_to_nothing_are_no_difference(tmp_path: Path) -> None:
    measured = softmax(30 * LOGITS)
    assert measured.min() == 0.0
    assert prove(model(tmp_path / "model", measured), PIXELS, measured).same_class == 4
    slightly = np.maximum(measured, np.float32(1e-38))
    assert prove(model(tmp_path / "slightly", slightly), PIXELS, measured).largest_logit_difference == 0.0


def test_what_is_not_a_number_is_refused(tmp_path: Path) -> None:
    measured = softmax(LOGITS)
    folder = model(tmp_path / "model", np.full_like(measured, np.nan))
    with pytest.raises(RuntimeError, match="differs from the evaluated model"):
        prove(folder, PIXELS, measured)
