"""How often the intervals cover the truth, and how often equal arms are called different, on simulated outcomes.

``python -m tests.measure.simulations`` prints the table; test_statistics.py has the bounds. Whether a model gets a
photo right is drawn from a probit model: a normal effect of the seed, one of the photo that all models share, one of
the photo on an arm, and one of each model on each photo, of standard deviation 1. An arm's true accuracy is then known:
it is Phi(level / sqrt(1 + the variances)).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy import special

from job.results.statistics import accuracy_interval, accuracy_interval_over_seeds, paired_test, paired_test_over_seeds

DRAWS = 2000
# three standard errors of a share of 0.95 of 2,000 draws
MONTE_CARLO = 3 * (0.95 * 0.05 / DRAWS) ** 0.5
Hits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class World:
    """Arms with these true accuracies, and what varies. Effects are standard deviations on the probit scale."""

    accuracies: tuple[float, ...]
    photos: int
    seeds: int
    seed_effect: float
    photo_effect: float = 1.2
    photo_on_arm_effect: float = 0.7

    def draws(self, count: int = DRAWS, at_once: int = 250) -> Iterator[tuple[Hits, npt.NDArray[np.floating]]]:
        """Yield per draw the hits [arms, seeds, photos], and the true accuracy of each model [arms, seeds]."""
        generator = np.random.default_rng(20250102)
        arms = len(self.accuracies)
        of_photos = self.photo_effect**2 + self.photo_on_arm_effect**2 + 1
        levels = special.ndtri(self.accuracies) * (of_photos + self.seed_effect**2) ** 0.5

        def normal(*shape: int) -> npt.NDArray[np.float32]:
            return generator.standard_normal((at_once, *shape), dtype=np.float32)

        for _ in range(count // at_once):
            level_of = levels[:, np.newaxis, np.newaxis].astype(np.float32) + self.seed_effect * normal(
                arms, self.seeds, 1
            )
            score = normal(arms, self.seeds, self.photos)
            score += self.photo_on_arm_effect * normal(arms, 1, self.photos)
            score += self.photo_effect * normal(1, 1, self.photos)
            score += level_of
            yield from zip(score > 0, special.ndtr(level_of[..., 0] / of_photos**0.5), strict=True)


def share(happened: Iterable[bool]) -> float:
    return float(np.mean(list(happened)))


def within(interval: tuple[float, float], truth: float) -> bool:
    return interval[0] <= truth <= interval[1]


def coverage_of_a_model(world: World) -> float:
    """Return how often the interval of one seed's model holds that model's accuracy."""
    interval = cache(accuracy_interval)
    return share(
        within(interval(int(hits[0, 0].sum()), world.photos), float(truth[0, 0])) for hits, truth in world.draws()
    )


def coverage_of_an_arm(world: World, count: int = DRAWS) -> float:
    """Return how often the interval over all seeds holds the accuracy of the first arm."""
    return share(within(accuracy_interval_over_seeds(hits[0]), world.accuracies[0]) for hits, _ in world.draws(count))


def coverage_of_a_difference(world: World) -> tuple[float, float]:
    """Return how often the interval over all seeds holds the true difference of two arms, and its median width."""
    first, second = world.accuracies
    intervals = [paired_test_over_seeds(hits[0], hits[1]).interval for hits, _ in world.draws()]
    width = float(np.median([high - low for low, high in intervals]))
    return share(within(interval, first - second) for interval in intervals), width


def called_different(world: World) -> float:
    """Return how often a difference is shown between two arms, over all seeds."""
    return share(paired_test_over_seeds(hits[0], hits[1]).shows for hits, _ in world.draws())


def called_different_by_one_seed(world: World, count: int = DRAWS) -> float:
    """Return how often McNemar's test shows a difference between two arms' models of the first seed."""
    shows: dict[tuple[int, int], bool] = {}  # the test depends on no more than these counts, and takes a millisecond
    found = []
    for hits, _ in world.draws(count):
        a, b = hits[:, 0]
        counts = int((a & ~b).sum()), int((b & ~a).sum())
        if counts not in shows:
            shows[counts] = paired_test(a, b).shows
        found.append(shows[counts])
    return share(found)


def same_arm(world: World) -> World:
    """Return the world in which both arms are one: no photo is easier for one of them."""
    return replace(world, accuracies=world.accuracies[:1] * 2, photo_on_arm_effect=0.0)


def row(world: World) -> list[str]:
    one, other = world.accuracies
    spread = float(np.mean([truth[0].var(ddof=1) for _, truth in world.draws()])) ** 0.5
    covered, width = coverage_of_a_difference(world)
    same = same_arm(world)
    return [
        *(f"{one:g}, {other:g}", f"{world.photos:,}", f"{world.seeds}", f"{100 * spread:.1f}"),
        *(f"{coverage_of_a_model(world):.1%}", f"{coverage_of_an_arm(world):.1%}", f"{covered:.1%}"),
        *(f"{100 * width:.1f}", f"{called_different(same):.1%}", f"{called_different_by_one_seed(same):.1%}"),
    ]


LEGEND = """
accuracy: true, of two arms. spread: standard deviation of a model's true accuracy between seeds, in points.
model, arm, difference: how often the 95% interval covers the accuracy of one seed's model, of the first arm over seeds,
and the difference of the arms over seeds (width: its median, in points). same, McNemar: how often two sets of runs of
one arm with different seeds are called different, over seeds and by McNemar's test on the first seed.
"""


def main() -> None:
    columns = ("accuracy", "photos", "seeds", "spread", "model", "arm", "difference", "width", "same", "McNemar")
    sys.stdout.write(f"{DRAWS:,} draws a line; three standard errors of a share of 95% are {MONTE_CARLO:.1%}\n\n")
    sys.stdout.write("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|\n")
    for accuracies, photos in product(((0.97, 0.95), (0.8, 0.75)), (100, 1000)):
        for seeds, seed_effect in product((2, 3, 5), (0.0, 0.1, 0.3)):
            sys.stdout.write("| " + " | ".join(row(World(accuracies, photos, seeds, seed_effect))) + " |\n")
            sys.stdout.flush()
    sys.stdout.write(LEGEND)


if __name__ == "__main__":
    main()
