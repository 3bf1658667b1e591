"""BatchNorm statistics: kept, compared and re-estimated."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.data.rows import Rows
from job.machine.replicas import Tensors
from job.models.classifier import Classifier, Cut
from job.models.fused_batch_norm import synchronised

Statistics = list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]


def statistics(layers: Sequence[keras.layers.BatchNormalization]) -> Statistics:
    """Return each layer's moving mean and variance [channels]."""
    to_numpy = keras.ops.convert_to_numpy
    return [(to_numpy(layer.moving_mean).copy(), to_numpy(layer.moving_variance).copy()) for layer in layers]


def assign(layers: Sequence[keras.layers.BatchNormalization], values: Statistics) -> None:
    """Set each layer's moving mean and variance."""
    for layer, (mean, variance) in zip(layers, values, strict=True):
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(variance)


class Recalibrator:
    """Replaces moving averages by the statistics of given rows.

    keras.applications' MobileNetV2 has momentum 0.999: after ten short epochs its moving averages still hold the
    initial values, and a network that learned predicts at chance. With momentum 0 a forward pass leaves the batch's
    own mean and variance in the moving variables; pooled over batches they are the statistics of all rows.
    """

    def __init__(self, classifier: Classifier, cut: Cut) -> None:
        self.layers = classifier.batch_norms()
        self._replicas = classifier.replicas
        shape = tf.TensorSpec([None, *cut.shape], cut.dtype)

        def forward(*parts: tf.Tensor) -> Tensors:
            def one(replica: int) -> tuple[Tensors, Tensors]:
                if self._replicas.count == 1:
                    cut.tail(parts[replica], True)
                    return [], [moving.value for layer in self.layers for moving in _moving(layer)]
                rows, weight = _filled_up(parts[replica])
                with synchronised(weight) as over_all:
                    cut.tail(rows, True)
                return [tf.reduce_sum(weight)], [moment for _, *moments in over_all.moments for moment in moments]

            _, moments = self._replicas.total(one)[0]
            return moments

        self._forward = tf.function(forward, input_signature=[shape] * self._replicas.local, autograph=False)

    def recalibrate(self, rows: Rows, index: npt.NDArray[np.int64], batch_size: int) -> None:
        """Leave the statistics of the rows at ``index`` (int64 [n]) in the moving variables.

        batch_size: as in training, since a layer's statistics are taken of inputs that earlier layers normalised by
        the batch's own.
        """
        momenta = [layer.momentum for layer in self.layers]
        for layer in self.layers:
            layer.momentum = 0.0
        count = 0
        sums: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = []
        try:
            for start in range(0, len(index), batch_size):
                batch = index[start : start + batch_size]
                count += len(batch)
                parts = np.array_split(rows.positions(batch), self._replicas.local)
                found = [np.asarray(each, np.float64) for each in self._forward(*(rows.values[part] for part in parts))]
                moments = [
                    (len(batch) * mean, len(batch) * (variance + mean**2))
                    for mean, variance in zip(found[::2], found[1::2], strict=True)
                ]
                sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums, moments, strict=True)] if sums else moments
        finally:
            for layer, momentum in zip(self.layers, momenta, strict=True):
                layer.momentum = momentum
        pooled = [(first / count, second / count - (first / count) ** 2) for first, second in sums]
        assign(self.layers, [(m.astype(np.float32), np.maximum(v, 0).astype(np.float32)) for m, v in pooled])


def _filled_up(rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return ``rows`` [n, ...] with a row of zeros where there is none, and each row's weight: 0.0 for that one.

    Operations differ in what they make of an empty batch; of one that counts for nothing they all make the same.
    """
    number = tf.shape(rows)[0]
    filling = tf.zeros(tf.concat([[tf.maximum(1 - number, 0)], tf.shape(rows)[1:]], axis=0), rows.dtype)
    filled = tf.concat([rows, filling], axis=0)
    return filled, tf.cast(tf.range(tf.shape(filled)[0]) < number, tf.float32)


def _moving(layer: keras.layers.BatchNormalization) -> tuple[keras.Variable, keras.Variable]:
    return layer.moving_mean, layer.moving_variance
