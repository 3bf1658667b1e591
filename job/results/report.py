"""report.html: one page that tells what a run found, made from its manifest alone and complete in itself."""

from __future__ import annotations

import base64
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

from job.arms import ARMS, about
from job.manifest import Comparison, Manifest, Result, Summary
from job.results import charts
from job.results.comparisons import own_cost, own_seconds
from job.results.formatting import SHOWN_CLASSES, Quotes, classes_shown, pointer, templates
from job.results.statistics import CALIBRATION_BINS

PHOTOS_PER_ARM = 12
SHOWN_EPOCHS = 12
SHOWN_DUPLICATES = 100
# One model's 95% interval on the test split: wider than this share, differences between arms are hard to show.
WIDE_INTERVAL = 0.1


@dataclass(frozen=True)
class Group:
    """All seeds of one (arm, train_fraction). style: the arm's place; place and places: JSON pointers."""

    arm: str
    style: int
    fraction: float
    results: tuple[Result, ...]
    places: tuple[str, ...]
    summary: Summary | None
    summary_place: str | None

    @property
    def of(self) -> str:
        """The places as ``data-of`` lists them."""
        return " ".join(self.places)

    @property
    def single(self) -> bool:
        """Whether one seed was trained."""
        return len(self.results) == 1

    @property
    def has_energy(self) -> bool:
        """Whether the device told of every seed what energy it took."""
        return all(result.energy_joules is not None for result in self.results)

    @property
    def has_cost(self) -> bool:
        """Whether every seed was priced."""
        return all(result.cost is not None for result in self.results)

    @property
    def own_seconds(self) -> float:
        """Mean over the seeds, without what results share."""
        return fmean(own_seconds(result) for result in self.results)

    @property
    def own_cost(self) -> float | None:
        """Likewise; null where a seed was not priced."""
        costs = [cost for result in self.results if (cost := own_cost(result)) is not None]
        return fmean(costs) if len(costs) == len(self.results) else None

    @property
    def examples(self) -> int:
        """Training examples of each seed; of old manifests, of the first."""
        return self.results[0].train_examples

    @property
    def accuracy(self) -> float:
        """Mean test accuracy over the seeds."""
        return self.summary.test_accuracy if self.summary else fmean(r.metrics.test.accuracy for r in self.results)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of ``accuracy``; null of several seeds that nobody summarised."""
        if self.summary:
            return self.summary.interval
        return self.results[0].metrics.test.accuracy_interval if self.single else None


@dataclass(frozen=True)
class Mistake:
    """A test photo that models of an arm got wrong. place: where the seed stands that was furthest off."""

    example_id: str
    place: str
    times: int
    probability: float


@dataclass(frozen=True)
class Pooled:
    """The predictions of all seeds whose top probability lies in one bin."""

    number: int
    examples: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Bought:
    """What a group's accuracy took. alone: seconds, with the work in full that it shares with other results.

    gain: mean test accuracy beyond that of always giving the commonest class, as a share. per_minute and
    per_money: points (hundredths) of it.
    """

    alone: float
    gain: float
    per_minute: float | None
    per_money: float | None


def groups_of(results: Sequence[Result], summaries: Sequence[Summary] = ()) -> list[Group]:
    """Return the groups, the smallest fraction first, arms in the order of their table."""
    arms = list(ARMS) + sorted({result.arm for result in results} - set(ARMS))
    members: dict[tuple[float, int], list[int]] = defaultdict(list)
    for index, result in enumerate(results):
        members[result.train_fraction, arms.index(result.arm)].append(index)
    summarised = {(summary.arm, summary.train_fraction): index for index, summary in enumerate(summaries)}
    groups = []
    for (fraction, style), indices in sorted(members.items()):
        summary = summarised.get((arms[style], fraction))
        groups.append(
            Group(
                arm=arms[style],
                style=style,
                fraction=fraction,
                results=tuple(results[index] for index in indices),
                places=tuple(pointer("results", index) for index in indices),
                summary=None if summary is None else summaries[summary],
                summary_place=None if summary is None else pointer("summaries", summary),
            )
        )
    return groups


def largest(groups: Iterable[Group]) -> list[Group]:
    """Return each arm's group at its largest fraction, in the order of the arms' table."""
    last = {group.arm: group for group in groups}
    return sorted(last.values(), key=lambda group: group.style)


def mistakes_of(group: Group) -> list[Mistake]:
    """Return the photos that most seeds listed as most wrong, of equally many the one with the lowest probability."""
    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for result, place in zip(group.results, group.places, strict=True):
        for rank, wrong in enumerate(result.most_wrong):
            found[wrong.example_id].append((wrong.label_probability, place + pointer("most_wrong", rank)))
    mistakes = [Mistake(name, min(seen)[1], len(seen), min(seen)[0]) for name, seen in found.items()]
    mistakes.sort(key=lambda mistake: (-mistake.times, mistake.probability, mistake.example_id))
    return mistakes[:PHOTOS_PER_ARM]


def wanted_photos(results: Sequence[Result]) -> tuple[str, ...]:
    """Return the ids of the test photos that the page shows, each once.

    Of each arm, at its largest fraction: those of its most wrong that most seeds share, at most 12.
    """
    return tuple(
        dict.fromkeys(mistake.example_id for group in largest(groups_of(results)) for mistake in mistakes_of(group))
    )


def baseline(results: Sequence[Result]) -> float | None:
    """Return the test accuracy of always giving the commonest class; null where there are no results."""
    if not results or not results[0].metrics.test.examples:
        return None
    test = results[0].metrics.test
    return max(row.support for row in test.per_class) / test.examples


def bought(group: Group, results: Sequence[Result], commonest: float, price: float | None) -> Bought:
    """Return what the group's accuracy took, had it been trained alone.

    Decoding, and the frozen layers' pass over the photos, are recorded at the result that needed them first. Here every
    arm bears them in full, the pass only if it has frozen layers. price: of an hour.
    """
    row = ARMS.get(group.arm)
    shared = sum(result.seconds.data for result in results)
    if row is None or row.pretrained:
        shared += sum(result.seconds.features for result in results)
    parts = (result.seconds for result in group.results)
    alone = shared + fmean(part.training + part.evaluation + part.export for part in parts)
    gain = group.accuracy - commonest
    money = alone / 3600 * price if price else 0
    points = 100 * gain
    return Bought(alone, gain, points / (alone / 60) if alone else None, points / money if money else None)


def pooled(group: Group) -> list[Pooled]:
    """Return the reliability bins of all seeds together, ascending."""
    members: dict[int, list[tuple[int, float, float]]] = defaultdict(list)
    for result in group.results:
        for part in result.metrics.test.reliability:
            number = min(int(part.confidence * CALIBRATION_BINS), CALIBRATION_BINS - 1)
            members[number].append((part.examples, part.confidence, part.accuracy))
    bins = []
    for number, parts in sorted(members.items()):
        total = sum(count for count, _, _ in parts)
        confidence = sum(count * value for count, value, _ in parts) / total
        accuracy = sum(count * value for count, _, value in parts) / total
        bins.append(Pooled(number, total, confidence, accuracy))
    return bins


def render(manifest: Manifest, photos: Mapping[str, bytes]) -> str:
    """Return the page: HTML that asks nothing of anywhere and needs no script.

    photos: example id -> JPEG, embedded as it is, so of the size that models see rather than a camera's; those of
    ``wanted_photos`` are used. A photo that is not there is told of in words. Equal arguments give equal pages.
    """
    page = templates()
    quotes = Quotes(manifest)
    groups = groups_of(manifest.results, manifest.summaries)
    ends = largest(groups)
    commonest = baseline(manifest.results)
    points = _points(groups)
    near = commonest is not None and charts.in_view(commonest, points)
    price = manifest.settings.get("cost_per_hour")
    fractions = sorted({group.fraction for group in groups}, reverse=True)
    overall = _overall(manifest.comparisons)
    numbers = itertools.count(1)
    return page.get_template("report.html.j2").render(
        m=manifest,
        q=quotes,
        about=about,
        groups=groups,
        ends=ends,
        fractions=fractions,
        baseline=commonest,
        baseline_in_view=near,
        accuracy_chart=_accuracy_chart(points, commonest if near else None),
        curves=_curves(groups),
        epochs=_epochs,
        classes={group.arm: classes_shown([r.metrics.test.confusion for r in group.results]) for group in ends},
        bins={group.arm: pooled(group) for group in ends},
        reliability_chart=_reliability_chart,
        mistakes={group.arm: mistakes_of(group) for group in ends},
        photo=_embedded(photos),
        bought=[None if commonest is None else bought(group, manifest.results, commonest, price) for group in groups],
        price=price,
        everywhere=[pointer("results", index) for index in range(len(manifest.results))],
        wide=_wide(ends),
        overall=overall,
        overall_at={size: [i for i in overall if manifest.comparisons[i].train_fraction == size] for size in fractions},
        seed_by_seed=[index for index in range(len(manifest.comparisons)) if index not in overall],
        absent=_absent(manifest.results),
        pointer=pointer,
        unique=lambda: f"table-{next(numbers)}",
        shown_duplicates=SHOWN_DUPLICATES,
        shown_classes=SHOWN_CLASSES,
    )


def _embedded(photos: Mapping[str, bytes]) -> Callable[[str], str | None]:
    def uri(example_id: str) -> str | None:
        encoded = photos.get(example_id)
        return None if encoded is None else "data:image/jpeg;base64," + base64.b64encode(encoded).decode()

    return uri


def _wide(groups: Sequence[Group]) -> str | None:
    """Return the result with the widest interval, if it is too wide to show much."""
    widths = [
        (high - low, place)
        for group in groups
        for place, result in zip(group.places, group.results, strict=True)
        for low, high in [result.metrics.test.accuracy_interval]
    ]
    width, place = max(widths, default=(0.0, ""))
    return place if width > WIDE_INTERVAL else None


def _absent(results: Sequence[Result]) -> list[int]:
    """Return the classes that no test photo is of."""
    rows = results[0].metrics.test.per_class if results else ()
    return [index for index, row in enumerate(rows) if row.support == 0]


def _overall(comparisons: Sequence[Comparison]) -> list[int]:
    """Return those over all seeds, the largest fraction first; the others compare one seed's models."""
    most = max((len(row.seeds) for row in comparisons), default=0)
    found = [index for index, row in enumerate(comparisons) if len(row.seeds) == most]
    return sorted(found, key=lambda index: -comparisons[index].train_fraction)


def _points(groups: Sequence[Group]) -> list[charts.Points]:
    arms = []
    for end in largest(groups):
        members = [group for group in groups if group.arm == end.arm]
        arms.append(
            charts.Points(
                name=end.arm,
                style=end.style,
                examples=[group.examples for group in members],
                accuracy=[group.accuracy for group in members],
                intervals=[group.interval for group in members],
            )
        )
    return arms


def _accuracy_chart(arms: Sequence[charts.Points], commonest: float | None) -> Markup:
    if not arms:
        return Markup("")
    several = any(len(arm.examples) > 1 for arm in arms)
    words = charts.Words(
        "accuracy",
        "Test accuracy by training examples" if several else "Test accuracy of each arm",
        f"One mark per arm ({', '.join(arm.name for arm in arms)}), with its 95% interval. The table beside it has the "
        "same figures.",
    )
    return charts.accuracy(arms, commonest, words)


def _curves(groups: Sequence[Group]) -> dict[tuple[str, float], Markup]:
    """Return the learning curves of every group that has a history."""
    trained = [group for group in groups if all(result.history for result in group.results)]
    accuracies = [
        value
        for group in trained
        for result in group.results
        for epoch in result.history
        for value in (epoch.train_accuracy, epoch.validation_accuracy)
    ]
    margin = 0.04 * (max(accuracies) - min(accuracies)) or 0.01 if accuracies else 0
    return {
        (group.arm, group.fraction): charts.learning_curves(
            [
                charts.Curve(
                    [epoch.train_loss for epoch in result.history],
                    [epoch.validation_loss for epoch in result.history],
                    [epoch.train_accuracy for epoch in result.history],
                    [epoch.validation_accuracy for epoch in result.history],
                )
                for result in group.results
            ],
            group.style,
            [
                after
                for after, (one, other) in enumerate(itertools.pairwise(group.results[0].history), 1)
                if one.phase != other.phase
            ],
            (min(accuracies) - margin, max(accuracies) + margin),
            charts.Words(
                f"curves-{number}",
                f"Learning curves of {group.arm}",
                "Loss and accuracy after each epoch, on the training and on the validation split. The table below has "
                "the means over the seeds.",
            ),
        )
        for number, group in enumerate(trained)
    }


def _epochs(group: Group) -> list[int]:
    """Return the indices of at most 12 epochs, evenly spaced, with the first and the last."""
    count = min(len(result.history) for result in group.results)
    shown = min(count, SHOWN_EPOCHS)
    return [round(index * (count - 1) / (shown - 1)) for index in range(shown)] if shown > 1 else list(range(count))


def _reliability_chart(group: Group, bins: Sequence[Pooled]) -> Markup:
    total = sum(part.examples for part in bins)
    words = charts.Words(
        f"reliability-{group.style}",
        f"Calibration of {group.arm}",
        "How often the model was right, by the probability that it gave. On the dotted line both agree. The "
        "table below has the same figures.",
    )
    return charts.reliability([(b.confidence, b.accuracy, b.examples / total) for b in bins], group.style, words)
