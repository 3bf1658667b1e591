"""Training rates of the job and of tuned plain Keras, by turns: the speed parts of the GPU acceptance run.

    python -m tests.measure.gpu_turns rates keras    on what gpu_data prepared in output/gpu/work

Every setting of XLA has a process of its own, ``gpu_rates`` or ``gpu_keras``. They prepare and compile side by side,
and measure one after the other, each arm for about a second a turn. Batch sizes follow each other, so that what a
larger one takes of the GPU's memory is gone before.
"""

from __future__ import annotations

import itertools
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

from tests.measure.gpu_data import Found, Place, rated, run_program
from tests.support.running import ROOT

ARMS = ("scratch", "frozen", "fine_tune")
ROUNDS = 3
SECONDS_PER_TURN = 1.0
# Of the seconds left for a batch size: how many its processes may take to prepare.
_SHARE_TO_PREPARE = 0.75
# What a batch size should have, before a second one gets anything: XLA takes more than a minute to compile.
_ENOUGH_SECONDS = 200
_LEAST_SECONDS = 40
_SECONDS_TO_END = 5
_MARK = "TURN "


class WorkerError(Exception):
    """A process that ended, or said nothing in time."""


def answer(ready: Mapping[str, Any], measure: Callable[[str], Mapping[str, Any]]) -> None:
    """Tell on standard output of what is ready, then for each line on standard input of what was measured."""
    _tell(ready)
    for line in sys.stdin:
        _tell(measure(line.strip()))


def _tell(value: Mapping[str, Any]) -> None:
    sys.stdout.write(f"{_MARK}{json.dumps(value)}\n")
    sys.stdout.flush()


class Worker:
    """A process that measures when it is told to."""

    def __init__(self, place: Place, name: str, module: str, arguments: Sequence[str], settings: Mapping[str, str]):
        """Start ``python -m tests.measure.<module>``; what else it prints goes to its log."""
        self.name = name
        path = place.log(f"turns-{name}")
        self._file, self._log = path.name, path.open("w", encoding="utf-8")
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"tests.measure.{module}", *arguments],
            cwd=ROOT,
            env=place.environment(dict(settings) | place.places(name)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            if line.startswith(_MARK):
                self._answers.put(json.loads(line.removeprefix(_MARK)))
            else:
                self._log.write(line)
        self._answers.put(None)

    def next(self, seconds: float) -> dict[str, Any]:
        """Return its next answer, within so many seconds."""
        try:
            found = self._answers.get(timeout=max(0.0, seconds))
        except queue.Empty as error:
            raise WorkerError(f"{self.name} did not answer in time") from error
        if found is None:
            code = self._process.wait()
            raise WorkerError(f"{self.name} ended with exit code {code}; logs/{self._file} says why")
        return found

    def measure(self, arm: str, seconds: float) -> dict[str, Any]:
        """Return what it measures of an arm."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{arm}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(f"{self.name} is gone; logs/{self._file} says why") from error
        return self.next(seconds)

    def end(self) -> None:
        """End the process, which has nothing to lose."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._log.close()


@contextmanager
def _started(place: Place, wanted: Sequence[str], batch: int) -> Iterator[dict[str, Worker]]:
    settings = rated(place, batch_size=str(batch))
    turn = ["--seconds", str(SECONDS_PER_TURN if not place.cpu else 0.2)]
    with ExitStack() as stack:
        workers = {}
        for xla in ("off", "on"):
            name = f"job-{batch}-xla-{xla}"
            workers[f"job, XLA {xla}"] = Worker(place, name, "gpu_rates", turn, settings | {"TRANSFER_XLA": xla})
            if "keras" in wanted:
                ways = ["xla", *turn] if xla == "on" else ["plain", *turn]
                workers[f"Keras, XLA {xla}"] = Worker(place, f"keras-{batch}-xla-{xla}", "gpu_keras", ways, settings)
        for worker in workers.values():
            stack.callback(worker.end)
        yield workers


def _measured(workers: dict[str, Worker], deadline: float, rounds: int) -> Found:
    """Return for each worker what it was ready with and the medians of each arm, or why an arm has none."""
    begin = time.monotonic()
    ready_until = begin + _SHARE_TO_PREPARE * (deadline - begin)
    found: Found = {name: {"ready": {}, "fault": None} for name in workers}
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {(name, arm): [] for name in workers for arm in ARMS}
    for name, worker in workers.items():
        try:
            found[name]["ready"] = worker.next(ready_until - time.monotonic())
        except WorkerError as error:
            worker.end()  # it would disturb what is measured
            found[name]["fault"] = str(error)
    for _, arm, name in itertools.product(range(rounds), ARMS, workers):
        if found[name]["fault"] is None:
            try:
                turns[name, arm].append(workers[name].measure(arm, deadline - time.monotonic()))
            except WorkerError as error:
                workers[name].end()
                found[name]["fault"] = str(error)
    for name, each in found.items():
        each["arms"] = {arm: medians(turns[name, arm]) for arm in ARMS if turns[name, arm]}
        if len(each["arms"]) == len(ARMS):
            each["fault"] = None  # at least one round is whole
    return found


def medians(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the medians of what was measured, and of the shares that were formed within each turn."""
    if all("bare" in turn for turn in turns):
        turns = [{**turn, "share": turn["training"] / turn["bare"]} for turn in turns]
    names = [name for name in turns[0] if all(name in turn for turn in turns)]
    return {name: median(turn[name] for turn in turns) for name in names}


def measure(place: Place, wanted: Sequence[str], seconds: float) -> None:
    """Measure all batch sizes, and keep what is known after each."""
    deadline = time.monotonic() + seconds
    batches: Found = {}
    sizes = place.sizes.batches
    for number, batch in enumerate(sizes):
        begin = time.monotonic()
        if deadline - begin < _LEAST_SECONDS:
            break
        left = deadline - begin
        until = begin + max(left / (len(sizes) - number), min(left, _ENOUGH_SECONDS)) - _SECONDS_TO_END
        with _started(place, wanted, batch) as workers:
            batches[str(batch)] = _measured(workers, until, 1 if place.cpu else ROUNDS)
        for part in wanted:
            shown = {
                size: {name: each for name, each in found.items() if part == "keras" or name.startswith("job")}
                for size, found in batches.items()
            }
            found = {"sizes": sizes, "examples": place.sizes.rated[0], "batches": shown}
            place.keep(part, found, whole=len(batches) == len(sizes))


if __name__ == "__main__":
    run_program("gpu_turns", "rates of the job and of tuned Keras", {"rates": measure, "keras": measure})
