"""Exact metrics of a trained model: every example of a split counted once, in inference mode."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.data.rows import Rows
from job.manifest import SplitMetrics, Wrong
from job.models.classifier import Classifier, Cut
from job.models.inference import logits_of
from job.results.statistics import cross_entropy, split_metrics


@dataclass(frozen=True)
class Predictions:
    """What a model says of some examples. ids and labels: int32 [n]; logits, probabilities: float32 [n, classes]."""

    ids: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    logits: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether the most probable class is the label, bool [n]."""
        return np.asarray(self.probabilities.argmax(axis=1) == self.labels)

    def metrics(self, classes: Sequence[str]) -> SplitMetrics:
        """Return the published metrics."""
        return split_metrics(self.labels, self.logits, self.probabilities, classes)

    def most_wrong(self, classes: Sequence[str], number: int) -> tuple[Wrong, ...]:
        """Return the wrong examples with the highest losses, at most ``number`` of them, the highest first."""
        losses = np.where(self.correct, -np.inf, cross_entropy(self.logits, self.labels))
        predicted = self.probabilities.argmax(axis=1)
        chosen = [i for i in np.argsort(-losses, kind="stable")[:number] if not self.correct[i]]
        return tuple(
            Wrong(
                example_id=self.ids[i],
                label=classes[self.labels[i]],
                predicted=classes[predicted[i]],
                label_probability=float(self.probabilities[i, self.labels[i]]),
                predicted_probability=float(self.probabilities[i, predicted[i]]),
            )
            for i in chosen
        )

    def to_csv(self, classes: Sequence[str]) -> str:
        """Return ``predictions.csv``: example id, label (class index), probability of each class.

        Probabilities are written with the fewest digits that give back the same float32.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["example_id", "label", *(f"probability_{name}" for name in classes)])
        for example_id, label, row in zip(self.ids, self.labels, self.probabilities, strict=True):
            writer.writerow([example_id, int(label), *(str(probability) for probability in row)])
        return text.getvalue()


def predict(classifier: Classifier, cut: Cut, rows: Rows, index: npt.NDArray[np.int64] | None = None) -> Predictions:
    """Return what ``classifier`` says of ``rows`` at ``cut``, or of those at ``index``. All workers call it."""
    chosen = np.arange(len(rows)) if index is None else index
    logits = logits_of(classifier, cut, rows, chosen)
    ids = tuple(rows.ids[i] for i in chosen)
    return Predictions(ids, rows.labels[chosen], logits, np.asarray(tf.nn.softmax(logits)))
