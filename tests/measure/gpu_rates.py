"""Rates of the job's own steps, an arm at a time when it is told to: one of the processes of ``gpu_turns``.

    python -m tests.measure.gpu_rates    reads TRANSFER_ variables; an arm's name on standard input measures it

Training is ``PhaseRun.steps_over``, the bare step the same compiled one, on a batch that lies on the device. All that
touches the steps of the job is in this file.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import tensorflow as tf

from job.arms import ARMS
from job.data import reading
from job.experiment.plan import make_plan
from job.experiment.result import Experiment
from job.machine import console, runtime
from job.settings.environment import Settings, load
from job.training.epochs import PhaseRun
from job.training.feeds import Call, Index
from job.training.steps import Steps
from tests.measure.gpu_turns import answer

_SAMPLE_SECONDS = 0.1
# The driver tells of the time before: what it says first is not of the training.
_SAMPLES_LEFT_OUT = 5
# Training is watched for so many turns' time in the arm whose use of the GPU is told.
_WATCHED, _WATCHED_TURNS = "scratch", 2.5


def bare(steps: Steps, run: PhaseRun, one: Index, number: int, *, xla: bool) -> Callable[[], None]:
    """Return what takes ``number`` steps, all on the rows at ``one``, which are read before."""
    made: dict[int, Call] = {}

    def work() -> None:
        left = number
        while left:
            several = min(left, run.per_call)
            if several not in made:
                made[several] = run._feeder.read([one] * several, padded=xla)
            steps(made[several], 0, 0)
            left -= several
        steps.sums()  # the device may be behind

    return work


class Measured:
    """One arm that is compiled: epochs of its last phase, and as many bare steps."""

    def __init__(self, experiment: Experiment, settings: Settings, arm: str, examples: int, seconds: float) -> None:
        """Compile the last phase of an arm for so many examples. seconds: of a turn."""
        batch, xla = settings.training.batch_size, settings.runtime.xla == "on"
        trainer, stages = experiment.prepare(ARMS[arm], np.arange(examples), seed=0)
        self._steps = trainer.steps(stages[-1])
        self._run = trainer.phase_run(stages[-1], self._steps, seed=0)
        self._order = np.random.default_rng(0).permutation(stages[-1].index)[: examples // batch * batch]
        self._bare = bare(self._steps, self._run, self._order[:batch], len(self._order) // batch, xla=xla)
        self._seconds = seconds
        self._watched = arm == _WATCHED
        start = time.perf_counter()
        self._training()
        self.compile_seconds = time.perf_counter() - start
        self._training()  # which finds out how many steps a call takes
        self._bare()

    def _training(self) -> None:
        self._run.done = 0  # the schedule is that of a phase, however often it is gone through
        self._run.steps_over(self._order, lambda _: None)
        self._steps.sums()  # the device may be behind

    def turn(self) -> dict[str, Any]:
        """Return both rates, in images a second, and how much of the GPU training took."""
        gpu = bool(tf.config.list_logical_devices("GPU"))
        if gpu:
            tf.config.experimental.reset_memory_stats("GPU:0")
        with _watched() as samples:
            training = self._rate(self._training, self._seconds * (_WATCHED_TURNS if self._watched else 1.0))
        found = {"training": training, "bare": self._rate(self._bare, self._seconds)}
        if gpu:
            found["memory"] = tf.config.experimental.get_memory_info("GPU:0")["peak"]
        if self._watched and len(samples) > _SAMPLES_LEFT_OUT:
            used, memory = zip(*samples[_SAMPLES_LEFT_OUT:], strict=True)
            found |= {"utilisation": mean(used) / 100, "memory_of_all": max(memory)}
        return found

    def _rate(self, work: Callable[[], None], seconds: float) -> float:
        start, times = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds:
            work()
            times += 1
        return times * len(self._order) / passed


@contextmanager
def _watched() -> Iterator[list[tuple[int, int]]]:
    """Yield a list that fills with the driver's utilisation in percent, and bytes in use by all; empty on a CPU."""
    samples: list[tuple[int, int]] = []
    if not tf.config.list_physical_devices("GPU"):
        yield samples
        return
    import pynvml

    from job.machine.energy import _bus_ids

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByPciBusId(_bus_ids()[0])
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            used, memory = pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu, pynvml.nvmlDeviceGetMemoryInfo(gpu).used
            samples.append((int(used), int(memory)))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


class _FeatureSeconds(logging.Handler):
    """Adds up what the log says of the passes of frozen layers, but for the first, which compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[tuple[int, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("features of") and isinstance(record.args, tuple):
            self.passes.append((int(str(record.args[1])), float(str(record.args[-1]))))

    def rate(self) -> float | None:
        """Return photos a second."""
        examples, seconds = (sum(each) for each in zip(*self.passes[1:], strict=True)) if self.passes[1:] else (0, 0.0)
        return examples / seconds if seconds else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.gpu_rates", description="the job's own rates")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    seconds = parser.parse_args().seconds
    settings, features = load(), _FeatureSeconds()
    logging.getLogger("job.models.frozen_features").addHandler(features)
    logging.getLogger("job.models.frozen_features").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = make_plan(settings, runtime.start(settings.runtime), folder)
        pixels = reading.read_splits(plan.source, settings.model.image_size, folder, settings.data.max_bad_images)
        experiment = Experiment(plan, pixels, 0.0, folder, console.Console(None))
        arms: dict[str, Measured] = {}
        for arm in settings.training.arms:
            arms[arm] = Measured(experiment, settings, arm, len(pixels["train"]), seconds)
        ready = {
            "precision": plan.runtime.precision,
            "compile_seconds": {name: arm.compile_seconds for name, arm in arms.items()},
            "features": features.rate(),
        }
        answer(ready, lambda arm: arms[arm].turn())


if __name__ == "__main__":
    main()
