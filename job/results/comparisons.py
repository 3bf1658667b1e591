"""What a run's results say together: summaries over seeds, comparisons of arms, and the run's answer in words.

All functions take every result of a run with its hits, bool [test examples]: whether each test example was predicted
right, in one order for all. Every arm has to have the same fractions and seeds; ValueError says where one does not.

Nothing here selects a model: where one of several arms has to be named, validation accuracy decides. p-values are not
corrected for the number of comparisons, since each answers a question of its own, asked beforehand. From how many
training examples on one arm is better needs no correction either: fractions are tested from the largest down until the
first that shows nothing, a fixed sequence, which keeps the chance of any false claim in it at 5% (Maurer, Hothorn and
Lehmacher 1995).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from job.manifest import Comparison, Result, Summary
from job.results.statistics import (
    WILSON,
    WILSON_OVER_SEEDS,
    Hits,
    PairedTest,
    accuracy_interval_over_seeds,
    paired_test,
    paired_test_over_seeds,
)

Scored = Sequence[tuple[Result, Hits]]
BASELINE = "scratch"
FROZEN = "frozen"
FINE_TUNED = "fine_tune"


@dataclass(frozen=True)
class _Cell:
    """All seeds of one arm at one fraction: their results, and their hits [seeds, test examples]."""

    results: tuple[Result, ...]
    hits: Hits

    @property
    def arm(self) -> str:
        return self.results[0].arm

    @property
    def examples(self) -> str:
        """The number of training examples, as text."""
        return f"{self.results[0].train_examples:,}"

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(result.seed for result in self.results)

    @property
    def rank(self) -> tuple[float, float]:
        """Sorts the best on validation first: by accuracy, ties by loss."""
        validation = [result.metrics.validation for result in self.results]
        return -sum(each.accuracy for each in validation), sum(each.loss for each in validation)

    @property
    def interval(self) -> str:
        """The interval of the test accuracy."""
        low, high = accuracy_interval_over_seeds(self.hits)
        return f"(95% interval {low:.1%} to {high:.1%})"

    def against(self, other: _Cell) -> PairedTest:
        """Return the test of this minus the other: over the seeds, or of the two models where there is one seed."""
        if len(self.results) == 1:
            return paired_test(self.hits[0], other.hits[0])
        return paired_test_over_seeds(self.hits, other.hits)


def summaries(scored: Scored) -> tuple[Summary, ...]:
    """Return a summary of all seeds of each arm at each fraction; fractions ascend, arms in their order."""
    found = []
    for cell in itertools.chain.from_iterable(_cells(scored)):
        costs, own_costs = [result.cost for result in cell.results], [own_cost(result) for result in cell.results]
        found.append(
            Summary(
                arm=cell.arm,
                train_fraction=cell.results[0].train_fraction,
                train_examples=cell.results[0].train_examples,
                seeds=cell.seeds,
                test_accuracy=float(cell.hits.mean()),
                interval=accuracy_interval_over_seeds(cell.hits),
                method=WILSON if len(cell.results) == 1 else WILSON_OVER_SEEDS,
                seconds=sum(result.seconds.total for result in cell.results) / len(cell.results),
                cost=_mean(costs),
                own_seconds=_mean([own_seconds(result) for result in cell.results]),
                own_cost=_mean(own_costs),
            )
        )
    return tuple(found)


def own_seconds(result: Result) -> float:
    """Return the seconds that a result took, without what it shares with others: decoding, passes of frozen layers.

    The record has them at the first result that needed them.
    """
    seconds = result.seconds
    return max(0.0, seconds.total - seconds.data - seconds.features)


def own_cost(result: Result) -> float | None:
    """Return the cost of :func:`own_seconds`; None where there is no price."""
    if result.cost is None or not result.seconds.total:
        return result.cost
    return result.cost * own_seconds(result) / result.seconds.total


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where a value is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def comparisons(scored: Scored) -> tuple[Comparison, ...]:
    """Compare every two arms at each fraction.

    With several seeds a fraction has first each pair of arms over all seeds, then each pair of each seed's models.
    ``better`` is the arm with the higher test accuracy; where both have the same, the one that comes first.
    """
    several_fractions = len({result.train_fraction for result, _ in scored}) > 1
    found = []
    for cells in _cells(scored):
        for seeds in _selections(cells[0].seeds):
            for one, other in itertools.combinations(cells, 2):
                better, worse = sorted((_at(one, seeds), _at(other, seeds)), key=lambda cell: -int(cell.hits.sum()))
                test = better.against(worse)
                names, shared = (better.arm, worse.arm), f"over {len(seeds)} seeds"
                if len(seeds) == 1:
                    names, shared = (f"{better.arm}'s model", f"{worse.arm}'s"), f"at seed {seeds[0]}"
                told = [f"with {better.examples} training examples"] * several_fractions + [shared]
                found.append(
                    Comparison(
                        train_fraction=better.results[0].train_fraction,
                        seeds=seeds,
                        better=better.arm,
                        worse=worse.arm,
                        difference=test.difference,
                        interval=test.interval,
                        p_value=test.p_value,
                        method=test.method,
                        verdict=test.verdict(*names, " ".join(told)),
                    )
                )
    return tuple(found)


def verdict(scored: Scored) -> str:
    """Return the run's answer in one to three sentences, for a person who reads nothing else.

    How much transfer learning helps (without the baseline: how accurate the arm is that validation prefers); whether
    fine-tuning beats the frozen backbone, and from how many training examples on; and how many seeds say so.
    """
    grid = _cells(scored)
    sentences = [_transfer(grid)]
    if all({FROZEN, FINE_TUNED} <= {cell.arm for cell in cells} for cells in grid):
        sentences.append(_fine_tuning(grid))
    return " ".join([*sentences, _seeds(grid[0][0].seeds)])


def labels(results: Sequence[Result]) -> Callable[[Result], str]:
    """Return what names a result: its arm, with the fraction and the seed where ``results`` have several."""
    fractions = len({result.train_fraction for result in results}) > 1
    seeds = len({result.seed for result in results}) > 1

    def label(result: Result) -> str:
        told = [f"fraction {result.train_fraction:g}"] * fractions + [f"seed {result.seed}"] * seeds
        return f"{result.arm} ({', '.join(told)})" if told else result.arm

    return label


def _cells(scored: Scored) -> list[list[_Cell]]:
    """Return the cells of each fraction, ascending; arms and seeds in the order in which they first come."""
    by_key = {(result.train_fraction, result.arm, result.seed): (result, hits) for result, hits in scored}
    fractions, arms, seeds = (list(dict.fromkeys(values)) for values in zip(*by_key, strict=True))
    wanted = [[[(fraction, arm, seed) for seed in seeds] for arm in arms] for fraction in sorted(fractions)]
    missing = [key for cells in wanted for keys in cells for key in keys if key not in by_key]
    if missing or len(by_key) < len(scored):
        raise ValueError(f"every arm needs one result per fraction and seed: {len(scored)} given, missing {missing}")
    if len({len(hits) for _, hits in scored}) > 1:
        raise ValueError(f"hits of different lengths: {sorted({len(hits) for _, hits in scored})}")
    return [
        [_Cell(tuple(by_key[key][0] for key in keys), np.stack([by_key[key][1] for key in keys])) for keys in cells]
        for cells in wanted
    ]


def _selections(seeds: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return all seeds together, where there are several, and then each."""
    return [seeds] * (len(seeds) > 1) + [(seed,) for seed in seeds]


def _at(cell: _Cell, seeds: tuple[int, ...]) -> _Cell:
    chosen = [cell.seeds.index(seed) for seed in seeds]
    return _Cell(tuple(cell.results[k] for k in chosen), cell.hits[chosen])


def _named(cells: Sequence[_Cell]) -> dict[str, _Cell]:
    return {cell.arm: cell for cell in cells}


def _ends(grid: list[list[_Cell]]) -> list[list[_Cell]]:
    """Return the smallest and the largest fraction."""
    return [grid[0], grid[-1]] if len(grid) > 1 else grid


def _transfer(grid: list[list[_Cell]]) -> str:
    """Say how much the pretrained arm that validation prefers gains on the baseline, at few and at all examples."""
    clauses, shown = [], set()
    for cells in _ends(grid):
        baseline = _named(cells).get(BASELINE)
        pretrained = [cell for cell in cells if cell is not baseline]
        best = min(pretrained or cells, key=lambda cell: cell.rank)
        clause = f"with {best.examples} training examples {best.arm} reaches {best.hits.mean():.1%} test accuracy"
        if baseline is None or not pretrained:
            clauses.append(f"{clause} {best.interval}")
            continue
        test = best.against(baseline)
        side = "below" if test.difference < 0 else "above"
        clause += f", {100 * abs(test.difference):.1f} points {side} {BASELINE} {test.uncertainty}"
        clauses.append(clause if test.shows else f"{clause}, which shows no difference")
        shown.add((test.difference > 0) - (test.difference < 0) if test.shows else 0)
    openings = {
        (1,): "Transfer learning helps: ",
        (0,): "No difference shown between transfer learning and training from scratch: ",
        (-1,): "Transfer learning does harm: ",
        (): "",
    }
    text = openings.get(tuple(shown), "What transfer learning does depends on the number of training examples: ")
    text += "; ".join(clauses)
    return text[0].upper() + text[1:] + "."


def _fine_tuning(grid: list[list[_Cell]]) -> str:
    """Say whether fine-tuning or the frozen backbone is better, and from how many training examples on."""
    pairs = [(_named(cells)[FINE_TUNED], _named(cells)[FROZEN]) for cells in grid]
    tests = [tuned.against(frozen) for tuned, frozen in pairs]
    signs = [((test.difference > 0) - (test.difference < 0)) * test.shows for test in tests]
    better, worse = (FROZEN, FINE_TUNED) if tests[-1].difference < 0 else (FINE_TUNED, FROZEN)
    tuned, frozen = pairs[-1]
    largest = frozen.against(tuned) if better == FROZEN else tests[-1]
    if len(grid) == 1:
        return largest.verdict(better, worse)
    if not largest.shows:
        others = [
            f"{name} is better with {' and '.join(pairs[k][0].examples for k in range(len(grid)) if signs[k] == sign)}"
            for name, sign in ((FINE_TUNED, 1), (FROZEN, -1))
            if sign in signs
        ]
        sentence = largest.verdict(better, worse, f"with {tuned.examples} training examples")
        return "; ".join([sentence.removesuffix("."), *others]) + "."
    first = next(k for k in range(len(grid)) if set(signs[k:]) == {signs[-1]})
    gain = f"{100 * largest.difference:.1f} points of test accuracy {largest.uncertainty}"
    smallest, start = pairs[0][0].examples, pairs[first][0].examples
    since = f"from {start} training examples on; with {tuned.examples} by"
    if first == 0:
        since = f"at every number of training examples from {smallest} to {tuned.examples}, with {tuned.examples} by"
    elif first == len(grid) - 1:
        since = f"with {tuned.examples} training examples, the most that were tried, by"
    fewer = {
        frozenset[int](): "",
        frozenset({0}): "; with fewer, no difference is shown",
        frozenset({-signs[-1]}): f"; with fewer, {worse} is better",
    }.get(frozenset(signs[:first]), "; with fewer, that is not shown throughout")
    return f"{better} is better than {worse} {since} {gain}{fewer}."


def _seeds(seeds: tuple[int, ...]) -> str:
    if len(seeds) == 1:
        return f"This is one seed ({seeds[0]}): it speaks of single models, and other seeds may differ."
    if len(seeds) == 2:
        return "All figures are over 2 seeds, which tell little of others: five narrow the intervals."
    return f"All figures are over {len(seeds)} seeds."
