"""BatchNorm statistics: kept, compared and re-estimated."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.model import Classifier, Cut
from job.rows import Rows

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

        def forward(rows: tf.Tensor) -> None:
            cut.tail(rows, True)

        self._forward = tf.function(forward, autograph=False)

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
                self._forward(tf.constant(rows.values[batch]))
                count += len(batch)
                moments = [
                    (len(batch) * mean.astype(np.float64), len(batch) * (variance + mean.astype(np.float64) ** 2))
                    for mean, variance in statistics(self.layers)
                ]
                sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums, moments, strict=True)] if sums else moments
        finally:
            for layer, momentum in zip(self.layers, momenta, strict=True):
                layer.momentum = momentum
        pooled = [(first / count, second / count - (first / count) ** 2) for first, second in sums]
        assign(self.layers, [(m.astype(np.float32), np.maximum(v, 0).astype(np.float32)) for m, v in pooled])
