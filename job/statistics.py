"""Figures drawn from predictions: pure functions on arrays, by SciPy and scikit-learn where they have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn import metrics

from job.manifest import ClassMetrics, SplitMetrics

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
CALIBRATION_BINS = 15
SIGNIFICANCE = 0.05


def accuracy_interval(correct: int, examples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson 1927)."""
    interval = stats.binomtest(correct, examples).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def cross_entropy(logits: Floats, labels: Ints) -> Floats:
    """Return each example's cross-entropy in nats, from logits [n, classes] and labels [n], in float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    picked = shifted[np.arange(len(labels)), labels]
    losses: Floats = np.log(np.exp(shifted).sum(axis=1)) - picked
    return losses


def auc(labels: Ints, probabilities: Floats) -> float | None:
    """Return the area under the ROC curve, for several classes the unweighted mean of one against the rest.

    None where a class of ``probabilities`` [n, classes] has no example, since its curve does not exist.
    """
    classes = probabilities.shape[1]
    if len(np.unique(labels)) < classes:
        return None
    # of two classes the second alone: near 1, float32 ties what it can still tell apart near 0, so the curves differ
    scored = (1,) if classes == 2 else range(classes)
    per_class = [metrics.roc_auc_score(labels == k, probabilities[:, k]) for k in scored]
    return float(np.mean(per_class))


def calibration_error(labels: Ints, probabilities: Floats, bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error over equal-width bins of the top probability (Guo et al. 2017)."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, correct, bins) - np.bincount(bin_of, confidence, bins)
    return float(np.abs(gaps).sum() / len(labels))


def split_metrics(labels: Ints, logits: Floats, probabilities: Floats, classes: Sequence[str]) -> SplitMetrics:
    """Return all published metrics of one split.

    labels: int [n]. logits: the model's raw outputs [n, classes], from which the loss is taken. probabilities:
    float32 [n, classes] as published, from whose argmax the accuracy is taken. classes: the names.
    """
    predicted = probabilities.argmax(axis=1)
    correct = int((predicted == labels).sum())
    indices = np.arange(len(classes))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predicted, labels=indices, zero_division=0.0
    )
    confusion = metrics.confusion_matrix(labels, predicted, labels=indices)
    return SplitMetrics(
        examples=len(labels),
        loss=float(cross_entropy(logits, labels).mean()),
        accuracy=correct / len(labels),
        accuracy_interval=accuracy_interval(correct, len(labels)),
        auc=auc(labels, probabilities),
        calibration_error=calibration_error(labels, probabilities),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        per_class=tuple(
            ClassMetrics(
                name=name,
                precision=float(precision[k]),
                recall=float(recall[k]),
                f1=float(f1[k]),
                support=int(support[k]),
            )
            for k, name in enumerate(classes)
        ),
    )


@dataclass(frozen=True)
class PairedTest:
    """Accuracy of a minus accuracy of b on the same examples, its 95% interval, and the two-sided p-value."""

    difference: float
    interval: tuple[float, float]
    p_value: float

    method: ClassVar[str] = "McNemar's exact test; 95% interval of the paired difference after Agresti and Min (2005)"

    def verdict(self, better: str, worse: str) -> str:
        """Return the result as one sentence, for ``better`` as a and ``worse`` as b."""
        low, high = (100 * bound for bound in self.interval)
        p_value = f"p = {self.p_value:.3f}" if self.p_value >= 0.001 else "p < 0.001"
        figures = (
            f"{100 * self.difference:+.1f} points of test accuracy (95% interval {low:+.1f} to {high:+.1f}, {p_value})"
        )
        if self.p_value < SIGNIFICANCE:
            return f"{better} is better than {worse}: {figures}."
        return f"No difference shown between {better} and {worse}: {figures}."


def paired_test(a_correct: npt.NDArray[np.bool_], b_correct: npt.NDArray[np.bool_]) -> PairedTest:
    """Compare two models on the same examples, from whether each got each example right (bool [n]).

    Only examples on which they differ carry information: McNemar's exact test is a sign test on those. The interval
    is Wald's with half an observation added to each of the four cells, whose coverage Agresti and Min studied.
    """
    n = len(a_correct)
    only_a = int((a_correct & ~b_correct).sum())
    only_b = int((b_correct & ~a_correct).sum())
    differing = only_a + only_b
    p_value = float(stats.binomtest(only_a, differing).pvalue) if differing else 1.0
    adjusted_a, adjusted_b, adjusted_n = only_a + 0.5, only_b + 0.5, n + 2
    centre = (adjusted_a - adjusted_b) / adjusted_n
    variance = ((adjusted_a + adjusted_b) / adjusted_n - centre**2) / adjusted_n
    half = float(stats.norm.ppf(0.975)) * max(variance, 0.0) ** 0.5
    return PairedTest((only_a - only_b) / n, (max(-1.0, centre - half), min(1.0, centre + half)), p_value)
