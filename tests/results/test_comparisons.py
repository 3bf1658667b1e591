"""Summaries, comparisons and the verdict, from results whose hits are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest

from job.manifest import Manifest, Result, json_schema
from job.results.comparisons import Scored, comparisons, labels, summaries, verdict
from job.results.statistics import accuracy_interval, accuracy_interval_over_seeds, paired_test, paired_test_over_seeds
from tests.support.small_runs import manifest

PHOTOS = 400
EXAMPLES = (50, 200, 1000)


def result(arm: str, examples: int = 1000, seed: int = 0, validation: float = 0.9, **changes: Any) -> Result:
    record = manifest([]).results[0]
    split = record.metrics.validation.model_copy(update={"accuracy": validation})
    fields = {
        "arm": arm,
        "train_examples": examples,
        "train_fraction": examples / 1000,
        "seed": seed,
        "metrics": record.metrics.model_copy(update={"validation": split}),
    }
    return record.model_copy(update=fields | changes)


def run(
    errors: Mapping[str, Sequence[int]],
    seeds: Sequence[int] = (0, 1, 2),
    examples: Sequence[int] = (1000,),
    validation: Mapping[str, float] | None = None,
) -> Scored:
    """Return a run in which an arm gets the first photos wrong: so many at each number of training examples.

    The second seed gets one more wrong than the first, the third two more, in every arm.
    """
    preferred = {"scratch": 0.5, "frozen": 0.8, "fine_tune": 0.9} | dict(validation or {})
    return [
        (result(arm, size, seed, preferred[arm]), np.arange(PHOTOS) >= errors[arm][k] + position)
        for arm in errors
        for k, size in enumerate(examples)
        for position, seed in enumerate(seeds)
    ]


THREE = {"scratch": [120], "frozen": [40], "fine_tune": [10]}


def uncertainty(scored: Scored, better: str, worse: str, examples: int = 1000) -> str:
    """Return the interval and p-value over seeds, as the tests of statistics.py have them."""
    one, other = (
        np.stack([hits for each, hits in scored if (each.arm, each.train_examples) == (arm, examples)])
        for arm in (better, worse)
    )
    return paired_test_over_seeds(one, other).uncertainty


# --- summaries ---------------------------------------------------------------------------------------------------


def test_a_summary_is_of_all_seeds_of_an_arm_at_a_fraction() -> None:
    scored = run({"frozen": [90, 80, 40], "fine_tune": [90, 60, 10]}, (7, 3), EXAMPLES)
    found = summaries(scored)
    assert [(each.train_examples, each.arm) for each in found] == [
        (size, arm) for size in EXAMPLES for arm in ("frozen", "fine_tune")
    ]
    last = found[-1]
    hits = np.stack([hits for each, hits in scored if (each.arm, each.train_examples) == ("fine_tune", 1000)])
    assert (last.train_fraction, last.seeds, last.test_accuracy) == (1.0, (7, 3), (390 + 389) / 800)
    assert last.interval == accuracy_interval_over_seeds(hits)
    assert "seeds" in last.method


def test_the_summary_of_one_seed_has_wilsons_interval() -> None:
    (found,) = summaries(run({"frozen": [40]}, (5,)))
    assert (found.seeds, found.test_accuracy, found.interval) == ((5,), 0.9, accuracy_interval(360, 400))
    assert found.method.startswith("Wilson's score interval")


def test_seconds_and_cost_are_means_and_a_cost_is_there_only_if_all_are_priced() -> None:
    (one, hits), (other, _) = run({"frozen": [40]}, (0, 1))
    longer = other.model_copy(update={"seconds": one.seconds.model_copy(update={"total": 4.0}), "cost": 0.5})
    (found,) = summaries([(one, hits), (longer, hits)])
    assert (found.seconds, found.cost) == (2.5, None)
    (found,) = summaries([(one.model_copy(update={"cost": 0.25}), hits), (longer, hits)])
    assert found.cost == 0.375


def test_what_results_share_is_no_result_s_own() -> None:
    (one, hits), (other, _) = run({"frozen": [40]}, (0, 1))
    first = one.seconds.model_copy(update={"data": 20.0, "features": 10.0, "total": 36.0})
    later = one.seconds.model_copy(update={"data": 0.0, "features": 0.0, "total": 6.0})
    results = [
        each.model_copy(update={"seconds": seconds, "cost": seconds.total / 2})
        for each, seconds in ((one, first), (other, later))
    ]
    (found,) = summaries([(each, hits) for each in results])
    assert (found.seconds, found.cost, found.own_seconds, found.own_cost) == (21.0, 10.5, 6.0, 3.0)


# --- comparisons -------------------------------------------------------------------------------------------------


def test_over_seeds_comes_first_and_then_each_seed_for_every_pair_of_every_fraction() -> None:
    scored = run({arm: errors * 2 for arm, errors in THREE.items()}, (4, 1), (500, 1000))
    found = comparisons(scored)
    pairs = [("frozen", "scratch"), ("fine_tune", "scratch"), ("fine_tune", "frozen")]
    assert [(each.train_fraction, each.seeds, (each.better, each.worse)) for each in found] == [
        (fraction, seeds, pair) for fraction in (0.5, 1.0) for seeds in ((4, 1), (4,), (1,)) for pair in pairs
    ]


def test_the_figures_are_those_of_the_tests() -> None:
    scored = run(THREE)
    hits = {arm: np.stack([hits for each, hits in scored if each.arm == arm]) for arm in THREE}
    over_seeds, of_first = comparisons(scored)[2], comparisons(scored)[5]
    expected = (
        paired_test_over_seeds(hits["fine_tune"], hits["frozen"]),
        paired_test(hits["fine_tune"][0], hits["frozen"][0]),
    )
    for found, test in zip((over_seeds, of_first), expected, strict=True):
        for figure in ("difference", "interval", "p_value", "method"):
            assert getattr(found, figure) == getattr(test, figure)
    assert over_seeds.difference == pytest.approx(30 / 400)


def test_one_seed_has_mcnemars_test_alone() -> None:
    found = comparisons(run(THREE, (3,)))
    assert [each.seeds for each in found] == [(3,)] * 3
    assert all(each.method.startswith("McNemar") for each in found)


def test_sentences_of_one_seed_speak_of_models_and_those_over_seeds_of_arms() -> None:
    scored = run({"frozen": [40], "fine_tune": [10]}, (0, 1))
    over_seeds, of_first, _ = comparisons(scored)
    assert over_seeds.verdict == (
        "fine_tune is better than frozen over 2 seeds: "
        f"+7.5 points of test accuracy {uncertainty(scored, 'fine_tune', 'frozen')}."
    )
    assert of_first.verdict == (
        "fine_tune's model is better than frozen's at seed 0: "
        "+7.5 points of test accuracy (95% interval +4.8 to +10.1, p < 0.001)."
    )


def test_sentences_name_the_training_examples_where_there_are_several_fractions() -> None:
    scored = run({"frozen": [40, 40], "fine_tune": [38, 10]}, (0, 1), (50, 1000))
    found = comparisons(scored)
    assert found[0].verdict == (
        "No difference shown between fine_tune and frozen with 50 training examples over 2 seeds: "
        f"+0.5 points of test accuracy {uncertainty(scored, 'fine_tune', 'frozen', 50)}."
    )
    assert found[1].verdict == (
        "No difference shown between fine_tune's model and frozen's with 50 training examples at seed 0: "
        "+0.5 points of test accuracy (95% interval -0.3 to +1.3, p = 0.500)."
    )
    assert found[3].verdict.startswith(
        "fine_tune is better than frozen with 1,000 training examples over 2 seeds: +7.5"
    )


def test_of_equal_arms_the_first_is_called_better_and_no_difference_is_shown() -> None:
    for arms in (("frozen", "fine_tune"), ("fine_tune", "frozen")):
        for each in comparisons(run({arm: [40] for arm in arms})):
            assert (each.better, each.worse, each.difference) == (*arms, 0)
            assert each.verdict.startswith("No difference shown")


def test_a_seed_may_disagree_with_all_seeds_together() -> None:
    photos = np.arange(PHOTOS)
    frozen = [photos >= 40, photos >= 60, photos >= 60]
    tuned = [photos >= 60, photos >= 20, photos >= 20]
    scored = [
        (result(arm, seed=s), hits)
        for arm, rows in (("frozen", frozen), ("fine_tune", tuned))
        for s, hits in enumerate(rows)
    ]
    assert [each.better for each in comparisons(scored)] == ["fine_tune", "frozen", "fine_tune", "fine_tune"]
    assert comparisons(scored)[0].verdict.startswith("No difference shown")


def test_the_order_of_results_changes_nothing_but_the_order_of_arms_and_seeds() -> None:
    scored = list(run({"frozen": [90, 80, 40], "fine_tune": [90, 60, 10]}, (0, 1), EXAMPLES))
    by_fraction = sorted(scored, key=lambda each: (each[0].train_fraction, each[0].seed))
    assert by_fraction != scored
    assert comparisons(by_fraction) == comparisons(scored)
    assert summaries(by_fraction) == summaries(scored)
    assert verdict(by_fraction) == verdict(scored)


def test_one_arm_has_no_comparison() -> None:
    assert comparisons(run({"frozen": [40]})) == ()


@pytest.mark.parametrize("count", [1, 4])
def test_a_missing_or_repeated_result_is_refused(count: int) -> None:
    scored = list(run(THREE))
    for broken in (scored[count:], scored + scored[:count]):
        for function in (summaries, comparisons, verdict):
            with pytest.raises(ValueError, match="one result per fraction and seed"):
                function(broken)


def test_hits_of_different_lengths_are_refused() -> None:
    scored = list(run({"frozen": [40], "fine_tune": [10]}))
    scored[0] = (scored[0][0], scored[0][1][1:])
    with pytest.raises(ValueError, match="different lengths"):
        comparisons(scored)


# --- verdict -----------------------------------------------------------------------------------------------------


def test_the_verdict_of_the_quickstart() -> None:
    assert verdict(run(THREE, (0,))) == (
        "Transfer learning helps: with 1,000 training examples fine_tune reaches 97.5% test accuracy, "
        "27.5 points above scratch (95% interval +23.0 to +31.7, p < 0.001). "
        "fine_tune is better than frozen: +7.5 points of test accuracy (95% interval +4.8 to +10.1, p < 0.001). "
        "This is one seed (0): it speaks of single models, and other seeds may differ."
    )


def test_the_verdict_over_seeds_and_fractions_says_from_how_many_examples_on() -> None:
    errors = {"scratch": [200, 160, 120], "frozen": [80, 60, 40], "fine_tune": [80, 30, 10]}
    scored = run(errors, examples=EXAMPLES)
    few, many = (uncertainty(scored, "fine_tune", "scratch", size) for size in (50, 1000))
    assert verdict(scored) == (
        f"Transfer learning helps: with 50 training examples fine_tune reaches 79.8% test accuracy, 30.0 points above "
        f"scratch {few}; with 1,000 training examples fine_tune reaches 97.2% test accuracy, 27.5 points above scratch "
        f"{many}. fine_tune is better than frozen from 200 training examples on; with 1,000 by 7.5 points of test "
        f"accuracy {uncertainty(scored, 'fine_tune', 'frozen')}; with fewer, no difference is shown. "
        "All figures are over 3 seeds."
    )


@pytest.mark.parametrize(
    ("frozen", "tuned", "start", "end"),
    [
        pytest.param(
            [80, 60, 40], [50, 30, 10],
            "fine_tune is better than frozen at every number of training examples from 50 to 1,000, with 1,000 by 7.5 ",
            "p < 0.001).", id="everywhere",
        ),
        pytest.param(
            [80, 60, 40], [80, 60, 10],
            "fine_tune is better than frozen with 1,000 training examples, the most that were tried, by 7.5 points of ",
            "; with fewer, no difference is shown.", id="at the largest only",
        ),
        pytest.param(
            [50, 60, 40], [80, 30, 10],
            "fine_tune is better than frozen from 200 training examples on; with 1,000 by 7.5 points",
            "; with fewer, frozen is better.", id="frozen is better with few",
        ),
        pytest.param(
            [80, 60, 40], [50, 60, 10],
            "fine_tune is better than frozen with 1,000 training examples, the most that were tried, by",
            "; with fewer, that is not shown throughout.", id="a gap between",
        ),
        pytest.param(
            [50, 30, 10], [80, 60, 40],
            "frozen is better than fine_tune at every number of training examples from 50 to 1,000, with 1,000 by 7.5 ",
            "points of test accuracy (95% interval +4.9 to +10.0, p < 0.001).", id="frozen everywhere",
        ),
        pytest.param(
            [80, 60, 40], [80, 60, 40],
            "No difference shown between fine_tune and frozen with 1,000 training examples: +0.0 points of test ",
            "p = 1.000).", id="nowhere",
        ),
        pytest.param(
            [30, 90, 40], [80, 60, 38],
            "No difference shown between fine_tune and frozen with 1,000 training examples: +0.5 points of test ",
            "; fine_tune is better with 200; frozen is better with 50.", id="not at the largest",
        ),
    ],
)  # fmt: skip
def test_from_how_many_examples_on_fine_tuning_is_better(
    frozen: list[int], tuned: list[int], start: str, end: str
) -> None:
    found = verdict(run({"frozen": frozen, "fine_tune": tuned}, examples=EXAMPLES))
    first, rest = found.split("). ", 1)
    sentence, last = rest.rsplit(". ", 1)
    assert first.startswith("With 50 training examples fine_tune reaches ")
    assert sentence.startswith(start)
    assert f"{sentence}.".endswith(end)
    assert last == "All figures are over 3 seeds."


@pytest.mark.parametrize(
    ("scratch", "frozen", "opening"),
    [
        ([120, 90], [40, 20], "Transfer learning helps: with 50 training examples frozen reaches"),
        ([40, 20], [120, 90], "Transfer learning does harm: with 50 training examples frozen reaches"),
        ([40, 20], [38, 22], "No difference shown between transfer learning and training from scratch: with 50"),
        ([120, 20], [40, 22], "What transfer learning does depends on the number of training examples: with 50"),
        ([120, 20], [40, 60], "What transfer learning does depends on the number of training examples: with 50"),
    ],
)
def test_the_opening_says_what_transfer_learning_does(scratch: list[int], frozen: list[int], opening: str) -> None:
    found = verdict(run({"scratch": scratch, "frozen": frozen}, examples=(50, 1000)))
    assert found.startswith(opening)
    assert ("below scratch" in found) == any(a < b for a, b in zip(scratch, frozen, strict=True))
    assert found.count("shows no difference") == sum(abs(a - b) < 3 for a, b in zip(scratch, frozen, strict=True))
    assert found.count("). ") == 1 or found.count("difference. ") == 1


def test_validation_chooses_the_arm_that_is_held_against_the_baseline_whatever_the_test_split_says() -> None:
    found = verdict(run(THREE, validation={"frozen": 0.95, "fine_tune": 0.9}))
    assert "frozen reaches 89.8% test accuracy, 20.0 points above scratch" in found


def test_without_the_baseline_the_verdict_says_how_accurate_the_arm_is() -> None:
    found = verdict(run({"frozen": [40], "fine_tune": [10]}))
    assert found.startswith("With 1,000 training examples fine_tune reaches 97.2% test accuracy (95% interval 9")
    assert "fine_tune is better than frozen: +7.5 points" in found


@pytest.mark.parametrize("arm", ["scratch", "frozen", "fine_tune"])
def test_one_arm_has_its_accuracy_as_verdict(arm: str) -> None:
    assert verdict(run({arm: [40]}, (0,))) == (
        f"With 1,000 training examples {arm} reaches 90.0% test accuracy (95% interval 86.7% to 92.6%). "
        "This is one seed (0): it speaks of single models, and other seeds may differ."
    )


def test_two_seeds_are_called_few() -> None:
    assert verdict(run(THREE, (0, 1))).endswith(
        "All figures are over 2 seeds, which tell little of others: five narrow the intervals."
    )


# --- names and records -------------------------------------------------------------------------------------------


def test_labels_name_what_tells_results_apart() -> None:
    one = result("frozen")
    assert labels([one])(one) == "frozen"
    assert labels([one, result("frozen", seed=2)])(one) == "frozen (seed 0)"
    assert labels([one, result("frozen", 50)])(one) == "frozen (fraction 1)"
    assert labels([one, result("frozen", 50, 2)])(result("frozen", 50, 2)) == "frozen (fraction 0.05, seed 2)"


def test_a_manifest_holds_them_and_agrees_with_its_schema() -> None:
    scored = run({arm: errors * 2 for arm, errors in THREE.items()}, (0, 1), (50, 1000))
    record = manifest(
        [],
        results=[each for each, _ in scored],
        summaries=summaries(scored),
        comparisons=comparisons(scored),
        verdict=verdict(scored),
    )
    assert Manifest.model_validate_json(record.to_json()) == record
    jsonschema.validate(record.model_dump(mode="json"), json_schema())
