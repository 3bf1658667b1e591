"""The real command, watched line by line, ended at chosen moments, and compared with a run that nobody disturbed."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from tests.support.running import ROOT, Finished, completed, environment_of

ARMS = ("scratch", "frozen", "fine_tune")
# Dropout, since it is random at every step.
SAVED_OFTEN = {
    "TRANSFER_EPOCHS": "16",
    "TRANSFER_DROPOUT": "0.2",
    "TRANSFER_CHECKPOINT_SECONDS": "0.1",
}
PID_1 = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
with_pid_1 = pytest.mark.skipif(
    subprocess.run([*PID_1, "true"], capture_output=True, check=False).returncode != 0,
    reason="this account cannot make a PID namespace (unshare --pid)",
)
# More than the slowest stage takes on a busy machine: whoever waits longer waits for something that will not come.
_LONGEST = 300.0
_STAGES = ("begins", "features", "training", "evaluating", "exporting", "storing")


@dataclass(frozen=True)
class Moment:
    """Where a run is. result: the arm and fraction that is worked on, e.g. ``frozen 1``; blank where none is."""

    stage: str
    result: str = ""

    def __str__(self) -> str:
        return f"{self.result} {self.stage}".strip()


def moments(results: Sequence[str] = tuple(f"{arm} 1" for arm in ARMS)) -> list[Moment]:
    """Return all moments of a run in their order; a process logs features in the first result that needs them."""
    stages = {result: [s for s in _STAGES if s != "features" or not result.startswith("scratch")] for result in results}
    return [
        *map(Moment, ("start-up", "plan", "decoding")),
        *(Moment(stage, result) for result in results for stage in stages[result]),
        *map(Moment, ("committing", "published")),
    ]


def moment_of(messages: Sequence[str]) -> Moment:
    """Return where a process is that has logged ``messages``."""
    now = Moment("start-up")
    for message in messages:
        if message.startswith("training on "):
            now = Moment("plan")
        elif message.startswith("run "):
            now = Moment("decoding")
        elif begun := re.fullmatch(r"(\w+): fraction ([\d.]+), seed \d+", message):
            now = Moment("begins", " ".join(begun.groups()))
        elif message.startswith("features of "):
            now = Moment("features", now.result)
        elif found := re.match(r"\w+: (epoch|evaluating|exporting|storing)", message):
            now = Moment({"epoch": "training"}.get(found[1], found[1]), now.result)
        elif message.startswith("committing"):
            now = Moment("committing")
        elif message.startswith("published "):
            now = Moment("published")
    return now


class Running:
    """A process of the job whose log is read while it runs."""

    def __init__(self, process: subprocess.Popen[str], errors: BinaryIO | None = None) -> None:
        self.process = process
        self.messages: list[str] = []
        self._lines: list[dict[str, Any]] = []
        self._text: list[str] = []
        self._errors = errors
        self._news = threading.Condition()
        self._silent = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The job's own process id: of the child where ``unshare --fork`` was started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        command = Path(f"/proc/{self.process.pid}/cmdline").read_bytes()
        return int(children[0]) if command.startswith(b"unshare") and children else self.process.pid

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            with self._news:
                self._text.append(text)
                if text.startswith("{"):
                    with suppress(ValueError):  # the last line of a killed process may be cut short
                        self._lines.append(json.loads(text))
                        self.messages.append(str(self._lines[-1].get("message", "")))
                self._news.notify_all()
        with self._news:
            self._silent = True
            self._news.notify_all()

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until ``condition`` holds of what was logged; return whether it does, or the process ended before."""
        with self._news:
            assert self._news.wait_for(lambda: self._silent or condition(), _LONGEST), self.messages[-3:]
            return condition()

    def until(self, marker: str) -> bool:
        """Wait for a message that ``marker`` (a regular expression) matches; return whether it came."""
        return self.wait(lambda: any(re.search(marker, message) for message in self.messages))

    def until_moment(self, wanted: Moment, order: Sequence[Moment]) -> bool:
        """Wait for a moment, or for one that comes after it; return whether the process still ran then."""
        place = order.index(wanted)
        return self.wait(lambda: order.index(moment_of(self.messages)) >= place) and self.process.poll() is None

    def until_signals_are_heeded(self) -> None:
        """Wait until the process catches SIGTERM: before, Python itself is not up."""
        deadline = time.monotonic() + _LONGEST
        while not _catches(self.pid, signal.SIGTERM):
            assert self.process.poll() is None, "it ended before it heeded signals"
            assert time.monotonic() < deadline, "it never heeded signals"
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the job itself."""
        os.kill(self.pid, number)

    def end(self, seconds: float = _LONGEST) -> Finished:
        """Wait for the end; return exit code and log."""
        code = self.process.wait(seconds)
        self.close()
        if self._errors is not None:
            self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace") if self._errors else ""
        return Finished(code, self._lines, errors + "".join(self._text))

    def close(self) -> None:
        """Read the log to its end; the process has ended."""
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _catches(pid: int, number: signal.Signals) -> bool:
    with suppress(OSError):
        mask = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)
    return False


@contextmanager
def started(environment: Mapping[str, str], *arguments: str, before: Sequence[str] = ()) -> Iterator[Running]:
    """Start ``python -m job`` (behind the command ``before``), and end it by its handle when the block is left."""
    command = [*before, sys.executable, "-m", "job", *arguments]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment_of(environment), stdout=subprocess.PIPE, stderr=errors, text=True
        )
        running = Running(process, errors)
        try:
            yield running
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.kill(running.pid, signal.SIGKILL)
            process.wait()
            running.close()


@dataclass(frozen=True)
class End:
    """How a process ended that was sent a signal. at: where it was. seconds: from the signal to the end."""

    at: Moment
    process: Finished
    seconds: float


def ended(
    environment: Mapping[str, str],
    wanted: Moment,
    order: Sequence[Moment],
    number: signal.Signals,
    delay: float = 0.0,
    before: Sequence[str] = (),
) -> End | None:
    """Start the job and send it a signal at a moment, ``delay`` seconds in, or as soon as it is past it.

    Returns:
        How it ended; None where it ended of itself before.
    """
    with started(environment, before=before) as running:
        if wanted.stage == "start-up" and number is not signal.SIGKILL:
            running.until_signals_are_heeded()
        if not running.until_moment(wanted, order):
            return None
        if delay:
            time.sleep(delay)
        try:
            running.send(number)
        except ProcessLookupError:
            return None
        sent = time.monotonic()
        at = moment_of(running.messages)
        process = running.end()
        seconds = time.monotonic() - sent
        if number is signal.SIGKILL:
            # what it logged between the look and the signal
            at = moment_of([line["message"] for line in process.lines])
            if process.code == 0:
                return None
        return End(at, process, seconds)


def longest_delay(moment: Moment) -> float:
    """Return about how many seconds a process stays at a moment of the tiny run."""
    arm = moment.result.partition(" ")[0]
    seconds = {"start-up": 6.0, "plan": 1.0, "decoding": 0.8, "exporting": 0.8, "evaluating": 0.3}
    if moment.stage == "begins":
        return 2.5 if arm == "scratch" else 0.6
    if moment.stage == "training":
        return {"scratch": 1.5, "frozen": 0.05, "fine_tune": 0.3}[arm]
    return seconds.get(moment.stage, 0.0)


def kill_until_it_ends(
    environment: Mapping[str, str], wanted: Sequence[Moment], order: Sequence[Moment], random: random.Random
) -> tuple[list[End], Finished]:
    """Kill the job once at each of ``wanted``, then let it end.

    Whatever is missed because the delay was too long is tried again without one, as long as it can be reached.

    Returns:
        The kills, and the process that ended of itself.
    """
    kills: list[End] = []
    for moment in wanted:
        for delay in (random.uniform(0, longest_delay(moment)), 0.0):
            kill = ended(environment, moment, order, signal.SIGKILL, delay)
            if kill is None:
                break
            kills.append(kill)
            print(f"killed at {kill.at}, {delay:.2f} s after {moment}")  # noqa: T201  (pytest shows it on failure)
            if kill.at == moment:
                break
    return kills, completed(dict(environment))


@dataclass(frozen=True)
class Undisturbed:
    """A run of the tiny comparison that ended at the first attempt, and the environment that it was given."""

    environment: dict[str, str]
    folder: Path


def undisturbed(tiny: dict[str, str], factory: pytest.TempPathFactory) -> Undisturbed:
    """Return the undisturbed run of the tiny comparison; several test processes share one."""
    base = factory.getbasetemp()
    shared = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "undisturbed"
    shared.mkdir(exist_ok=True)
    told = shared / "environment.json"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            environment = tiny | SAVED_OFTEN
            completed(environment | {"TRANSFER_OUTPUT_URI": str(shared / "output")})
            told.write_text(json.dumps(environment))
    (folder,) = (shared / "output").iterdir()
    return Undisturbed(json.loads(told.read_text()), folder)


def run_folder(output: Path) -> Path:
    """Return the folder of the only run published in ``output``."""
    (folder,) = (path for path in output.iterdir() if (path / "manifest.json").is_file())
    return folder


def assert_same(run: Path, expected: Path, arms: Sequence[str] = ARMS) -> dict[str, Any]:
    """Hold a published run against an undisturbed one, bit by bit; return its manifest.

    arms: those that ``run`` has; ``expected`` may have more.
    """
    manifest, wanted = (json.loads((folder / "manifest.json").read_text()) for folder in (run, expected))
    told = [_told(result) for result in manifest["results"]]
    assert told == [_told(result) for result in wanted["results"] if result["arm"] in arms]
    assert [result["arm"] for result in manifest["results"] if result["train_fraction"] == 1] == list(arms)
    for result in manifest["results"]:
        history = [epoch["epoch"] for epoch in result["history"]]
        assert history == list(range(1, manifest["settings"]["epochs"] + 1))
        model = result["saved_model"]
        predictions = [(folder / model).parent / "predictions.csv" for folder in (run, expected)]
        assert predictions[0].read_bytes() == predictions[1].read_bytes(), model
        found, sought = (variables_of(folder / model) for folder in (run, expected))
        assert found.keys() == sought.keys()
        for name, value in sought.items():
            assert found[name].dtype == value.dtype
            assert found[name].tobytes() == value.tobytes(), f"{model}: {name}"
    return dict(manifest)


def _told(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result says, without times and what hangs on them."""
    kept = {name: result.get(name) for name in ("arm", "train_fraction", "seed", "parameters", "metrics", "batch_norm")}
    epochs = [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in result["history"]]
    return kept | {"history": epochs, "rows": result["rows"], "train_examples": result["train_examples"]}


def variables_of(saved_model: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return every number of a SavedModel under its name there."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(saved_model / "variables" / "variables"))
    names = [name for name in reader.get_variable_to_shape_map() if name.endswith("VARIABLE_VALUE")]
    assert len(names) > 10
    return {name: np.asarray(reader.get_tensor(name)) for name in names}


def assert_only_the_run_is_left(run: Path, cache: Path) -> None:
    """Check that nothing lies about: in the output the run as its manifest lists it, in the cache rows of features."""
    manifest = json.loads((run / "manifest.json").read_text())
    listed = {artifact["path"] for artifact in manifest["artifacts"]} | {"manifest.json"}
    assert {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} == listed
    assert {path.name for path in run.parent.iterdir()} == {run.name}
    assert {path.name for path in cache.iterdir()} <= {"features"}, list(cache.iterdir())
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} <= {".npy", ".json"}, list(cache.rglob("*"))


def field(process: Finished, name: str) -> list[Any]:
    """Return the values of a field in the lines that have it."""
    return [line[name] for line in process.lines if name in line]


def checkpoints_in(output: Path) -> list[Path]:
    """Return the step checkpoints below a folder, the oldest first."""
    return sorted(output.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
