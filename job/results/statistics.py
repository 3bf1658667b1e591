"""Figures drawn from predictions: pure functions on arrays, by SciPy and scikit-learn where they have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special, stats
from sklearn import metrics

from job.manifest import Bin, ClassMetrics, SplitMetrics

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
Hits = npt.NDArray[np.bool_]
CALIBRATION_BINS = 15
SIGNIFICANCE = 0.05

WILSON = "Wilson's score interval (1927), of one model"
WILSON_OVER_SEEDS = (
    "Wilson's score interval at the effective number of examples (Franco et al. 2019), from two-way random effects of "
    "seeds and photos (Dorfman, Berbaum and Metz 1992); at least as wide as from Student's t over the seeds"
)
MCNEMAR = "McNemar's exact test of two models; 95% interval of the paired difference after Agresti and Min (2005)"
PAIRED_OVER_SEEDS = (
    "two-way random effects of seeds and photos on the paired differences (Dorfman, Berbaum and Metz 1992), with "
    "Agresti and Min's half observations (2005); never surer than Student's t over the seeds"
)


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


def reliability(labels: Ints, probabilities: Floats, bins: int = CALIBRATION_BINS) -> tuple[Bin, ...]:
    """Return the equal-width bins of the top probability that have examples, ascending: a reliability diagram."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    counts, confidences, hits = (
        np.histogram(confidence, bins, range=(0, 1), weights=weights)[0]
        for weights in (None, confidence, correct.astype(np.float64))
    )
    return tuple(
        Bin(examples=int(counts[k]), confidence=confidences[k] / counts[k], accuracy=hits[k] / counts[k])
        for k in np.flatnonzero(counts)
    )


def calibration_error(labels: Ints, probabilities: Floats, bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error over equal-width bins of the top probability (Guo et al. 2017)."""
    return _calibration_error(reliability(labels, probabilities, bins))


def _calibration_error(bins: Sequence[Bin]) -> float:
    gaps = sum(each.examples * abs(each.confidence - each.accuracy) for each in bins)
    return gaps / sum(each.examples for each in bins)


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
    bins = reliability(labels, probabilities)
    return SplitMetrics(
        examples=len(labels),
        loss=float(cross_entropy(logits, labels).mean()),
        accuracy=correct / len(labels),
        accuracy_interval=accuracy_interval(correct, len(labels)),
        auc=auc(labels, probabilities),
        calibration_error=_calibration_error(bins),
        reliability=bins,
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


def mean_squares(values: Floats) -> tuple[float, float, float]:
    """Return the mean squares of photos, of seeds and of the residual, from values [seeds, photos], each at least 2.

    The two-way layout with one observation per cell. With variances P of photos, S of seeds and R of a photo's answer
    at a seed, their expectations are seeds * P + R, photos * S + R and R (Scheffe 1959, The Analysis of Variance).
    """
    seeds, photos = values.shape
    of_photos, of_seeds = values.mean(axis=0), values.mean(axis=1)
    residual = values - of_photos - of_seeds[:, np.newaxis] + values.mean()
    return (
        seeds * float(of_photos.var(ddof=1)),
        photos * float(of_seeds.var(ddof=1)),
        float((residual**2).sum()) / ((seeds - 1) * (photos - 1)),
    )


@dataclass(frozen=True)
class _Spread:
    """An estimated variance of a mean, and the degrees of freedom of the estimate."""

    variance: float
    freedom: float

    @property
    def quantile(self) -> float:
        return float(special.stdtrit(self.freedom, 1 - SIGNIFICANCE / 2))


def _spreads(values: Floats) -> tuple[_Spread, ...]:
    """Return the estimates of the variance of the mean of values [seeds, photos] that an interval has to respect.

    One seed: photos vary, by their variance with divisor n, as in Wilson's and Agresti and Min's intervals. Several:

    - both vary: (photos + seeds - residual) / (seeds * photos), with the degrees of freedom of Satterthwaite (1946).
      This is the analysis of readers and cases by Dorfman, Berbaum and Metz (1992) and Hillis (2007), where a mean
      square below the residual's is clipped to it. Here that goes for the degrees of freedom too: a mean square of one
      or two degrees that happens to be small would otherwise pass for certainty (tests/measure/simulations.py).
    - Student's t over the means of the seeds, whose coverage holds where seeds vary far more than photos: from two or
      three seeds that happen to agree, the first estimate sees photos only.
    """
    seeds, photos = values.shape
    if seeds == 1:
        return (_Spread(float(values.var()) / photos, np.inf),)
    of_photos, of_seeds, residual = mean_squares(values)
    alone = _Spread(of_seeds / values.size, seeds - 1)
    of_photos = max(of_photos * (photos - 1) / photos, residual)
    of_seeds = max(of_seeds, residual)
    both = of_photos + of_seeds - residual
    freedom = both**2 / (of_photos**2 / (photos - 1) + of_seeds**2 / (seeds - 1))
    return _Spread(both / values.size, freedom), alone


def accuracy_interval_over_seeds(hits: Hits) -> tuple[float, float]:
    """Return a 95% interval of an arm's accuracy, over other seeds and other photos, from hits [seeds, photos].

    Wilson's interval with Student's t, at the number of independent examples that would vary as much (Franco et al.
    2019, Journal of Survey Statistics and Methodology 7; SAS PROC SURVEYFREQ's modified Wilson limits). One seed gives
    :func:`accuracy_interval`; so does an accuracy of 0 or 1 at all seeds, which shows no variation to estimate. One
    photo on which seeds disagree tells nothing: 0 to 1.
    """
    seeds, photos = hits.shape
    accuracy = float(hits.mean())
    if seeds == 1 or accuracy in (0, 1):
        return accuracy_interval(int(hits[0].sum()), photos)
    if photos == 1:
        return 0.0, 1.0
    bounds = []
    for spread in _spreads(hits.astype(np.float64)):
        square = spread.quantile**2
        by_examples = square * spread.variance / (accuracy * (1 - accuracy))
        half = (square * spread.variance + by_examples**2 / 4) ** 0.5
        bounds += [(accuracy + by_examples / 2 + side * half) / (1 + by_examples) for side in (-1, 1)]
    return max(0.0, min(bounds)), min(1.0, max(bounds))


@dataclass(frozen=True)
class PairedTest:
    """Accuracy of a minus accuracy of b on the same examples, its 95% interval, and the two-sided p-value."""

    difference: float
    interval: tuple[float, float]
    p_value: float
    method: str = MCNEMAR

    @property
    def shows(self) -> bool:
        """Whether a difference is shown, at 5%."""
        return self.p_value < SIGNIFICANCE

    @property
    def uncertainty(self) -> str:
        """The interval, in points, and the p-value."""
        low, high = (100 * bound for bound in self.interval)
        p_value = f"p = {self.p_value:.3f}" if self.p_value >= 0.001 else "p < 0.001"
        return f"(95% interval {low:+.1f} to {high:+.1f}, {p_value})"

    @property
    def figures(self) -> str:
        """The difference in points of test accuracy, with its interval and p-value."""
        return f"{100 * self.difference:+.1f} points of test accuracy {self.uncertainty}"

    def verdict(self, better: str, worse: str, circumstances: str = "") -> str:
        """Return the result as one sentence, for ``better`` as a and ``worse`` as b.

        circumstances: what both had in common, such as ``with 500 training examples``.
        """
        told = f" {circumstances}" if circumstances else ""
        if self.shows:
            return f"{better} is better than {worse}{told}: {self.figures}."
        return f"No difference shown between {better} and {worse}{told}: {self.figures}."


def paired_test(a_correct: Hits, b_correct: Hits) -> PairedTest:
    """Compare two models on the same examples, from whether each got each example right (bool [n]).

    Only examples on which they differ carry information: McNemar's exact test is a sign test on those. The interval
    is Wald's with half an observation added to each of the four cells, whose coverage Agresti and Min studied. It
    speaks of these two models: other seeds may give others.
    """
    only_a = int((a_correct & ~b_correct).sum())
    only_b = int((b_correct & ~a_correct).sum())
    differing = only_a + only_b
    p_value = float(stats.binomtest(only_a, differing).pvalue) if differing else 1.0
    interval = paired_test_over_seeds(a_correct[np.newaxis], b_correct[np.newaxis]).interval
    return PairedTest((only_a - only_b) / len(a_correct), interval, p_value, MCNEMAR)


def paired_test_over_seeds(a_correct: Hits, b_correct: Hits) -> PairedTest:
    """Compare two arms over other seeds and other photos, from their hits [seeds, photos], row by row the same seeds.

    Seeds and photos are both drawn at random, and each seed's models share their training examples and their order;
    so the differences per seed and photo are analysed as readers and cases are (:func:`mean_squares`). p < 0.05 where
    the interval leaves 0 out, and only there. At one seed the interval is that of :func:`paired_test`.
    """
    differences = a_correct.astype(np.float64) - b_correct
    # two photos that add up as half an observation of each outcome does: to 0, and their squares to 1
    half_observations = np.tile([0.5**0.5, -(0.5**0.5)], (len(differences), 1))
    values = np.hstack([differences, half_observations])
    centre = float(values.mean())
    spreads = _spreads(values)
    half = max(spread.quantile * spread.variance**0.5 for spread in spreads)
    p_value = max(
        2 * float(special.stdtr(spread.freedom, -abs(centre) / spread.variance**0.5))
        for spread in spreads
        if spread.variance > 0
    )
    interval = max(-1.0, centre - half), min(1.0, centre + half)
    return PairedTest(float(differences.mean()), interval, min(1.0, p_value), PAIRED_OVER_SEEDS)
