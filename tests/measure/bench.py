"""Measure the job beside plain Keras, on the same photos, weights, epochs and batch size; within an hour on two cores.

    python -m tests.measure.bench [--rounds 3] [--full 1] [--json output/bench/figures.json] [--quick]

Every program and arm is a process of its own. In each round the job and tuned plain Keras (``plain_keras.py`` beside
this) train frozen and fine_tune in turns, every second round in the other order; the first ``--full`` rounds have
scratch too, untuned plain Keras, and a second seed of the job. Before and after each process the machine's own speed is
measured: runs around which it changed are repeated, at most twice, and marked where that did not help.
Standard output gets Markdown for docs/, standard error the plan and the progress, ``--json`` all figures, those of
repeated runs too. ``--quick`` only shows that everything runs: its figures say nothing.
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
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tests.measure.bench_report import Run, Stretch, report
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
COMPARED = ("data", "features", "training", "evaluation")  # of a result's seconds: what plain Keras does, too
ATTEMPTS = 3
# The machine's speed is the median of at least so many products, which take at least so many seconds.
SIDE, PRODUCTS, SPEED_SECONDS = 2048, 9, 1.5

# Seconds of whole processes on two quiet cores at 2.5 GHz: what the plan is estimated by, and nothing else.
EXPECTED = {
    "job": {"frozen": 27, "fine_tune": 97, "scratch": 272},
    "tuned": {"frozen": 110, "fine_tune": 260, "scratch": 310},
    "article": {"frozen": 110, "fine_tune": 260, "scratch": 310},
    "second seed": {"frozen": 28, "fine_tune": 157},
}
EXPECTED_SPEED, EXPECTED_WARM_UP, EXPECTED_STEP_RATES = 3, 25, 240


# --- what runs when ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One arm in one round: the job and tuned Keras, in this order, and the programs that only follow them."""

    round: int
    arm: str
    pair: tuple[str, str]
    followers: tuple[str, ...] = ()

    def line(self) -> str:
        """Return the turn in words, with the seconds that are expected of each process."""
        expected = (f"{program} {EXPECTED[program][self.arm]} s" for program in self.pair + self.followers)
        return f"  round {self.round + 1}, {self.arm}: {', '.join(expected)}"

    def seconds(self) -> float:
        """Return what the turn is expected to take, the measuring of the speed included."""
        speeds = len(self.pair) + 1 + 2 * len(self.followers)
        return sum(EXPECTED[name][self.arm] for name in self.pair + self.followers) + speeds * EXPECTED_SPEED


def turns(rounds: int, full: int) -> list[Turn]:
    """Return what is measured, in its order; ``full`` of the rounds have every arm and program."""
    found = []
    for number in range(rounds):
        pair = ("job", "tuned") if number % 2 == 0 else ("tuned", "job")
        for arm in ("frozen", "fine_tune", "scratch") if number < full else ("frozen", "fine_tune"):
            followers = [name for name in ("article", "second seed") if number < full and arm in EXPECTED[name]]
            found.append(Turn(number, arm, pair, tuple(followers)))
    return found


def expected_seconds(planned: Sequence[Turn]) -> float:
    """Return what everything is expected to take where nothing is repeated."""
    return EXPECTED_WARM_UP + sum(turn.seconds() for turn in planned) + EXPECTED_STEP_RATES


def plan(planned: Sequence[Turn]) -> str:
    """Return the plan in words."""
    processes = sum(len(turn.pair + turn.followers) for turn in planned)
    head = f"{processes} processes, and more where the machine's speed changes; {expected_seconds(planned) / 60:.0f} "
    head += "minutes in all on two quiet cores at 2.5 GHz (with --quick, a few):"
    first, last = f"  a first run: {EXPECTED_WARM_UP} s", f"  the step rates: {EXPECTED_STEP_RATES} s"
    return "\n".join([head, first, *(turn.line() for turn in planned), last])


def steadily(
    turn: Turn,
    programs: Sequence[str],
    run: Callable[[str], Run],
    speed: Callable[[], float],
    beside: Sequence[float] = (),
    attempts: int = ATTEMPTS,
) -> list[Stretch]:
    """Run the programs one after the other, again while the machine's speed changes around them.

    Args:
        turn: The arm and round.
        programs: Their names, in order.
        run: Runs one and returns what it was measured at.
        speed: Measures the machine's speed, in GFLOP/s.
        beside: Speeds around earlier runs that these are compared with.
        attempts: The most that is tried.

    Returns:
        Every attempt. The last one counts; it is ``slow`` where the speed changed in each of them.
    """
    found: list[Stretch] = []
    while len(found) < attempts and (not found or found[-1].slow):
        runs, speeds = {}, [speed()]
        for program in programs:
            runs[program] = run(program)
            speeds.append(speed())
        found.append(Stretch(turn.round, turn.arm, runs, tuple(speeds), tuple(beside)))
        if found[-1].slow:
            tried = f"try {len(found)} of {attempts}"
            say(f"a slow stretch in {found[-1].name}: the speed changed by {found[-1].change:.0%}; {tried}")
    return found


# --- measuring ---------------------------------------------------------------------------------------------------


def machine_speed() -> float:
    """Return GFLOP/s in products of two float32 matrices, by all cores that this process may use."""
    generator = np.random.default_rng(0)
    one, other = (generator.random((SIDE, SIDE), dtype=np.float32) for _ in range(2))
    product = np.empty_like(one)
    seconds: list[float] = []
    while len(seconds) < PRODUCTS or sum(seconds) < SPEED_SECONDS:
        start = time.perf_counter()
        np.matmul(one, other, out=product)
        seconds.append(time.perf_counter() - start)
    return 2 * SIDE**3 / median(seconds) / 1e9


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


def from_manifest(done: Finished, manifest: dict[str, Any], seed: int = 0) -> Run:
    """Return the figures of a run of the job with one arm, its seconds and accuracy those of this seed."""
    (result,) = (result for result in manifest["results"] if result["seed"] == seed)
    test = result["metrics"]["test"]
    return Run(
        done.wall,
        float(sum(result["seconds"][name] for name in COMPARED)),
        done.peak,
        test["accuracy"],
        manifest["dataset"]["splits"]["test"]["examples"],
        tuple(test["accuracy_interval"]),
    )


def last_json(output: str) -> dict[str, Any]:
    """Return the last line that is a JSON object."""
    return dict(json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{"))))


def run_plain(name: str, environment: dict[str, str], folder: Path) -> Run:
    """Run one version of plain Keras with one arm."""
    done = execute(["tests.measure.plain_keras", name], environment, folder / "log")
    (result,) = last_json(done.output)["results"]
    return Run(done.wall, result["seconds"], done.peak, result["test_accuracy"], result["test_examples"])


def description(manifest: dict[str, Any]) -> str:
    """Return one sentence on the machine and the experiment."""
    settings, splits = manifest["settings"], manifest["dataset"]["splits"]
    photos = " / ".join(f"{splits[name]['examples']:,}" for name in ("train", "validation", "test"))
    return (
        f"{machine()}. {manifest['dataset']['name']}, {photos} photos to train on, validate and test, "
        f"{settings['backbone']} at {settings['image_size']} px, {settings['epochs']} epochs, batches of "
        f"{settings['batch_size']}; medians, in brackets the least and the largest."
    )


class Programs:
    """Runs the programs. title: the experiment in one sentence, once the job has run."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self.title = ""

    def run(self, arm: str, name: str) -> Run:
        """Run one with one arm, in folders of its own that are removed."""
        say(f"{name}, {arm}")
        environment = self._environment | {"TRANSFER_ARMS": arm}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if name in ("tuned", "article"):
                measured = run_plain(name, environment, folder)
            else:
                seed = 1 if name == "second seed" else 0
                seeds = ",".join(map(str, range(seed + 1)))
                done, manifest = run_job(environment | {"TRANSFER_SEEDS": seeds}, folder)
                measured = from_manifest(done, manifest, seed)
                self.title = self.title or description(manifest)
        say(f"  {json.dumps(asdict(measured))}")
        return measured


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


def measure(planned: Sequence[Turn], quick: bool, raw: Path) -> str:
    """Run everything and return the report; ``raw`` is rewritten after each stretch."""
    programs, attempts = Programs(QUICK if quick else DEFAULT), 1 if quick else ATTEMPTS
    measured: list[Stretch] = []

    def write(step_rate: dict[str, Any] | None = None) -> None:
        figures = {"title": programs.title, "stretches": [asdict(one) for one in measured], "step_rate": step_rate}
        raw.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    write()
    say("a first run, so that no process that is measured has to fetch the libraries from disk")
    Programs(QUICK).run("frozen", "job")
    for turn in planned:
        run = partial(programs.run, turn.arm)
        measured += steadily(turn, turn.pair, run, machine_speed, attempts=attempts)
        write()
        pair = measured[-1]
        left = 1 if pair.slow else attempts  # beside a pair that was never steady, no repetition could be
        for name in turn.followers:
            follow = partial(steadily, turn, [name], run, machine_speed, pair.speeds, left)
            measured += tolerated(f"{name} of {turn.arm}", follow) or []
            write()
    say("the step rates")
    with tempfile.TemporaryDirectory() as temporary:
        command = ["tests.measure.step_rate", *(["--quick"] if quick else [])]
        step_rate = tolerated("step_rate", lambda: last_json(execute(command, {}, Path(temporary) / "log").output))
    write(step_rate)
    return report(programs.title, measured, step_rate)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.bench", description="the job beside plain Keras")
    parser.add_argument("--rounds", type=int, help="rounds of frozen and fine_tune (default: 3; with --quick 1)")
    parser.add_argument(
        "--full", type=int, default=1, help="of these, rounds with scratch, untuned Keras, a second seed (default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where all figures go (default: below output/bench)")
    parser.add_argument("--quick", action="store_true", help="a few photos: shows that it runs, measures nothing")
    options = parser.parse_args(arguments)
    rounds = (1 if options.quick else 3) if options.rounds is None else options.rounds
    if rounds < 1 or not 0 <= options.full <= rounds:
        given = f"{rounds} rounds, --full {options.full}"
        parser.error(f"received {given}, accepted: at least 1 round, and --full from 0 to as many as there are rounds")
    if (missing := CATS.missing()) is not None:
        sys.exit(f"cats_vs_dogs cannot be measured: {missing}")
    raw = options.json or ROOT / "output" / "bench" / ("quick.json" if options.quick else "figures.json")
    raw.parent.mkdir(parents=True, exist_ok=True)
    planned = turns(rounds, options.full)
    say(plan(planned))
    try:
        text = measure(planned, options.quick, raw)
    except ProcessError as error:
        sys.exit(str(error))
    sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
