"""The model that every arm trains: preprocessing, backbone and head, and where it can be cut in two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.arms import Part

PIXELS = "pixels"
POOLED = "pooled"
LARGEST_ROW = 8


class Head(keras.layers.Layer):
    """Standardisation, hidden Dense layers, dropout and the classifier, on pooled features [batch, features].

    classes: outputs, one per class; a binary task has two, so that every task has the same loss and serving form.
    hidden: units of the ReLU layers before the classifier. dropout: share of features zeroed before the classifier.

    The standardisation is a fixed shift and scale per feature (identity until ``standardise`` is called). Dropout is
    stateless: its mask is a function of the seed given, since the state of a Keras Dropout layer is in no checkpoint,
    and a run resumed from one silently differed.
    """

    def __init__(self, classes: int, hidden: Sequence[int] = (), dropout: float = 0.0) -> None:
        super().__init__(name="head", dtype="float32")
        self._hidden = [keras.layers.Dense(units, "relu", name=f"hidden_{i}") for i, units in enumerate(hidden, 1)]
        # from zero, the first steps follow the features alone
        self._classifier = keras.layers.Dense(classes, name="classifier", kernel_initializer="zeros", dtype="float32")
        self._dropout = dropout

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Create the variables for pooled features of ``input_shape`` [batch, features]."""
        features = input_shape[-1]
        self._shift = self.add_weight(shape=(features,), initializer="zeros", trainable=False, name="shift")
        self._scale = self.add_weight(shape=(features,), initializer="ones", trainable=False, name="scale")
        shape = tuple(input_shape)
        for layer in (*self._hidden, self._classifier):
            layer.build(shape)
            shape = layer.compute_output_shape(shape)

    def standardise(self, mean: npt.NDArray[np.floating], deviation: npt.NDArray[np.floating]) -> None:
        """Centre and scale the features by these statistics [features] from now on."""
        self._shift.assign(-mean)
        self._scale.assign(1.0 / deviation)

    def call(self, pooled: tf.Tensor, dropout_seed: tf.Tensor | None = None) -> tf.Tensor:
        """Return logits float32 [batch, classes]; dropout is applied where a seed (int32 [2]) is given."""
        x = (tf.cast(pooled, tf.float32) + self._shift) * self._scale
        for layer in self._hidden:
            x = layer(x)
        x = tf.cast(x, tf.float32)
        if dropout_seed is not None and self._dropout > 0:
            keep = 1.0 - self._dropout
            mask = tf.random.stateless_uniform(tf.shape(x), dropout_seed) < keep
            x = tf.where(mask, x / keep, 0.0)
        return self._classifier(x)


@dataclass(frozen=True)
class Cut:
    """A tensor where the model comes apart: the trunk before it never trains, the tail after it may.

    name: ``pixels`` (nothing is frozen), ``pooled`` (the whole backbone is) or the operation it follows.
    trunk: uint8 pixels [batch, size, size, 3] -> rows [batch, *shape]; None where rows are the pixels themselves.
    tail: (rows, batch_norm_trains) -> pooled features [batch, features].
    """

    name: str
    shape: tuple[int, ...]
    trunk: Callable[[tf.Tensor], tf.Tensor] | None
    tail: Callable[[tf.Tensor, bool], tf.Tensor]


class Classifier:
    """Preprocessing, backbone and head as one model, from uint8 pixels to logits."""

    def __init__(
        self,
        backbone: keras.Model,
        preprocess: Callable[[tf.Tensor], tf.Tensor],
        head: Head,
        first_trainable: int,
    ) -> None:
        """Compose the parts; ``first_trainable`` is the index in ``backbone.layers`` where fine_tune's tail starts."""
        self.backbone = backbone
        self.head = head
        self.image_size: int = backbone.input_shape[1]
        self.features: int = backbone.output_shape[-1]
        self._preprocess = preprocess
        self._inference: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {}
        self._first_trainable = first_trainable
        if not head.built:
            head.build((None, self.features))

    def inference(self, cut: Cut) -> Callable[[tf.Tensor], tf.Tensor]:
        """Return the compiled function from rows at ``cut`` to logits float32 [batch, classes], in inference mode.

        It is traced once per cut, whoever calls it, the exported model included: for a network of 154 layers a trace
        takes seconds.
        """
        if cut.name not in self._inference:
            signature = [tf.TensorSpec([None, *cut.shape], tf.uint8 if cut.name == PIXELS else tf.float32)]
            self._inference[cut.name] = tf.function(
                lambda rows: self.head(cut.tail(rows, False)), input_signature=signature, autograph=False
            )
        return self._inference[cut.name]

    def backbone_variables(self, part: Part) -> list[keras.Variable]:
        """Return the backbone's variables that train with ``part``."""
        if part is Part.HEAD:
            return []
        first = 0 if part is Part.ALL else self._first_trainable
        # by layer, not by model.trainable_variables: what trains is a matter of the phase, not a flag on the model
        return [variable for layer in self.backbone.layers[first:] for variable in layer.trainable_variables]

    def trainable_variables(self, part: Part) -> list[keras.Variable]:
        """Return all variables that train with ``part``, backbone first."""
        return [*self.backbone_variables(part), *self.head.trainable_variables]

    def batch_norms(self) -> list[keras.layers.BatchNormalization]:
        """Return the backbone's BatchNorm layers in order of computation."""
        found = [layer for layer in _flatten(self.backbone) if isinstance(layer, keras.layers.BatchNormalization)]
        return list(found)

    def cut(self, part: Part, *, at_pixels: bool = False) -> Cut:
        """Return the latest cut before everything that trains with ``part``, or the one at the pixels."""
        if part is Part.HEAD and not at_pixels:
            return Cut(
                POOLED,
                (self.features,),
                lambda pixels: self._pool_pixels(pixels, batch_norm_trains=False),
                lambda rows, _: rows,
            )
        operation = None if at_pixels or part is Part.ALL else latest_cut(self.backbone, self._first_trainable)
        if operation is None:
            return Cut(PIXELS, (self.image_size, self.image_size, 3), None, self._pool_pixels)
        trunk = keras.Model(self.backbone.input, operation.output)
        tail = keras.Model(operation.output, self.backbone.output)
        return Cut(
            operation.name,
            tuple(operation.output.shape[1:]),
            lambda pixels: trunk(self._prepare(pixels), training=False),
            lambda rows, batch_norm_trains: self._pool(tail(rows, training=batch_norm_trains)),
        )

    def _prepare(self, pixels: tf.Tensor) -> tf.Tensor:
        return self._preprocess(tf.cast(pixels, tf.float32))

    def _pool(self, feature_map: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(feature_map, axis=(1, 2))

    def _pool_pixels(self, pixels: tf.Tensor, batch_norm_trains: bool) -> tf.Tensor:
        return self._pool(self.backbone(self._prepare(pixels), training=batch_norm_trains))


def latest_cut(backbone: keras.Model, first_trainable: int) -> Any:
    """Return the last operation before ``backbone.layers[first_trainable]`` whose output alone is needed later.

    ``backbone.operations`` is in order of computation, and unlike ``layers`` it holds bare additions too (ConvNeXt's
    residuals). A tensor is a cut when no other one made before it is still needed after it. None where no cut
    leaves rows of at most ``LARGEST_ROW`` times the pixels' bytes: NASNetMobile's only one, after its stem, has ten
    times as many, and reading them back would cost more than the stem.
    """
    operations = backbone.operations
    end = operations.index(backbone.layers[first_trainable])
    last_use = {id(tensor): index for index, op in enumerate(operations) for tensor in _inputs(op)}
    last_use |= {id(tensor): len(operations) for tensor in backbone.outputs}
    pixels = math.prod(backbone.input_shape[1:])
    live: set[int] = set()
    found = None
    for index, op in enumerate(operations[:end]):
        outputs = _as_list(op.output)
        live = {tensor for tensor in live | {id(tensor) for tensor in outputs} if last_use.get(tensor, -1) > index}
        small = math.prod(outputs[0].shape[1:]) * 4 <= LARGEST_ROW * pixels
        if index > 0 and live == {id(outputs[0])} and small:
            found = op
    return found


def _inputs(operation: Any) -> list[Any]:
    return [] if isinstance(operation, keras.layers.InputLayer) else _as_list(operation.input)


def _as_list(tensors: Any) -> list[Any]:
    return list(tensors) if isinstance(tensors, list | tuple) else [tensors]


def _flatten(model: keras.Model) -> list[keras.layers.Layer]:
    flat: list[keras.layers.Layer] = []
    for layer in model.layers:
        flat.extend(_flatten(layer) if isinstance(layer, keras.Model) else [layer])
    return flat
