"""A trained model as a SavedModel that needs no Keras, and the proof that it predicts what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.arms import Part
from job.data.decoding import decode_image
from job.manifest import ExportProof
from job.models.classifier import Classifier

# Examples on which the reloaded model is compared with the evaluated one, at a batch size that neither used before.
PROOF_EXAMPLES = 24
# What two shapes of a batch may make of a logit, as a share of the logits' spread: kernels are chosen by shape, and
# round in another order. In unit roundoffs of what products are taken of (half the distance from 1 to the next number),
# an H100 in TF32 differed by 14 (MobileNetV2 at 160 px, pooled features, 1 to 32 photos against 64), by 16 where XLA
# compiled, by 61 from the CPU. Emulated in the quickstart (three arms, 27 times 24 photos), sums in another order made
# 27 in TF32, 22 in float16 and in bfloat16; the worst that tests/support/reduced_precision.py can do, 113, 50 and 105.
# Half of the spread is much to accept of bfloat16, but equal logits, which know nothing, are more than a whole one off.
_ROUNDOFFS = 128
# In float32 sums round as coarsely as what they are of: in another order, 168 there, and 37 to 478 with random weights
# of DenseNet121, ResNet50V2 and MobileNetV3Small. Of two classes whose logits spread by 1.3 to 2.1, as there, the
# tolerance is at most 4e-5 to 6e-5 in probability. The CPU and the H100 without TF32 differed by 0.
_ROUNDOFFS_OF_SUMS = 1024
TOLERANCES = {
    "float32": _ROUNDOFFS_OF_SUMS * 2.0**-24,
    "tf32": _ROUNDOFFS * 2.0**-11,
    "mixed_float16": _ROUNDOFFS * 2.0**-11,
    "mixed_bfloat16": _ROUNDOFFS * 2.0**-8,
}
# What rounds is the network, however little the logits differ: with a smaller spread they are held to that of this one.
# MobileNet's, hardly trained from scratch, spread by 0.12 and were 0.018 off in float16, 0.005 in probability. Where
# they spread by less than 0.5, bfloat16's proof says little.
_LEAST_SPREAD = 1.0
# What to train with where the tolerance is exceeded, to tell rounding from a fault.
_EXACT = {
    "tf32": "NVIDIA_TF32_OVERRIDE=0",
    "mixed_float16": "TRANSFER_PRECISION=float32",
    "mixed_bfloat16": "TRANSFER_PRECISION=float32",
}
# Below, a probability says no more than that it is small.
_LEAST_PROBABILITY = 1e-30
_VARIABLES = Path("variables", "variables")
_GRAPH = "saved_model.pb"
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


class Exporter:
    """Writes SavedModels of one run, whose results differ in their variables' values alone.

    TensorFlow takes seconds to write one: each of 260 variables becomes a dozen operations that save and restore it.
    So the first result's graph is used for all, and for the others only the variables are written.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        """Take the names of the classes, in the order of the logits."""
        self._classes = list(classes)
        self._graph = b""
        self._object_graph = b""

    def export(self, classifier: Classifier, folder: Path) -> None:
        """Write the SavedModel to ``folder``, with the signatures ``serving_default`` and ``from_pixels``.

        ``serving_default``: image_bytes string [batch], encoded JPEG, PNG, GIF or BMP of any size. ``from_pixels``:
        pixels uint8 [batch, size, size, 3]. Both return probabilities float32 [batch, classes], class_index int64
        [batch] and class_name string [batch]. Every classifier given has the structure of the first.
        """
        if not self._graph:
            self._write_whole(classifier, folder)
            self._graph = (folder / _GRAPH).read_bytes()
            reader = tf.train.load_checkpoint(str(folder / _VARIABLES))
            self._object_graph = reader.get_tensor(_OBJECT_GRAPH)
            return
        (folder / _VARIABLES).parent.mkdir(parents=True)
        # its companion fingerprint.pb is left out: it would hold a hash of the first result's variables
        (folder / _GRAPH).write_bytes(self._graph)
        variables = _variables(classifier)
        keys = [f"saved/{i}/.ATTRIBUTES/VARIABLE_VALUE" for i in range(len(variables))]
        tf.raw_ops.SaveV2(
            prefix=str(folder / _VARIABLES),
            tensor_names=[*keys, _OBJECT_GRAPH],
            shape_and_slices=[""] * (len(keys) + 1),
            tensors=[*variables, tf.constant(self._object_graph)],
        )

    def _write_whole(self, classifier: Classifier, folder: Path) -> None:
        size = classifier.image_size
        names = tf.constant(self._classes)
        logits_of = classifier.inference(classifier.cut(Part.ALL))

        @tf.function(input_signature=[tf.TensorSpec([None, size, size, 3], tf.uint8, "pixels")], autograph=False)  # type: ignore[untyped-decorator]
        def from_pixels(pixels: Any) -> dict[str, Any]:
            probabilities = tf.nn.softmax(logits_of(pixels), name="probabilities")
            index = tf.argmax(probabilities, axis=1, output_type=tf.int64)
            return {"probabilities": probabilities, "class_index": index, "class_name": tf.gather(names, index)}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "image_bytes")], autograph=False)  # type: ignore[untyped-decorator]
        def from_bytes(image_bytes: Any) -> dict[str, Any]:
            pixels = tf.map_fn(
                lambda encoded: decode_image(encoded, size),
                image_bytes,
                fn_output_signature=tf.TensorSpec([size, size, 3], tf.uint8),
            )
            served: dict[str, Any] = from_pixels(pixels)
            return served

        module = tf.Module()
        module.saved = _variables(classifier)
        tf.saved_model.save(module, folder, {"serving_default": from_bytes, "from_pixels": from_pixels})


def _variables(classifier: Classifier) -> list[tf.Variable]:
    return [variable.value for variable in (*classifier.backbone.variables, *classifier.head.variables)]


def prove(
    folder: Path, pixels: npt.NDArray[np.uint8], probabilities: npt.NDArray[np.float32], arithmetic: str = "float32"
) -> ExportProof:
    """Reload the SavedModel and return by how much it differs from what was measured.

    Logits are compared, as the logarithms of probabilities: centred, they are the same. Where the two most probable
    classes lie further apart than what is accepted of both, the class that is served must be the measured one.

    Args:
        folder: of the SavedModel.
        pixels: uint8 [n, size, size, 3], some test examples.
        probabilities: float32 [n, classes], measured on them.
        arithmetic: what products were taken in, a key of ``TOLERANCES``.

    Raises:
        RuntimeError: it differs by more than is accepted: a model that does not predict what was measured is never
            published.
    """
    answer = tf.saved_model.load(folder).signatures["from_pixels"](pixels=tf.constant(pixels))
    served = answer["probabilities"].numpy()
    measured = centred_logits(probabilities)
    differences = np.abs(centred_logits(served) - measured)
    spread = float(measured.std())
    tolerance = TOLERANCES[arithmetic] * max(spread, _LEAST_SPREAD)
    difference = float(differences.max())
    ordered = np.sort(measured, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 2 * tolerance
    same = answer["class_index"].numpy() == measured.argmax(axis=1)
    if not difference <= tolerance or not same[clear].all():
        example, index = np.unravel_index(differences.argmax(), differences.shape)
        exact = _EXACT.get(arithmetic)
        advice = f"Train with {exact}; if that does not help, please report it" if exact else "Please report it"
        raise RuntimeError(
            f"the SavedModel in {folder} differs from the evaluated model by {difference:.3g} in the logit of class "
            f"{index} of test example {example}, and gives {np.count_nonzero(~same)} of {len(pixels)} another class; "
            f"accepted in {arithmetic}: {tolerance:.3g}, {TOLERANCES[arithmetic]:.2g} of the logits' spread. {advice}"
        )
    return ExportProof(
        examples=len(pixels),
        logit_spread=spread,
        largest_logit_difference=difference,
        tolerance=tolerance,
        largest_probability_difference=float(np.abs(served - probabilities).max()),
        same_class=int(np.count_nonzero(same)),
    )


def centred_logits(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the logits [n, classes] of ``probabilities``, with the mean of each example's at zero."""
    logits = np.log(np.maximum(probabilities.astype(np.float64), _LEAST_PROBABILITY))
    return np.asarray(logits - logits.mean(axis=1, keepdims=True))
