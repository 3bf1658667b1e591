"""The acceptance run on a GPU: what the first person who has one starts, by one command.

    python -m tests.measure.gpu_acceptance    about fifteen minutes on an H100; --cpu runs its whole logic without a GPU

Writes gpu_acceptance.md and gpu_acceptance.json to output/gpu (--output), anew after each part, so that a run that is
killed leaves all that it found. Ends with 0 where every part ran and nothing falls short of its goal, else with 1.
Where there is no GPU it fails, and never skips.

--seconds bounds it all (900). Parts run in the order of their worth, each in processes of its own with a time limit;
what does not fit is told as not run. --only takes some parts, and those that they need.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.measure.gpu_data import Place, weights_of
from tests.measure.gpu_goals import JSON, KINDS, exit_code, judge, shortfalls_of, status
from tests.measure.gpu_page import ON_CPU, PAGE, write
from tests.support.running import ROOT

_SUCCESS = 0
_LAST_LINES = 20
# Kept of the whole time, to write the page.
_SECONDS_TO_END = 3


@dataclass(frozen=True)
class Task:
    """A process that makes one part or several.

    limit: seconds after which it is ended. least: it is not begun with fewer left.
    """

    program: str
    parts: tuple[str, ...]
    limit: int
    least: int


# In the order of their worth. Those of a line run side by side, at most four processes of the job on the GPU; those
# that measure time have a line of their own.
LINES: tuple[tuple[Task, ...], ...] = (
    (Task("gpu_inside", ("machine",), 90, 5), Task("gpu_data", ("data",), 150, 5)),
    (Task("gpu_parts", ("run",), 300, 20),),
    (Task("gpu_inside", ("serve",), 120, 15), Task("gpu_parts", ("deterministic", "kill"), 300, 30)),
    (Task("gpu_parts", ("memory",), 240, 30),),
    (Task("gpu_turns", ("rates", "keras"), 480, 60),),
    (Task("gpu_parts", ("precision",), 300, 30),),
    (Task("gpu_parts", ("xla",), 300, 60),),
    (Task("gpu_inside", ("decode",), 150, 20),),
    (Task("gpu_parts", ("devices",), 300, 10),),
)
PARTS = tuple(part for line in LINES for task in line for part in task.parts)
ALWAYS = ("machine", "data")
NEEDS = {"serve": "run"}


def no_gpu() -> str | None:
    """Return why there is no GPU here and what to do, as one sentence; None where the driver lists one."""
    advice = "run this on a machine with an NVIDIA GPU and its driver, or add --cpu to exercise its logic without one"
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {hidden!r} and hides every GPU: unset it and {advice}"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"there is no GPU here, since the NVIDIA driver's library cannot be loaded ({error}): {advice}"
    count = ctypes.c_int()
    if driver.cuInit(0) != _SUCCESS or driver.cuDeviceGetCount(ctypes.byref(count)) != _SUCCESS or not count.value:
        return f"there is no GPU here, since the NVIDIA driver lists none: {advice}"
    return None


class Acceptance:
    """One run: what is known of each part, written after each."""

    def __init__(self, place: Place, wanted: Sequence[str], seconds: float) -> None:
        self._place = place
        self._wanted = [part for part in PARTS if part in wanted]
        self._begin = time.monotonic()
        self._seconds = seconds
        self.report: dict[str, Any] = {
            "title": f"GPU acceptance run: {ON_CPU}" if place.cpu else "GPU acceptance run",
            "cpu": place.cpu,
            "begun": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "seconds": seconds,
            "spent": 0.0,
            "finished": False,
            "not_asked_for": [part for part in PARTS if part not in wanted],
            "parts": {part: {"state": "not begun", "shortfalls": [], "found": None} for part in self._wanted},
        }

    def run(self) -> int:
        """Run all lines; return the exit code."""
        self._write()
        for line in LINES:
            tasks = [task for task in line if set(task.parts) & set(self._wanted)]
            if (why := self._hopeless()) is not None:
                for task in tasks:
                    self._leave_out(task, why)
            elif tasks:
                self._run_line(tasks)
        self.report["finished"] = True
        self._write()
        return exit_code(self.report)

    @property
    def _left(self) -> float:
        return self._begin + self._seconds - _SECONDS_TO_END - time.monotonic()

    def _hopeless(self) -> str | None:
        """Return why no further part can run."""
        for part in ALWAYS:
            known = self.report["parts"][part]
            if known["state"] == "ended" and any(kind in ("wrong", "failed") for kind, _ in known["shortfalls"]):
                return f"the part {part} did not pass"
        return None

    def _run_line(self, tasks: Sequence[Task]) -> None:
        """Run processes side by side, each to its end or its limit."""
        running: dict[Task, tuple[subprocess.Popen[bytes], float, float]] = {}
        try:
            for task in tasks:
                if (left := self._left) < task.least:
                    self._leave_out(task, f"out of time: {max(0, left):.0f} s were left")
                    continue
                limit = min(task.limit, left)
                running[task] = self._start(task, limit), time.monotonic(), limit
                self._note(task, {"state": "running"})
            while running:
                for task, (process, begin, limit) in list(running.items()):
                    spent = time.monotonic() - begin
                    if process.poll() is not None or spent > limit:
                        del running[task]
                        _end(process)
                        self._ended(task, process.returncode, spent, late=spent > limit)
                time.sleep(0.1)
        finally:
            for process, *_ in running.values():
                _end(process)

    def _start(self, task: Task, limit: float) -> subprocess.Popen[bytes]:
        wanted = [part for part in task.parts if part in self._wanted]
        arguments = [str(self._place.work), *(["--cpu"] if self._place.cpu else [])]
        if task.program != "gpu_data":
            arguments = [*wanted, *self._place.arguments, "--seconds", f"{limit:.0f}"]
        environment = self._place.environment({"PYTHONUNBUFFERED": "1"}, all_gpus=True)
        _say(f"{', '.join(wanted)}: begun, {self._left:.0f} s left")
        with self._log(task).open("wb") as log:
            # a group of its own, so that the processes that it starts can be ended with it
            return subprocess.Popen(
                [sys.executable, "-m", f"tests.measure.{task.program}", *arguments],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _ended(self, task: Task, code: int, spent: float, *, late: bool) -> None:
        """Judge the parts of a process that ended."""
        for part in task.parts:
            if part not in self._wanted:
                continue
            found = self._place.found(part)
            shortfalls = [list(each) for each in judge(part, found, cpu=self._place.cpu)] if found else []
            if found is None or not found["whole"]:
                how = f"was ended after {spent:.0f} s, its limit" if late else f"ended with exit code {code}"
                shortfalls.append(["failed", f"its process {how} before the part was through"])
            output = self._last_lines(task, spent) if any(kind == "failed" for kind, _ in shortfalls) else []
            known = {"state": "ended", "seconds": spent, "found": found, "shortfalls": shortfalls, "output": output}
            self._note(task, known, part)
            _say(f"{part}: {status(known)}, {spent:.0f} s")
        self._name_machine()

    def _last_lines(self, task: Task, spent: float) -> list[str]:
        """Return the last lines of what a process printed; where it was silent, of what it last started."""
        own = self._log(task)
        since = time.time() - spent - 1
        logs = [path for path in own.parent.glob("*.log") if path.stat().st_size and path.stat().st_mtime > since]
        newest = max(logs, key=lambda path: (path == own, path.stat().st_mtime), default=own)
        return newest.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]

    def _log(self, task: Task) -> Path:
        return self._place.log(f"part-{next(part for part in task.parts if part in self._wanted)}")

    def _name_machine(self) -> None:
        machine = self.report["parts"]["machine"]["found"]
        if machine and machine["gpus"]:
            self.report["title"] = f"GPU acceptance run: {len(machine['gpus'])} x {machine['gpus'][0]['name']}"

    def _leave_out(self, task: Task, why: str) -> None:
        self._note(task, {"state": "ended", "shortfalls": [["not run", f"not run: {why}"]]})

    def _note(self, task: Task, known: Mapping[str, Any], part: str | None = None) -> None:
        for each in task.parts if part is None else (part,):
            if each in self._wanted:
                self.report["parts"][each] |= known
        self._write()

    def _write(self) -> None:
        self.report["spent"] = time.monotonic() - self._begin
        write(self._place.output, without_places(self.report, self._place))


def without_places(report: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Return the report without the paths of this machine, which logs are full of: it is there to be sent on."""
    weights, _ = weights_of(place)
    names = {place.work: "WORK", place.output: "OUTPUT", weights.parent: "WEIGHTS", ROOT: "CHECKOUT", Path.home(): "~"}
    text = json.dumps(report)
    for path in sorted(names, key=lambda each: len(each.parts), reverse=True):
        if len(path.parts) > 1:
            text = text.replace(json.dumps(str(path))[1:-1], names[path])
    return dict(json.loads(text))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def _stopped(*_: object) -> NoReturn:
    sys.exit("asked to stop: what was found so far is kept")


def main(arguments: Sequence[str]) -> int:
    """Run the acceptance; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.gpu_acceptance", description="acceptance on a GPU")
    parser.add_argument("--cpu", action="store_true", help="everything small, on the CPU: no result of a GPU")
    parser.add_argument("--only", metavar="PART,PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=900.0, help="that it may take in all (default: 900)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", default=ROOT / "output" / "gpu")
    chosen = parser.parse_args(arguments)
    only = chosen.only.split(",") if chosen.only else list(PARTS)
    if unknown := [part for part in only if part not in PARTS]:
        parser.error(f"--only: received {', '.join(unknown)}; accepted: {', '.join(PARTS)}")
    if not chosen.cpu and (why := no_gpu()) is not None:
        sys.exit(f"gpu_acceptance: {why}")
    signal.signal(signal.SIGTERM, _stopped)
    output = chosen.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        run = Acceptance(
            Place(Path(work), output, chosen.cpu),
            [*ALWAYS, *only, *(NEEDS[part] for part in only if part in NEEDS)],
            chosen.seconds,
        )
        code = run.run()
    for name, each in shortfalls_of(run.report):
        sys.stdout.write(f"{name}: {KINDS[each.kind]}: {each.text}\n")
    sys.stdout.write(f"{output / PAGE} has the tables, {JSON} beside it all figures\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
