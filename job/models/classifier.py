"""The model that every arm trains: preprocessing, backbone and head, and where it can be cut in two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.arms import Part
from job.machine.replicas import Replicas
from job.models.cuts import PIXELS, POOLED
from job.models.fused_batch_norm import flatten
from job.models.randomness import DROPOUT, Chance


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

    def call(self, pooled: tf.Tensor, chance: Chance | None = None) -> tf.Tensor:
        """Return logits float32 [batch, classes]; features are dropped where there is chance, in training."""
        x = (tf.cast(pooled, tf.float32) + self._shift) * self._scale
        for layer in self._hidden:
            x = layer(x)
        x = tf.cast(x, tf.float32)
        if chance is not None and self._dropout > 0:
            keep = 1.0 - self._dropout
            x = tf.where(chance.uniform(DROPOUT, x, x.shape[-1]) < keep, x / keep, 0.0)
        return self._classifier(x)


@dataclass(frozen=True)
class Cut:
    """A tensor where the model comes apart: the trunk before it never trains, the tail after it may.

    name: ``pixels`` (nothing is frozen), ``pooled`` (the whole backbone is) or the operation it follows.
    shape, dtype: of one row. trunk: uint8 pixels [batch, size, size, 3] -> rows [batch, *shape].
    tail: (rows, batch_norm_trains) -> pooled features [batch, features].
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    trunk: Callable[[tf.Tensor], tf.Tensor]
    tail: Callable[[tf.Tensor, bool], tf.Tensor]

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row."""
        return self.dtype.itemsize * int(np.prod(self.shape))

    @property
    def at_pixels(self) -> bool:
        """Return whether rows are the pixels themselves."""
        return self.name == PIXELS


class Classifier:
    """Preprocessing, backbone and head as one model, from uint8 pixels to logits."""

    def __init__(
        self,
        backbone: keras.Model,
        preprocess: Callable[[tf.Tensor], tf.Tensor],
        head: Head,
        first_trainable: int,
        tail_cut: Any = None,
        replicas: Replicas | None = None,
    ) -> None:
        """Compose the parts, within the scope of ``replicas`` where there are several.

        first_trainable: index in ``backbone.layers`` where fine_tune's tail starts. tail_cut: the operation of
        ``backbone`` before it after which the trunk ends (see ``cuts``); None where rows are the pixels.
        """
        self.backbone = backbone
        self.head = head
        self.replicas = replicas or Replicas()
        self.image_size: int = backbone.input_shape[1]
        self.features: int = backbone.output_shape[-1]
        self._preprocess = preprocess
        self._inference: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {}
        self._first_trainable = first_trainable
        self._tail_cut = tail_cut
        self._cuts: dict[Part, Cut] = {}
        if not head.built:
            head.build((None, self.features))

    def inference(self, cut: Cut) -> Callable[[tf.Tensor], tf.Tensor]:
        """Return the compiled function from rows at ``cut`` to logits float32 [batch, classes], in inference mode.

        It is traced once per cut, whoever calls it, the exported model included: for a network of 154 layers a trace
        takes seconds.
        """
        if cut.name not in self._inference:
            signature = [tf.TensorSpec([None, *cut.shape], cut.dtype)]
            self._inference[cut.name] = tf.function(
                lambda rows: self.head(cut.tail(rows, False)), input_signature=signature, autograph=False
            )
        return self._inference[cut.name]

    @property
    def variables(self) -> list[keras.Variable]:
        """Return all variables, the state of random generators in the backbone included, which are no weights."""
        return [*self.backbone.variables, *self.head.variables]

    def set_weights(self, other: Classifier) -> None:
        """Take the values of every variable of ``other``, which has the same structure."""
        for mine, value in zip(self.variables, [np.array(each) for each in other.variables], strict=True):
            mine.assign(value)

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
        found = [layer for layer in flatten(self.backbone) if isinstance(layer, keras.layers.BatchNormalization)]
        return list(found)

    def cut(self, part: Part) -> Cut:
        """Return the cut before everything that trains with ``part``."""
        if part not in self._cuts:
            self._cuts[part] = self._make_cut(part)
        return self._cuts[part]

    def from_pixels(self, part: Part) -> Cut:
        """Return what ``cut(part)`` computes in one piece, from pixels on: frozen layers run in its tail.

        It takes pixels of another dtype too.
        """
        at = self.cut(part)
        if at.at_pixels:
            return at
        shape = (self.image_size, self.image_size, 3)

        def whole(pixels: tf.Tensor, batch_norm_trains: bool) -> tf.Tensor:
            return at.tail(at.trunk(pixels), batch_norm_trains)

        return Cut(PIXELS, shape, np.dtype(np.uint8), lambda pixels: pixels, whole)

    def _make_cut(self, part: Part) -> Cut:
        if part is Part.HEAD:
            return Cut(
                POOLED,
                (self.features,),
                np.dtype(np.float32),
                lambda pixels: tf.cast(self._pool_pixels(pixels, batch_norm_trains=False), tf.float32),
                lambda rows, _: rows,
            )
        operation = self._tail_cut if part is Part.TAIL else None
        if operation is None:
            shape = (self.image_size, self.image_size, 3)
            return Cut(PIXELS, shape, np.dtype(np.uint8), lambda pixels: pixels, self._pool_pixels)
        trunk = keras.Model(self.backbone.input, operation.output)
        tail = keras.Model(operation.output, self.backbone.output)
        dtype = row_dtype()
        return Cut(
            operation.name,
            tuple(operation.output.shape[1:]),
            dtype,
            lambda pixels: tf.cast(trunk(self._prepare(pixels), training=False), dtype),
            lambda rows, batch_norm_trains: self._pool(tail(rows, training=batch_norm_trains)),
        )

    def _prepare(self, pixels: tf.Tensor) -> tf.Tensor:
        return self._preprocess(tf.cast(pixels, tf.float32))

    def _pool(self, feature_map: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(feature_map, axis=(1, 2))

    def _pool_pixels(self, pixels: tf.Tensor, batch_norm_trains: bool) -> tf.Tensor:
        return self._pool(self.backbone(self._prepare(pixels), training=batch_norm_trains))


def row_dtype() -> np.dtype[Any]:
    """Return the dtype of rows at a cut inside the backbone: the compute dtype, if a file of NumPy's can hold it."""
    half = keras.config.dtype_policy().compute_dtype == "float16"
    return np.dtype(np.float16 if half else np.float32)
