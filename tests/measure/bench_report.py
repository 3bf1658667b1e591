"""What ``bench`` measured, as Markdown: pure functions from figures to text.

python -m tests.measure.bench_report output/bench/figures.json    prints the report of a finished ``bench`` anew
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

# The largest share by which the machine's speed may change around runs that are compared.
STEADY = 0.10
# How many times as fast as tuned Keras the job is, at least: a ratio of each arm's compared seconds, and of whole
# processes, where the job's start-up and export weigh as much as a frozen arm.
FASTER = (
    ("frozen", "seconds", 5.0),
    ("fine_tune", "seconds", 1.8),
    ("frozen", "wall", 3.0),
    ("fine_tune", "wall", 1.5),
)
TOGETHER = 1.3
REST = 20  # seconds
SECOND_SEED = (("frozen", 0.02), ("fine_tune", 0.55))
STEP_RATE = 0.95
SLOW = "\\*"


@dataclass(frozen=True)
class Run:
    """What one process was measured at, that trained and evaluated one arm.

    wall: seconds from its start to its end. seconds: those of them that are compared. peak: its largest resident
    memory, in bytes. accuracy: on the ``examples`` of the test split. interval: 95% interval of it; the job's only.
    """

    wall: float
    seconds: float
    peak: int
    accuracy: float
    examples: int
    interval: tuple[float, float] | None = None

    @property
    def rest(self) -> float:
        """Seconds outside all that is compared: start-up, planning, export and publishing."""
        return self.wall - self.seconds


@dataclass(frozen=True)
class Stretch:
    """Processes of one arm and round, one right after the other.

    round: from 0. runs: by program, in the order in which they ran. speeds: the machine's, in GFLOP/s, before, between
    and after them. beside: those around the pair that the runs are compared with, where that was measured before.
    """

    round: int
    arm: str
    runs: dict[str, Run]
    speeds: tuple[float, ...]
    beside: tuple[float, ...] = ()

    @property
    def change(self) -> float:
        """The share by which the highest of the speeds is above the lowest."""
        speeds = self.speeds + self.beside
        return max(speeds) / min(speeds) - 1

    @property
    def slow(self) -> bool:
        """Whether the speed changed by more than is allowed."""
        return self.change > STEADY

    @property
    def name(self) -> str:
        """Round, arm and programs in words."""
        return f"round {self.round + 1} of {self.arm}: {' and '.join(self.runs)}"


@dataclass(frozen=True)
class Bound:
    """One sentence that must hold, with its figure in each round. The median is held against the limit.

    mark: stands behind figures from a stretch that was slow.
    """

    sentence: str
    values: tuple[float, ...]
    limit: float
    at_least: bool = False
    form: str = "{:.1f}"
    mark: str = ""

    @property
    def holds(self) -> bool:
        """Whether it was measured and the median is on the right side."""
        if not self.values:
            return False
        return median(self.values) >= self.limit if self.at_least else median(self.values) < self.limit

    def line(self) -> str:
        """Return the sentence, what was measured, and the verdict."""
        if not self.values:
            return f"- {self.sentence}: not measured"
        return f"- {self.sentence}: {spread(self.values, self.form)}{self.mark}: {'yes' if self.holds else 'MISSED'}"


def spread(values: Sequence[float], form: str = "{:.1f}") -> str:
    """Return the median, and the least and the largest where there are several."""
    middle = form.format(median(values))
    return f"{middle} ({form.format(min(values))} - {form.format(max(values))})" if len(values) > 1 else middle


def kept(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Return what counts: of a stretch that was repeated, the last."""
    return list({(one.round, one.arm, frozenset(one.runs)): one for one in stretches}.values())


def pairs(stretches: Sequence[Stretch], arm: str, one: str, other: str) -> list[tuple[Run, Run]]:
    """Return the runs of two programs in each round that has both."""
    rounds: defaultdict[int, dict[str, Run]] = defaultdict(dict)
    for stretch in kept(stretches):
        if stretch.arm == arm:
            rounds[stretch.round] |= stretch.runs
    return [(runs[one], runs[other]) for runs in rounds.values() if one in runs and other in runs]


def _arms(stretches: Sequence[Stretch]) -> list[str]:
    return list(dict.fromkeys(stretch.arm for stretch in stretches))


def _runs(stretches: Sequence[Stretch], arm: str, program: str) -> list[Run]:
    return [one.runs[program] for one in kept(stretches) if one.arm == arm and program in one.runs]


def _mark(stretches: Sequence[Stretch], arms: Sequence[str], program: str) -> str:
    slow = any(one.slow and one.arm in arms and program in one.runs for one in kept(stretches))
    return SLOW if slow else ""


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def times(stretches: Sequence[Stretch]) -> str:
    """Return two rows for each arm: its compared seconds, and whole processes; ratios are formed within rounds."""
    columns = ["arm", "job, s", "tuned Keras, s", "tuned / job", "rounds"]
    columns += ["article's Keras, s", "article / job", "rounds"]
    rows = []
    for arm in _arms(stretches):
        for name, figure in ((arm, "seconds"), (f"{arm}, whole process", "wall")):
            job = median(map(attrgetter(figure), _runs(stretches, arm, "job")))
            beside = [cell for plain in ("tuned", "article") for cell in _beside(stretches, arm, plain, figure)]
            rows.append([name, f"{job:.1f}", *beside])
    return _markdown(columns, rows)


def _beside(stretches: Sequence[Stretch], arm: str, plain: str, figure: str) -> list[str]:
    of = attrgetter(figure)
    found = [(of(job), of(run)) for job, run in pairs(stretches, arm, "job", plain)]
    if not found:
        return ["", "", "0"]
    mark = _mark(stretches, [arm], plain)
    ratios = spread([run / job for job, run in found])
    return [f"{median(run for _, run in found):.1f}", f"{ratios}{mark}", str(len(found))]


def results(stretches: Sequence[Stretch]) -> str:
    """Return a row for each arm with the test accuracies and the peak memory of every program."""
    programs = ("job", "tuned", "article")
    rows = []
    for arm in _arms(stretches):
        found = [_runs(stretches, arm, program) for program in programs]
        examples = sorted({run.examples for runs in found for run in runs})
        low, high = (median(run.interval[end] for run in found[0] if run.interval) for end in (0, 1))
        accuracies = [f"{median(run.accuracy for run in runs):.3f}" if runs else "" for runs in found]
        peaks = [f"{median(run.peak for run in runs) / 1e9:.2f}" if runs else "" for runs in found]
        accuracies[0] += f" ({low:.3f} - {high:.3f})"
        rows.append([arm, *accuracies, " or ".join(f"{number:,}" for number in examples), *peaks])
    columns = ["arm", "test accuracy: job", "tuned", "article", "of test photos"]
    return _markdown([*columns, "peak memory, GB: job", "tuned", "article"], rows)


def rates(step_rate: dict[str, dict[str, float]]) -> str:
    """Return the table of step rates, in examples per second."""
    columns = ["arm", "bare step, examples/s", "training, examples/s", "share"]
    found = [[arm, f"{r['bare']:.0f}", f"{r['training']:.0f}", f"{r['share']:.1%}"] for arm, r in step_rate.items()]
    return _markdown(columns, found)


def speeds(stretches: Sequence[Stretch]) -> str:
    """Return how the machine's speed changed, how much was repeated for it, and what is marked in the table."""
    counted = kept(stretches)
    every = [speed for stretch in stretches for speed in stretch.speeds]
    again = len(stretches) - len(counted)
    text = (
        f"The machine's own speed, {len(every)} times before and after processes: {spread(every, '{:.0f}')} GFLOP/s. "
    )
    text += f"Repeated, since it changed by more than {STEADY:.0%} meanwhile: {again} of {len(stretches)} stretches.\n"
    slow = "; ".join(f"{one.name}, by {one.change:.0%}" for one in counted if one.slow)
    return f"{text}\n{SLOW} It changed at the last try too in {slow}.\n" if slow else text


def bounds(stretches: Sequence[Stretch], step_rate: dict[str, dict[str, float]] | None) -> list[Bound]:
    """Return everything that the job promises of its speed, with what was measured."""
    found = []
    for arm, figure, limit in FASTER:
        of: Callable[[Run], float] = attrgetter(figure)
        ratios = tuple(of(run) / of(job) for job, run in pairs(stretches, arm, "job", "tuned"))
        what = arm if figure == "seconds" else f"{arm} as a whole process"
        sentence, mark = f"{what} at least {limit:g} times faster than tuned Keras", _mark(stretches, [arm], "tuned")
        found.append(Bound(sentence, ratios, limit, at_least=True, mark=mark))
    sentence = f"the three arms together at least {TOGETHER:g} times faster than tuned Keras"
    full = _full(stretches)
    mark = _mark(full, _arms(full), "tuned")
    found.append(Bound(sentence, _together(full), TOGETHER, at_least=True, mark=mark))
    for arm in _arms(stretches):
        both = pairs(stretches, arm, "job", "tuned")
        width = median(job.interval[1] - job.interval[0] for job, _ in both if job.interval)
        gains = tuple(job.accuracy - run.accuracy for job, run in both)
        sentence = f"{arm}'s test accuracy minus tuned Keras's, no lower than minus its interval's width ({width:.3f})"
        found.append(Bound(sentence, gains, -width, at_least=True, form="{:+.3f}"))
    for arm, rate in (step_rate or {"all arms": {}}).items():
        share = (rate["share"],) if rate else ()
        sentence = f"{arm}: share of the bare step rate reached, at least {STEP_RATE:.0%}"
        found.append(Bound(sentence, share, STEP_RATE, at_least=True, form="{:.1%}"))
    rest = tuple(run.rest for arm in _arms(stretches) for run in _runs(stretches, arm, "job"))
    found.append(Bound(f"start-up, planning, export and publishing of one result under {REST} s", rest, REST))
    for arm, limit in SECOND_SEED:
        shares = tuple(seed.seconds / run.seconds for seed, run in pairs(stretches, arm, "second seed", "tuned"))
        sentence, mark = (
            f"a second seed of {arm} under {limit:.0%} of tuned Keras's",
            _mark(stretches, [arm], "second seed"),
        )
        found.append(Bound(sentence, shares, limit, form="{:.1%}", mark=mark))
    return found


def _full(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Return the pairs of job and tuned Keras in those rounds that have all three arms."""
    both = [one for one in kept(stretches) if {"job", "tuned"} <= one.runs.keys()]
    arms = Counter(one.round for one in both)
    return [one for one in both if arms[one.round] == 3]


def _together(full: Sequence[Stretch]) -> tuple[float, ...]:
    """Return tuned Keras's seconds by the job's, all arms together, in each round."""
    return tuple(
        sum(one.runs["tuned"].seconds for one in full if one.round == number)
        / sum(one.runs["job"].seconds for one in full if one.round == number)
        for number in sorted({one.round for one in full})
    )


def report(title: str, stretches: Sequence[Stretch], step_rate: dict[str, dict[str, float]] | None) -> str:
    """Return all of it as Markdown."""
    lines = "".join(f"{bound.line()}\n" for bound in bounds(stretches, step_rate))
    found = [f"{title}\n", times(stretches), speeds(stretches), results(stretches)]
    return "\n".join([*found, *([rates(step_rate)] if step_rate else []), lines])


def stretches_of(figures: Sequence[dict[str, Any]]) -> list[Stretch]:
    """Return the stretches that ``bench`` wrote as JSON."""
    found = []
    for one in figures:
        runs = {
            program: Run(**run | {"interval": tuple(run["interval"]) if run["interval"] else None})
            for program, run in one["runs"].items()
        }
        found.append(Stretch(one["round"], one["arm"], runs, tuple(one["speeds"]), tuple(one["beside"])))
    return found


def main(path: str) -> None:
    figures = json.loads(Path(path).read_text(encoding="utf-8"))
    sys.stdout.write(report(figures["title"], stretches_of(figures["stretches"]), figures["step_rate"]))


if __name__ == "__main__":
    main(sys.argv[1])
