"""What share of its bare step rate each arm's training reaches, on cats_vs_dogs; a few minutes on two cores.

    python -m tests.measure.step_rate [--quick]

It ends in one line of JSON: {arm: {"bare": ..., "training": ..., "share": ...}}. The bare rate is that of the same
compiled step on one batch that is there already. Epochs of training and as many bare steps alternate; rates are medians
in examples per second, the share is the median over the pairs. ``--quick`` only shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from job.arms import ARMS
from job.data import reading
from job.data.rows import Rows
from job.experiment.plan import Plan, make_plan
from job.experiment.result import Experiment
from job.machine import console, runtime
from job.machine.replicas import Replicas
from job.settings.environment import load
from job.training.epochs import PhaseRun
from job.training.feeds import Feeder, Residents
from job.training.stages import Stage
from job.training.steps import Steps
from tests.measure.bench import DEFAULT, QUICK
from tests.support.real import CATS

PAIRS = {"scratch": 3, "frozen": 40, "fine_tune": 5}


def rates(stage: Stage, steps: Steps, run: PhaseRun, batch_size: int, pairs: int) -> dict[str, float]:
    """Return the rates of ``stage``, examples per second."""
    order = np.random.default_rng(0).permutation(stage.index)
    order = order[: len(order) // batch_size * batch_size]
    one = order[:batch_size]
    rows = Rows(("",) * batch_size, stage.train.labels[one], stage.train.read(one), (b"",) * batch_size)
    feeder = Feeder(stage.cut, rows, batch_size, Replicas(), Residents(Replicas()), len(order))

    def training() -> None:
        run.steps_over(order, lambda _: None)

    def bare() -> None:
        left = len(order) // batch_size
        while left:
            number = min(left, run.per_call)
            steps(feeder.read([np.arange(batch_size)] * number), 0, 0)
            left -= number

    training()  # the first call compiles, and the second finds out how many steps a call takes
    measured = [(_timed(training), _timed(bare)) for _ in range(pairs)]
    return {
        "bare": median(len(order) / seconds for _, seconds in measured),
        "training": median(len(order) / seconds for seconds, _ in measured),
        "share": median(bare / training for training, bare in measured),
    }


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def prepared(folder: Path, **changes: str) -> tuple[Plan, Experiment, npt.NDArray[np.int64]]:
    """Return plan and experiment on cats_vs_dogs, and the numbers of all its rows to train on."""
    if (missing := CATS.missing()) is not None:
        sys.exit(f"cats_vs_dogs cannot be measured: {missing}")
    settings = load(DEFAULT | {"TRANSFER_OUTPUT_URI": str(folder / "output")} | changes)
    plan = make_plan(settings, runtime.start(settings.runtime), folder)
    pixels = reading.read_splits(plan.source, settings.model.image_size, folder, settings.data.max_bad_images)
    return plan, Experiment(plan, pixels, 0.0, folder, console.Console(None)), np.arange(len(pixels["train"]))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.step_rate", description="shares of bare step rates")
    parser.add_argument("--quick", action="store_true", help="a few photos: shows that it runs, measures nothing")
    changes = QUICK if parser.parse_args(arguments).quick else {}
    found = {}
    with tempfile.TemporaryDirectory() as name:
        plan, experiment, index = prepared(Path(name), **changes)
        for arm, pairs in PAIRS.items():
            trainer, stages = experiment.prepare(ARMS[arm], index, seed=0)
            steps = trainer.steps(stages[-1])
            run = trainer.phase_run(stages[-1], steps, seed=0)
            found[arm] = rates(stages[-1], steps, run, plan.settings.training.batch_size, pairs)
            sys.stderr.write(f"{arm}: {found[arm]}\n")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
