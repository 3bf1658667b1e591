"""Measure the job beside plain Keras, on the same photos, weights, epochs and batch size; about an hour on two cores.

    python -m tests.measure.bench [--repeats 3] [--untuned 1] [--json raw.json] [--quick]

Each repeat runs the job and tuned plain Keras (``plain_keras.py`` beside this), and the first ``--untuned`` of them
untuned plain Keras and a second seed of the job, every one a process of its own, in an order that rotates. Standard
output gets Markdown for docs/, standard error the progress. ``--quick`` only shows that everything runs: its
figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from tests.support.real import CATS, WEIGHTS
from tests.support.running import ROOT, SHARED, environment_of, places, published_in

# All that is not named has the job's default: MobileNetV2 at 160 px, ten epochs, batches of 32, seed 0.
DEFAULT = {
    "TRANSFER_DATASET": "cats_vs_dogs",
    "TRANSFER_DATA_DIR": str(SHARED / "tfds"),
    "TRANSFER_WEIGHTS": str(WEIGHTS),
}
QUICK = DEFAULT | {
    "TRANSFER_TRAIN_SPLIT": "train[:64]",
    "TRANSFER_VALIDATION_SPLIT": "train[3000:3032]",
    "TRANSFER_TEST_SPLIT": "train[3600:3632]",
    "TRANSFER_IMAGE_SIZE": "96",
    "TRANSFER_EPOCHS": "2",
}
PROGRAMS = ("job", "tuned", "article", "second seed")
COMPARED = ("data", "features", "training", "evaluation")  # of a result's seconds: what plain Keras does, too
SECONDS_PER_RUN, SECONDS_PER_RESULT = 15, 5


@dataclass(frozen=True)
class Run:
    """What one process was measured at.

    wall: seconds from its start to its end. peak: its largest resident memory, in bytes.
    seconds, accuracy: of each arm, on the test split. interval: 95% interval of the accuracy; the job's only.
    """

    wall: float
    peak: int
    seconds: dict[str, float]
    accuracy: dict[str, float]
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def rest(self) -> float:
        """Seconds outside all that is compared: start-up, planning, export and publishing."""
        return self.wall - sum(self.seconds.values())


@dataclass(frozen=True)
class Repeat:
    """The programs of one round; None: not run in it. second_seed: the job's seconds for a further seed of each arm."""

    job: Run
    tuned: Run
    article: Run | None = None
    second_seed: dict[str, float] | None = None


@dataclass(frozen=True)
class Bound:
    """One sentence that must hold, with its figure in each repeat. The median is held against the limit."""

    sentence: str
    values: tuple[float, ...]
    limit: float
    at_least: bool = False
    form: str = "{:.1f}"

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
        return f"- {self.sentence}: {spread(self.values, self.form)}: {'yes' if self.holds else 'MISSED'}"


# --- figures -> Markdown -----------------------------------------------------------------------------------------


def spread(values: Sequence[float], form: str = "{:.1f}") -> str:
    """Return the median, and the least and the largest where there are several."""
    middle = form.format(median(values))
    return f"{middle} ({form.format(min(values))} - {form.format(max(values))})" if len(values) > 1 else middle


def table(repeats: Sequence[Repeat]) -> str:
    """Return a row for each arm and one for all together: medians, and ratios formed within each repeat."""
    columns = ["arm", "job, s", "tuned Keras, s", "tuned / job", "article's Keras, s", "article / job"]
    columns += ["test accuracy: job", "tuned", "article", "peak memory: job, tuned, article"]
    arms = list(repeats[0].job.seconds)
    rows = [[*_row(arm, repeats, _of_arm(arm)), *_accuracies(arm, repeats), ""] for arm in arms]
    peaks = ", ".join(f"{median(run.peak for run in runs) / 1e9:.2f}" for runs in _by_program(repeats))
    rows.append([*_row("all", repeats, _of_all), "", "", "", f"{peaks} GB"])
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _by_program(repeats: Sequence[Repeat]) -> list[list[Run]]:
    found = ([getattr(repeat, name) for repeat in repeats] for name in ("job", "tuned", "article"))
    return [[run for run in runs if run is not None] for runs in found]


def _of_arm(arm: str) -> Callable[[Run], float]:
    return lambda run: run.seconds[arm]


def _of_all(run: Run) -> float:
    return sum(run.seconds.values())


def _row(name: str, repeats: Sequence[Repeat], seconds: Callable[[Run], float]) -> list[str]:
    cells = [name, f"{median(seconds(repeat.job) for repeat in repeats):.1f}"]
    for plain in ("tuned", "article"):
        pairs = [
            (seconds(run), seconds(repeat.job)) for repeat in repeats if (run := getattr(repeat, plain)) is not None
        ]
        cells += [f"{median(p for p, _ in pairs):.1f}", spread([p / j for p, j in pairs])]
    return cells


def _accuracies(arm: str, repeats: Sequence[Repeat]) -> list[str]:
    job, tuned, article = (median(run.accuracy[arm] for run in runs) for runs in _by_program(repeats))
    low, high = (median(repeat.job.interval[arm][end] for repeat in repeats) for end in (0, 1))
    return [f"{job:.3f} ({low:.3f} - {high:.3f})", f"{tuned:.3f}", f"{article:.3f}"]


def bounds(repeats: Sequence[Repeat], step_rate: dict[str, dict[str, float]] | None) -> list[Bound]:
    """Return everything that the job promises of its speed, with what was measured."""
    faster = [
        ("frozen", 8.0, _of_arm("frozen")),
        ("fine_tune", 1.8, _of_arm("fine_tune")),
        ("the three arms together", 1.3, _of_all),
    ]
    found = [
        Bound(
            f"{name} at least {limit:g} times faster than tuned Keras",
            tuple(seconds(repeat.tuned) / seconds(repeat.job) for repeat in repeats),
            limit,
            at_least=True,
        )
        for name, limit, seconds in faster
    ]
    for arm in repeats[0].job.accuracy:
        widths = [high - low for low, high in (repeat.job.interval[arm] for repeat in repeats)]
        gains = tuple(repeat.job.accuracy[arm] - repeat.tuned.accuracy[arm] for repeat in repeats)
        sentence = f"{arm}'s test accuracy minus tuned Keras's, no lower than minus its interval's width"
        found.append(Bound(f"{sentence} ({median(widths):.3f})", gains, -median(widths), True, "{:+.3f}"))
    for arm, rate in (step_rate or {"all arms": {}}).items():
        share = (rate["share"],) if rate else ()
        found.append(Bound(f"{arm}: share of the bare step rate reached, at least 95%", share, 0.95, True, "{:.1%}"))
    results = len(repeats[0].job.seconds)
    limit = SECONDS_PER_RUN + SECONDS_PER_RESULT * results
    sentence = f"start-up, planning, export and publishing of {results} results under {limit} s"
    found.append(Bound(sentence, tuple(repeat.job.rest for repeat in repeats), limit))
    for arm, share in (("frozen", 0.02), ("fine_tune", 0.55)):
        shares = tuple(repeat.second_seed[arm] / repeat.tuned.seconds[arm] for repeat in repeats if repeat.second_seed)
        found.append(Bound(f"a second seed of {arm} under {share:.0%} of tuned Keras's", shares, share, form="{:.1%}"))
    return found


def rates(step_rate: dict[str, dict[str, float]]) -> str:
    """Return the table of step rates, in examples per second."""
    lines = ["| arm | bare step, examples/s | training, examples/s | share |", "| --- | --- | --- | --- |"]
    lines += [f"| {arm} | {r['bare']:.0f} | {r['training']:.0f} | {r['share']:.1%} |" for arm, r in step_rate.items()]
    return "".join(f"{line}\n" for line in lines)


def report(title: str, repeats: Sequence[Repeat], step_rate: dict[str, dict[str, float]] | None) -> str:
    """Return all of it as Markdown."""
    lines = "".join(f"{bound.line()}\n" for bound in bounds(repeats, step_rate))
    parts = [f"{title}\n", table(repeats), *([rates(step_rate)] if step_rate else []), lines]
    return "\n".join(parts)


# --- measuring ---------------------------------------------------------------------------------------------------


def machine() -> str:
    """Return the processor, its usable cores, the memory, and the versions of TensorFlow and Keras."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text(encoding="utf-8").split("MemTotal:")[1].split()[0]) * 1024
    cores = len(os.sched_getaffinity(0))
    versions = f"TensorFlow {version('tensorflow')}, Keras {version('keras')}"
    return f"{models[0] if models else platform.machine()}, {cores} cores, {memory / 1e9:.0f} GB, {versions}"


@dataclass(frozen=True)
class Finished:
    """A process that ended well: its wall-clock seconds, peak memory in bytes, and what it wrote."""

    wall: float
    peak: int
    output: str


class ProcessError(Exception):
    """A process that ended otherwise; its output is the message."""


def execute(arguments: Sequence[str], environment: dict[str, str], log: Path) -> Finished:
    """Run ``python -m`` with these settings and no other TRANSFER_ variable, its output kept in ``log``."""
    # this process stays small, without TensorFlow: a child's peak begins at what its parent held when it was started
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environment_of({"TF_CPP_MIN_LOG_LEVEL": "2"} | environment),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode != 0:
        raise ProcessError(f"{' '.join(arguments)} ended with exit code {process.returncode}:\n{text}")
    return Finished(wall, usage.ru_maxrss * 1024, text)


def run_job(environment: dict[str, str], folder: Path) -> tuple[Finished, dict[str, Any]]:
    """Run the job with a fresh output and cache folder; return its manifest too."""
    done = execute(["job"], environment | places(folder), folder / "log")
    return done, published_in(folder / "output")[1]


def compared_seconds(result: dict[str, Any]) -> float:
    """Return those seconds of a result in the manifest that plain Keras has a counterpart to."""
    return float(sum(result["seconds"][name] for name in COMPARED))


def from_manifest(done: Finished, manifest: dict[str, Any]) -> Run:
    """Return the figures of a run of the job at one seed and fraction."""
    results = {result["arm"]: result for result in manifest["results"]}
    tests = {arm: result["metrics"]["test"] for arm, result in results.items()}
    return Run(
        done.wall,
        done.peak,
        {arm: compared_seconds(result) for arm, result in results.items()},
        {arm: test["accuracy"] for arm, test in tests.items()},
        {arm: tuple(test["accuracy_interval"]) for arm, test in tests.items()},
    )


def last_json(output: str) -> dict[str, Any]:
    """Return the last line that is a JSON object."""
    return dict(json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{"))))


def run_plain(name: str, environment: dict[str, str], folder: Path) -> Run:
    """Run one version of plain Keras."""
    done = execute(["tests.measure.plain_keras", name], environment, folder / "log")
    results = last_json(done.output)["results"]
    seconds, accuracy = ({one["arm"]: one[key] for one in results} for key in ("seconds", "test_accuracy"))
    return Run(done.wall, done.peak, seconds, accuracy)


def run_second_seed(environment: dict[str, str], folder: Path) -> dict[str, float]:
    """Return what seed 1 costs the job after seed 0, for each of the arms that start from trained weights."""
    two = {"TRANSFER_ARMS": "frozen,fine_tune", "TRANSFER_SEEDS": "0,1"}
    _, manifest = run_job(environment | two, folder)
    return {result["arm"]: compared_seconds(result) for result in manifest["results"] if result["seed"] == 1}


def description(manifest: dict[str, Any], repeats: int) -> str:
    """Return one sentence on the machine and the experiment."""
    settings, splits = manifest["settings"], manifest["dataset"]["splits"]
    photos = " / ".join(f"{splits[name]['examples']:,}" for name in ("train", "validation", "test"))
    return (
        f"{machine()}. {manifest['dataset']['name']}, {photos} photos to train on, validate and test, "
        f"{settings['backbone']} at {settings['image_size']} px, {settings['epochs']} epochs, batches of "
        f"{settings['batch_size']}; medians of {repeats}, in brackets the least and the largest."
    )


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def tolerated(name: str, run: Callable[[], Any]) -> Any:
    """Return what ``run`` gives, None if its process fails: an hour of other figures is not thrown away for it."""
    try:
        return run()
    except ProcessError as error:
        say(f"{name} is left out: {error}")
        return None


def measure(environment: dict[str, str], repeats: int, untuned: int, folder: Path, raw: Path | None) -> str:
    """Run everything, in an order that rotates, and return the report; ``raw`` is rewritten after each repeat."""
    measured: list[Repeat] = []
    title = ""
    for number in range(repeats):
        figures: dict[str, Any] = {}
        programs = PROGRAMS if number < untuned else PROGRAMS[:2]
        first = number % len(programs)
        for position, name in enumerate(programs[first:] + programs[:first], 1):
            say(f"repeat {number + 1}/{repeats}, run {position}/{len(programs)}: {name}")
            own = folder / f"{number}-{name.replace(' ', '-')}"
            own.mkdir()
            if name == "job":
                done, manifest = run_job(environment, own)
                figures[name], title = from_manifest(done, manifest), description(manifest, repeats)
            elif name == "second seed":
                figures[name] = tolerated(name, lambda own=own: run_second_seed(environment, own))
            else:
                figures[name] = run_plain(name, environment, own)
            say(f"  {json.dumps(asdict(figures[name]) if isinstance(figures[name], Run) else figures[name])}")
        measured.append(Repeat(figures["job"], figures["tuned"], figures.get("article"), figures.get("second seed")))
        _write(raw, title, measured, None)
    say("the step rates")
    log = folder / "step-rate"
    step_rate = tolerated("step_rate", lambda: last_json(execute(["tests.measure.step_rate"], environment, log).output))
    _write(raw, title, measured, step_rate)
    return report(title, measured, step_rate)


def _write(raw: Path | None, title: str, repeats: Sequence[Repeat], step_rate: dict[str, Any] | None) -> None:
    if raw is not None:
        figures = {"title": title, "repeats": [asdict(repeat) for repeat in repeats], "step_rate": step_rate}
        raw.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.bench", description="the job beside plain Keras")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of all programs (default: 3)")
    parser.add_argument(
        "--untuned", type=int, default=1, help="of these, rounds with untuned Keras and a second seed (default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the raw figures there")
    parser.add_argument("--quick", action="store_true", help="a few photos: shows that it runs, measures nothing")
    options = parser.parse_args(arguments)
    if not 1 <= options.untuned <= options.repeats:
        given = f"--repeats {options.repeats} --untuned {options.untuned}"
        parser.error(f"received {given}, accepted: at least 1 each, and --untuned at most --repeats")
    if (missing := CATS.missing()) is not None:
        sys.exit(f"cats_vs_dogs cannot be measured: {missing}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            text = measure(
                QUICK if options.quick else DEFAULT, options.repeats, options.untuned, Path(folder), options.json
            )
        except ProcessError as error:
            sys.exit(str(error))
    sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
