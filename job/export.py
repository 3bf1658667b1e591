"""A trained model as a SavedModel that needs no Keras, and the proof that it predicts what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.arms import Part
from job.evaluation import Predictions
from job.model import Classifier
from job.rows import decode_image

# Examples on which the reloaded model is compared with the evaluated one, at a batch size that neither used before.
PROOF_EXAMPLES = 24
TOLERANCE = 1e-4


def export(classifier: Classifier, classes: Sequence[str], folder: Path) -> None:
    """Write the SavedModel to ``folder``, with the signatures ``serving_default`` and ``from_pixels``.

    ``serving_default``: image_bytes string [batch], encoded JPEG, PNG, GIF or BMP of any size. ``from_pixels``:
    pixels uint8 [batch, size, size, 3]. Both return probabilities float32 [batch, classes], class_index int64
    [batch] and class_name string [batch].
    """
    size = classifier.image_size
    names = tf.constant(list(classes))
    logits_of = classifier.inference(classifier.cut(Part.ALL))

    @tf.function(input_signature=[tf.TensorSpec([None, size, size, 3], tf.uint8, "pixels")], autograph=False)  # type: ignore[untyped-decorator]
    def from_pixels(pixels: Any) -> dict[str, Any]:
        probabilities = tf.nn.softmax(logits_of(pixels), name="probabilities")
        index = tf.argmax(probabilities, axis=1, output_type=tf.int64)
        return {"probabilities": probabilities, "class_index": index, "class_name": tf.gather(names, index)}

    def from_bytes(image_bytes: Any) -> dict[str, Any]:
        pixels = tf.map_fn(
            lambda encoded: decode_image(encoded, size),
            image_bytes,
            fn_output_signature=tf.TensorSpec([size, size, 3], tf.uint8),
        )
        served: dict[str, Any] = from_pixels(pixels)
        return served

    archive = keras.export.ExportArchive()
    archive.track(classifier.backbone)
    archive.track(classifier.head)
    archive.add_endpoint("serving_default", from_bytes, [tf.TensorSpec([None], tf.string, "image_bytes")])
    archive.add_endpoint("from_pixels", from_pixels)
    archive.write_out(folder, verbose=False)


def prove(folder: Path, pixels: npt.NDArray[np.uint8], predictions: Predictions) -> float:
    """Reload the SavedModel and return its largest difference in probability from ``predictions``.

    pixels: uint8 [n, size, size, 3], those that ``predictions`` are of; some of them are tried.

    Raises RuntimeError where it exceeds ``TOLERANCE``: a model that does not predict what was measured is never
    published.
    """
    pixels = np.asarray(pixels[:PROOF_EXAMPLES])
    reloaded = tf.saved_model.load(folder)
    served = reloaded.signatures["from_pixels"](pixels=tf.constant(pixels))["probabilities"]
    difference = float(np.abs(served.numpy() - predictions.probabilities[: len(pixels)]).max())
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"the SavedModel in {folder} differs from the evaluated model by {difference:.3g} in probability on "
            f"{len(pixels)} test examples; at most {TOLERANCE} is accepted"
        )
    return difference
