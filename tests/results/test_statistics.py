from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from scipy import special, stats
from sklearn import metrics
from sklearn.calibration import calibration_curve
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar

from job.manifest import Bin
from job.results.statistics import (
    PairedTest,
    accuracy_interval,
    accuracy_interval_over_seeds,
    auc,
    calibration_error,
    cross_entropy,
    mean_squares,
    paired_test,
    paired_test_over_seeds,
    reliability,
    split_metrics,
)
from tests.measure.simulations import (
    MONTE_CARLO,
    World,
    called_different,
    called_different_by_one_seed,
    coverage_of_a_difference,
    coverage_of_a_model,
    coverage_of_an_arm,
    same_arm,
)

Z = 1.959963984540054


def published(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    return special.softmax(logits.astype(np.float32), axis=1)


# --- accuracy_interval -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("correct", "examples"), [(0, 1), (1, 1), (0, 20), (1, 29), (15, 148), (50, 100), (997, 1000)])
def test_the_interval_is_wilsons_closed_form(correct: int, examples: int) -> None:
    p, n = correct / examples, examples
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5 / (1 + Z**2 / n)
    assert accuracy_interval(correct, examples) == pytest.approx((centre - half, centre + half), abs=1e-12)


# R. G. Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3
@pytest.mark.parametrize(
    ("correct", "examples", "interval"),
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_the_interval_has_the_printed_values(correct: int, examples: int, interval: tuple[float, float]) -> None:
    assert accuracy_interval(correct, examples) == pytest.approx(interval, abs=5e-5)


def test_the_interval_lies_between_0_and_1_even_for_none_and_all_correct() -> None:
    for examples in range(1, 41):
        for correct in (0, examples):
            low, high = accuracy_interval(correct, examples)
            assert 0 <= low < high <= 1


def test_more_confidence_takes_a_wider_interval() -> None:
    (low_90, high_90), (low_99, high_99) = (accuracy_interval(80, 100, confidence) for confidence in (0.90, 0.99))
    assert low_99 < low_90 < 0.8 < high_90 < high_99


# --- cross_entropy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5])
def test_cross_entropy_is_the_log_loss_of_the_softmax(classes: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (200, classes))
    labels = rng.integers(0, classes, 200)
    losses = cross_entropy(logits, labels)
    assert losses.shape == (200,)
    expected = metrics.log_loss(labels, special.softmax(logits, axis=1), labels=np.arange(classes))
    assert losses.mean() == pytest.approx(expected, rel=1e-12)
    one_by_one = [
        metrics.log_loss([label], [row], labels=np.arange(classes))
        for label, row in zip(labels[:20], special.softmax(logits[:20], axis=1), strict=True)
    ]
    assert losses[:20] == pytest.approx(one_by_one, rel=1e-10)


@pytest.mark.parametrize("offset", [-1e6, 1e6])
def test_cross_entropy_of_huge_logits_depends_on_their_differences_only(offset: float) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (100, 3))
    labels = rng.integers(0, 3, 100)
    expected = metrics.log_loss(labels, special.softmax(logits, axis=1), labels=[0, 1, 2])
    assert cross_entropy(logits + offset, labels).mean() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_huge_mistake_costs_its_whole_margin(dtype: type[np.floating]) -> None:
    # a log of float32 probabilities would give infinity, or the clip of whoever avoids it
    losses = cross_entropy(np.array([[30000, -30000], [30000, -30000]], dtype), np.array([0, 1]))
    assert losses.dtype == np.float64
    assert losses.tolist() == [0.0, 60000.0]


# --- auc ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 3, 30])
def test_auc_of_two_classes_is_scikit_learns_on_the_second_column(scale: float) -> None:
    # at the largest scale many float32 probabilities are 1, while their complements still differ
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 300)
    margin = (2 * labels - 1 + rng.normal(0, 1, 300)) * scale
    probabilities = published(np.stack([np.zeros(300), margin], axis=1))
    assert auc(labels, probabilities) == metrics.roc_auc_score(labels, probabilities[:, 1])


def test_auc_by_hand() -> None:
    # of the four pairs (negative, positive) one is in the wrong order and one is a tie
    second = np.array([0.2, 0.6, 0.6, 0.4])
    value = auc(np.array([0, 0, 1, 1]), np.stack([1 - second, second], axis=1))
    assert value == pytest.approx(2.5 / 4)


def test_auc_of_several_classes_is_the_mean_of_one_against_the_rest() -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1, 2], [100, 40, 10])
    probabilities = published(rng.normal(0, 1, (150, 3)) + np.eye(3)[labels] * [0.5, 1, 2])
    each = [metrics.roc_auc_score(labels == k, probabilities[:, k]) for k in range(3)]
    assert len(set(each)) == 3
    assert auc(labels, probabilities) == pytest.approx(sum(each) / 3, rel=1e-12)
    # scikit-learn's own wants rows that sum to 1 in float64
    wide = probabilities.astype(np.float64)
    wide /= wide.sum(axis=1, keepdims=True)
    assert auc(labels, wide) == pytest.approx(
        metrics.roc_auc_score(labels, wide, multi_class="ovr", average="macro"), rel=1e-12
    )


@pytest.mark.parametrize(("labels", "classes"), [([0, 0, 0], 2), ([1, 1, 1], 2), ([0, 2, 2], 3)])
def test_auc_is_none_where_a_class_has_no_example(labels: list[int], classes: int) -> None:
    assert auc(np.array(labels), published(np.random.default_rng(4).normal(size=(3, classes)))) is None


# --- calibration_error -------------------------------------------------------------------------------------------


def of_two(confidence: list[float], correct: list[bool]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return labels and probabilities: class 1 is predicted with the given confidence, rightly or not."""
    second = np.array(confidence)
    return np.array(correct).astype(int), np.stack([1 - second, second], axis=1)


@pytest.mark.parametrize(
    ("confidence", "correct", "error"),
    [
        pytest.param([0.8] * 10, [True] * 8 + [False] * 2, 0.0, id="right as often as it says"),
        pytest.param([1.0] * 4, [False] * 4, 1.0, id="certain and always wrong"),
        pytest.param([1.0] * 4, [True] * 4, 0.0, id="certain and always right"),
        pytest.param([0.95, 0.95], [True, False], 0.45, id="one bin, overconfident"),
        pytest.param([0.6, 0.6], [True, True], 0.4, id="one bin, underconfident"),
        pytest.param([0.9, 0.9, 0.6, 0.6], [True, False, True, True], 0.4, id="gaps of two bins do not cancel"),
        pytest.param([0.95, 0.97], [True, False], 0.46, id="gaps within a bin are averaged"),
        pytest.param([1.0, 0.95], [False, True], 0.475, id="certainty is in the last bin"),
        pytest.param([0.95] * 3 + [0.6], [True] * 3 + [False], (3 * 0.05 + 0.6) / 4, id="bins count by examples"),
    ],
)
def test_calibration_error_by_hand(confidence: list[float], correct: list[bool], error: float) -> None:
    assert calibration_error(*of_two(confidence, correct)) == pytest.approx(error, abs=1e-12)


def test_calibration_error_in_a_single_bin_is_the_overall_gap() -> None:
    labels, probabilities = of_two([0.9, 0.9, 0.6, 0.6], [True, False, True, True])
    assert calibration_error(labels, probabilities, bins=1) == pytest.approx(0, abs=1e-12)


def test_there_are_fifteen_bins_of_equal_width() -> None:
    # 10/15 parts these two and no edge of ten bins does; in one bin their gaps, +0.35 and -0.68, would cancel
    confidence, correct = [0.65, 0.68], [True, False]
    assert calibration_error(*of_two(confidence, correct)) == pytest.approx((0.35 + 0.68) / 2)
    assert calibration_error(*of_two(confidence, correct), bins=10) == pytest.approx((0.68 - 0.35) / 2)


def test_calibration_error_of_several_classes_looks_at_the_top_probability() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.2, 0.5, 0.3], [0.5, 0.2, 0.3]], np.float32)
    assert calibration_error(np.array([0, 2, 1, 1]), probabilities) == pytest.approx(0.25)


def test_the_bins_of_reliability_add_up_to_the_calibration_error() -> None:
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 3, 500)
    probabilities = published(rng.normal(0, 2, (500, 3)) + np.eye(3)[labels])
    bins = reliability(labels, probabilities)
    assert sum(each.examples for each in bins) == 500
    gaps = sum(each.examples / 500 * abs(each.confidence - each.accuracy) for each in bins)
    assert gaps == pytest.approx(calibration_error(labels, probabilities), rel=1e-12)
    assert gaps > 0.02


def test_reliability_is_scikit_learns_calibration_curve_of_the_top_probability() -> None:
    rng = np.random.default_rng(9)
    labels = rng.integers(0, 2, 400)
    probabilities = published(rng.normal(0, 2, (400, 2)))
    correct, confidence = calibration_curve(
        probabilities.argmax(axis=1) == labels, probabilities.max(axis=1).astype(float), n_bins=15
    )
    bins = reliability(labels, probabilities)
    assert [each.accuracy for each in bins] == pytest.approx(correct)
    assert [each.confidence for each in bins] == pytest.approx(confidence)
    assert len(bins) == 8  # of fifteen: the top probability of two is at least a half


def test_bins_without_examples_are_left_out_and_certainty_is_in_the_last() -> None:
    bins = reliability(*of_two([0.55, 0.95, 1.0], [True, False, True]))
    assert bins == (
        Bin(examples=1, confidence=0.55, accuracy=1.0),
        Bin(examples=2, confidence=0.975, accuracy=0.5),
    )


# --- split_metrics -----------------------------------------------------------------------------------------------


def test_the_metrics_of_a_split_agree_with_each_other() -> None:
    rng = np.random.default_rng(5)
    names = ("cat", "dog", "horse")
    labels = rng.integers(0, 3, 120)
    logits = (rng.normal(0, 1, (120, 3)) + 1.5 * np.eye(3)[labels]).astype(np.float32)
    probabilities = published(logits)
    found = split_metrics(labels, logits, probabilities, names)

    confusion = np.array(found.confusion)
    predicted = probabilities.argmax(axis=1)
    assert confusion.tolist() == [[int(((labels == t) & (predicted == p)).sum()) for p in range(3)] for t in range(3)]
    assert found.examples == confusion.sum() == 120
    assert found.accuracy == confusion.trace() / 120 == metrics.accuracy_score(labels, predicted)
    assert 0.5 < found.accuracy < 1
    assert found.accuracy_interval == accuracy_interval(int(confusion.trace()), 120)
    assert found.loss == pytest.approx(metrics.log_loss(labels, special.softmax(logits.astype(float), axis=1)))
    assert found.auc == auc(labels, probabilities)
    assert found.calibration_error == calibration_error(labels, probabilities)
    assert found.reliability == reliability(labels, probabilities)
    assert tuple(each.name for each in found.per_class) == names
    for k, each in enumerate(found.per_class):
        true, of_class, of_prediction = confusion[k, k], confusion[k].sum(), confusion[:, k].sum()
        assert each.support == of_class
        assert each.recall == pytest.approx(true / of_class)
        assert each.precision == pytest.approx(true / of_prediction)
        assert each.f1 == pytest.approx(2 * true / (of_class + of_prediction))


def test_the_accuracy_is_that_of_the_published_probabilities() -> None:
    # float32 ties what the logits still tell apart: whoever recounts has the published columns only
    logits = np.array([[0.0, 1e-9], [0.0, 5.0]])
    found = split_metrics(np.array([1, 1]), logits, published(logits), ("cat", "dog"))
    assert (found.accuracy, found.confusion) == (0.5, ((0, 0), (1, 1)))


def test_a_class_that_is_absent_or_never_predicted_has_zeros_and_no_auc() -> None:
    logits = np.array([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [3.0, 0.0, 0.0]])
    found = split_metrics(np.array([0, 1, 1]), logits, published(logits), ("cat", "dog", "horse"))
    assert found.auc is None
    assert found.confusion == ((1, 0, 0), (1, 1, 0), (0, 0, 0))
    horse = found.per_class[2]
    assert (horse.precision, horse.recall, horse.f1, horse.support) == (0, 0, 0, 0)


def test_one_example_has_metrics() -> None:
    found = split_metrics(np.array([1]), np.array([[0.0, 2.0]]), published(np.array([[0.0, 2.0]])), ("cat", "dog"))
    assert (found.examples, found.accuracy, found.auc) == (1, 1.0, None)


# --- paired_test -------------------------------------------------------------------------------------------------


def models(
    both: int, only_a: int, only_b: int, neither: int = 0
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    counts = [both, only_a, only_b, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (9, 1, 2 * (1 + 10) / 2**10),
        (6, 0, 2 / 2**6),
        (1, 0, 1),
        (5, 5, 1),
        (0, 0, 1),
    ],
)
def test_the_p_value_is_mcnemars_exact_one_by_hand(only_a: int, only_b: int, p_value: float) -> None:
    assert paired_test(*models(50, only_a, only_b, 10)).p_value == pytest.approx(p_value, rel=1e-12)


def test_the_p_value_is_twice_the_binomial_tail_whoever_is_ahead() -> None:
    for only_a, only_b in ((25, 12), (12, 25), (40, 41), (3, 90)):
        tail = stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)
        assert paired_test(*models(100, only_a, only_b)).p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_the_p_value_is_that_of_statsmodels() -> None:
    for both, only_a, only_b in product((0, 40, 900), (0, 1, 2, 5, 13, 40, 150), (0, 1, 3, 8, 21, 60)):
        if both + only_a + only_b:
            reference = mcnemar([[both, only_a], [only_b, 7]], exact=True).pvalue
            assert paired_test(*models(both, only_a, only_b, 7)).p_value == pytest.approx(reference, rel=1e-9)


def test_examples_on_which_both_agree_do_not_move_the_p_value() -> None:
    few, many = paired_test(*models(1, 8, 2)), paired_test(*models(500, 8, 2, 500))
    assert few.p_value == many.p_value
    assert few.difference == 6 / 11
    assert many.difference == 6 / 1010


def test_the_interval_by_hand() -> None:
    found = paired_test(*models(70, 12, 4, 14))
    half = Z * (12 + 4 + 1 - (12 - 4) ** 2 / 102) ** 0.5 / 102
    assert found.difference == 0.08
    assert found.interval == pytest.approx((8 / 102 - half, 8 / 102 + half), abs=1e-12)
    assert found.interval == pytest.approx((0.00068, 0.15618), abs=5e-6)


def test_the_interval_of_a_textbook_example() -> None:
    # A. Agresti, Categorical Data Analysis (2002), section 10.1: approval of a prime minister, 0.04 (0.02 to 0.06)
    found = paired_test(*models(794, 150, 86, 570))
    assert found.difference == pytest.approx(0.04)
    assert found.interval == pytest.approx((0.02, 0.06), abs=0.002)
    assert found.p_value < 0.001


def assert_mirrored(test: Callable[..., PairedTest], *hits: npt.NDArray[np.bool_]) -> None:
    forth, back = test(*hits), test(*reversed(hits))
    assert back.difference == -forth.difference
    assert back.interval == pytest.approx((-forth.interval[1], -forth.interval[0]), abs=1e-15)
    assert back.p_value == pytest.approx(forth.p_value, rel=1e-12)


def test_swapped_models_give_the_mirrored_result() -> None:
    assert_mirrored(paired_test, *models(60, 12, 4, 24))


def test_the_same_answers_show_no_difference_but_leave_uncertainty() -> None:
    widths = []
    for n in (10, 100, 1000):
        found = paired_test(*models(n, 0, 0))
        low, high = found.interval
        assert (found.difference, found.p_value) == (0, 1)
        assert low < 0 < high
        widths.append(high - low)
    assert all(wide > narrow for wide, narrow in pairwise(widths))


def test_the_interval_stays_between_minus_1_and_1() -> None:
    for n in range(1, 30):
        for only_a in (0, n):
            low, high = paired_test(*models(0, only_a, n - only_a)).interval
            assert -1 <= low < high <= 1


def test_whatever_is_called_different_has_an_interval_on_one_side_of_zero() -> None:
    significant = 0
    for only_b in range(5):
        for only_a in range(only_b, 25):
            for agree in (1, 30, 2000):
                if (found := paired_test(*models(agree, only_a, only_b))).p_value < 0.05:
                    significant += 1
                    assert found.interval[0] > 0, (only_a, only_b, agree)
    assert significant > 50


@pytest.mark.parametrize("difference", [0.0, 0.08])
def test_the_interval_covers_95_percent_and_equal_models_rarely_look_different(difference: float) -> None:
    draws, n = 2000, 200
    u = np.random.default_rng(6).random((draws, n))
    both = u < 0.75
    only_a = ~both & (u < 0.83 + difference)
    only_b = ~both & ~only_a & (u < 0.91 + difference)
    found = [paired_test(a, b) for a, b in zip(both | only_a, both | only_b, strict=True)]
    covered = np.mean([each.interval[0] <= difference <= each.interval[1] for each in found])
    called_different = np.mean([each.p_value < 0.05 for each in found])
    # three standard errors of 2,000 draws are 0.015
    assert 0.935 <= covered <= 0.97
    if difference:
        assert called_different > 0.5
    else:
        assert 0.01 < called_different <= 0.05


def test_the_verdict_on_a_difference_names_the_better_and_the_figures() -> None:
    assert PairedTest(0.081, (0.0066, 0.1562), 0.0213).verdict("fine_tune", "frozen") == (
        "fine_tune is better than frozen: +8.1 points of test accuracy (95% interval +0.7 to +15.6, p = 0.021)."
    )
    assert PairedTest(0.3, (0.2, 0.4), 1e-9).verdict("fine_tune", "scratch") == (
        "fine_tune is better than scratch: +30.0 points of test accuracy (95% interval +20.0 to +40.0, p < 0.001)."
    )


def test_the_verdict_on_no_difference_says_so_with_the_same_figures() -> None:
    assert PairedTest(0.01, (-0.02, 0.04), 0.6).verdict("frozen", "fine_tune") == (
        "No difference shown between frozen and fine_tune: "
        "+1.0 points of test accuracy (95% interval -2.0 to +4.0, p = 0.600)."
    )
    assert PairedTest(0.01, (0.0, 0.02), 0.05).verdict("frozen", "scratch").startswith("No difference shown")


def test_the_verdict_tells_what_both_had_in_common() -> None:
    shown, not_shown = PairedTest(0.081, (0.0066, 0.1562), 0.0213), PairedTest(0.01, (-0.02, 0.04), 0.6)
    assert shown.verdict("a", "b", "over 5 seeds").startswith("a is better than b over 5 seeds: +8.1 points")
    assert not_shown.verdict("a", "b", "over 5 seeds").startswith("No difference shown between a and b over 5 seeds: +")


def test_the_verdict_follows_from_the_test() -> None:
    assert paired_test(*models(80, 9, 1, 10)).verdict("a", "b").startswith("a is better than b: +8.0 points")
    assert paired_test(*models(80, 8, 2, 10)).verdict("a", "b").startswith("No difference shown between a and b: +6.0")


# --- over seeds --------------------------------------------------------------------------------------------------


def outcomes(seed: int, shape: tuple[int, int], accuracy: float = 0.8, of_seeds: float = 0.2) -> npt.NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    score = rng.normal(0, 1, shape) + rng.normal(0, 1.2, (1, shape[1])) + rng.normal(0, of_seeds, (shape[0], 1))
    return np.asarray(score < special.ndtri(accuracy) * 1.6)


def test_the_mean_squares_are_those_of_statsmodels() -> None:
    values = outcomes(0, (3, 12)).astype(float)
    seed, photo = np.indices(values.shape)
    frame = pd.DataFrame({"value": values.ravel(), "seed": seed.ravel(), "photo": photo.ravel()})
    table = anova_lm(ols("value ~ C(photo) + C(seed)", frame).fit())
    reference = [table["mean_sq"][source] for source in ("C(photo)", "C(seed)", "Residual")]
    assert mean_squares(values) == pytest.approx(reference, rel=1e-9)
    assert min(reference) > 0


def test_the_variance_of_the_mean_is_gallas_one_shot_estimate() -> None:
    # B. D. Gallas (2006), Academic Radiology 13, 353-362: the squared mean, less the mean product of two outcomes
    # that share neither seed nor photo, which has the square of the true mean as its expectation
    values = outcomes(1, (3, 7)).astype(float)
    apart = [
        values[s, i] * values[t, j]
        for s, t in product(range(3), repeat=2)
        for i, j in product(range(7), repeat=2)
        if s != t and i != j
    ]
    of_photos, of_seeds, residual = mean_squares(values)
    assert (of_photos + of_seeds - residual) / 21 == pytest.approx(values.mean() ** 2 - np.mean(apart), rel=1e-9)


@pytest.mark.parametrize("correct", [0, 1, 60, 97, 100])
def test_at_one_seed_the_interval_over_seeds_is_wilsons(correct: int) -> None:
    hits = np.arange(100) < correct
    assert accuracy_interval_over_seeds(hits[np.newaxis]) == accuracy_interval(correct, 100)


def test_at_one_seed_the_interval_of_the_difference_over_seeds_is_agresti_and_mins() -> None:
    for counts in ((70, 12, 4, 14), (50, 0, 0), (5, 40, 1)):
        a, b = models(*counts)
        assert paired_test_over_seeds(a[np.newaxis], b[np.newaxis]).interval == paired_test(a, b).interval


def test_seeds_that_agree_on_every_photo_tell_no_more_than_one() -> None:
    a, b = models(180, 12, 4, 4)
    copies = np.tile(a, (5, 1)), np.tile(b, (5, 1))
    # not exactly equal: Student's t with 199 degrees of freedom stands for the normal distribution
    assert accuracy_interval_over_seeds(copies[0]) == pytest.approx(accuracy_interval(192, 200), abs=5e-4)
    assert paired_test_over_seeds(*copies).interval == pytest.approx(paired_test(a, b).interval, abs=5e-4)


def test_seeds_that_err_on_different_photos_tell_more_and_seeds_of_unlike_accuracy_tell_less() -> None:
    def width(hits: npt.NDArray[np.bool_]) -> float:
        low, high = accuracy_interval_over_seeds(hits)
        return high - low

    photos = np.arange(500)
    same = np.stack([photos >= 50] * 5)
    different = np.stack([(photos < 50 * k) | (photos >= 50 * k + 50) for k in range(5)])
    unlike = np.stack([photos >= errors for errors in (10, 30, 50, 70, 90)])
    assert same.mean() == different.mean() == unlike.mean() == 0.9
    assert width(different) < 0.7 * width(same)
    assert width(unlike) > 1.5 * width(same)


def test_the_interval_over_seeds_stays_between_0_and_1_and_holds_the_accuracy() -> None:
    for seed, seeds, photos, accuracy in product(range(5), (2, 5), (1, 2, 20), (0.05, 0.5, 0.97, 1.0)):
        hits = outcomes(seed, (seeds, photos), accuracy)
        low, high = accuracy_interval_over_seeds(hits)
        assert 0 <= low <= hits.mean() <= high <= 1
        assert low < high


def test_photos_that_all_seeds_get_right_have_wilsons_interval() -> None:
    assert accuracy_interval_over_seeds(np.ones((5, 100), bool)) == accuracy_interval(100, 100)


def test_a_difference_is_shown_over_seeds_exactly_where_the_interval_leaves_0_out() -> None:
    shown = 0
    for seed, seeds, accuracy in product(range(60), (2, 3, 5), (0.8, 0.85, 0.9)):
        found = paired_test_over_seeds(outcomes(seed, (seeds, 80), accuracy), outcomes(seed + 100, (seeds, 80), 0.7))
        low, high = found.interval
        assert found.shows == (not low <= 0 <= high)
        shown += found.shows
    assert 50 < shown < 500


def test_swapped_arms_give_the_mirrored_result() -> None:
    assert_mirrored(paired_test_over_seeds, outcomes(2, (3, 60), 0.9), outcomes(3, (3, 60), 0.7))


def test_arms_with_the_same_answers_show_no_difference_over_seeds() -> None:
    hits = outcomes(4, (3, 60))
    found = paired_test_over_seeds(hits, hits)
    assert (found.difference, found.p_value, found.shows) == (0, 1, False)
    assert found.interval[0] < 0 < found.interval[1]


# In the simulations 95% of 2,000 draws may come out as 93.5% by chance (three standard errors): that is the bound.
# seed_effect 0.3 is a standard deviation of 5 points between the accuracies of one arm's seeds at an accuracy of
# 0.8, and of 1.2 at 0.97. ``python -m tests.measure.simulations`` prints the whole table.
COVERED = 0.95 - MONTE_CARLO


@pytest.mark.parametrize(("accuracy", "photos"), [(0.97, 100), (0.97, 1000), (0.8, 1000)])
def test_the_interval_of_one_model_covers_its_accuracy(accuracy: float, photos: int) -> None:
    assert COVERED <= coverage_of_a_model(World((accuracy,), photos, 1, seed_effect=0.3)) <= 0.98


@pytest.mark.parametrize(
    ("accuracy", "photos", "seeds", "seed_effect"),
    [(0.97, 100, 5, 0.0), (0.97, 1000, 5, 0.3), (0.8, 1000, 5, 0.3), (0.8, 100, 3, 0.3), (0.8, 1000, 2, 0.3)],
)
def test_the_interval_over_seeds_covers_the_accuracy_of_the_arm(
    accuracy: float, photos: int, seeds: int, seed_effect: float
) -> None:
    assert coverage_of_an_arm(World((accuracy,), photos, seeds, seed_effect)) >= COVERED


def test_one_models_interval_does_not_cover_the_accuracy_of_the_arm_where_seeds_vary() -> None:
    world = World((0.8,), 1000, 1, seed_effect=0.3)
    assert coverage_of_a_model(world) >= COVERED
    assert coverage_of_an_arm(world, 500) < 0.5


@pytest.mark.parametrize(
    ("accuracies", "photos", "seeds", "seed_effect"),
    [
        ((0.97, 0.95), 100, 5, 0.0),
        ((0.97, 0.95), 1000, 3, 0.1),
        ((0.8, 0.75), 1000, 5, 0.3),
        ((0.8, 0.75), 100, 3, 0.3),
        ((0.8, 0.75), 1000, 2, 0.3),
    ],
)
def test_the_interval_of_the_difference_over_seeds_covers_the_truth(
    accuracies: tuple[float, float], photos: int, seeds: int, seed_effect: float
) -> None:
    assert coverage_of_a_difference(World(accuracies, photos, seeds, seed_effect))[0] >= COVERED


def test_a_difference_of_2_points_is_found_over_5_seeds() -> None:
    assert called_different(World((0.97, 0.95), 1000, 5, seed_effect=0.1)) > 0.8


@pytest.mark.parametrize(("accuracy", "seeds"), [(0.97, 2), (0.97, 3), (0.8, 5)])
def test_two_sets_of_runs_of_one_arm_are_rarely_called_different_over_seeds_but_often_by_one_seed(
    accuracy: float, seeds: int
) -> None:
    world = same_arm(World((accuracy,), 1000, seeds, seed_effect=0.3))
    assert called_different(world) <= 0.05 + MONTE_CARLO
    assert called_different_by_one_seed(world, 500) > 0.3


def test_where_seeds_do_not_vary_one_seed_is_enough() -> None:
    assert called_different_by_one_seed(same_arm(World((0.8,), 200, 1, seed_effect=0.0))) <= 0.05 + MONTE_CARLO
