"""The tests in other places: kernels of another CPU, one core, a clock that has just begun, no home, another zone.

    python -m tests.elsewhere [--short] [--place NAME ...] [pytest's own arguments]

`make test-elsewhere` runs the whole suite in each place, more than an hour on two cores; with ``--short`` only what
computes and what waits, in one place that is all of them. Before its tests, a process in the place says whether it is
what it is called. It ends with 1 where a test failed, or where a place was made and is not what it should be. A place
that this machine cannot make is named with the reason.

A place is a prefix of the command and changes of its environment, so a failure is repeated by the line that is printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.support.running import ROOT

# What computes, and what waits or looks at a clock: three minutes on one core.
SHORT = (
    "tests/data/test_duplicates.py",
    "tests/data/test_row_cache.py",
    "tests/experiment/test_run.py",
    "tests/machine/test_console.py",
    "tests/models/test_export.py",
    "tests/models/test_frozen_features.py",
    "tests/models/test_fused_batch_norm.py",
    "tests/results/test_event_files.py",
    "tests/results/test_statistics.py",
    "tests/test_stopping.py",
    "tests/training/test_checkpoints.py",
    "tests/training/test_live_tensorboard.py",
    "tests/training/test_optimizers.py",
    "tests/training/test_trainer.py",
)
# The Chatham Islands, 12 h 45 min before Greenwich, as a rule: it needs no database of zones.
CHATHAM = "<+1245>-12:45<+1345>,M9.5.0/2:45,M4.1.0/3:45"


class CannotBeMadeError(Exception):
    """This machine has no such place; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where tests run.

    prefix: words before the command. environment: variables to set, or to leave out (None). checks: expressions in
    Python that are true there. umask: of the process, -1 for the one that is. workers: processes of pytest. lacks: why
    parts of it could not be made.
    """

    prefix: tuple[str, ...] = ()
    environment: dict[str, str | None] = field(default_factory=dict)
    checks: tuple[str, ...] = ()
    umask: int = -1
    workers: int = 2
    lacks: tuple[str, ...] = ()

    def __or__(self, other: Place) -> Place:
        """Return the place that is both."""
        return Place(
            self.prefix + other.prefix,
            self.environment | other.environment,
            self.checks + other.checks,
            max(self.umask, other.umask),
            min(self.workers, other.workers),
            self.lacks + other.lacks,
        )

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run Python there, with these options of subprocess.run."""
        kept = {name: value for name, value in os.environ.items() if name not in self.environment}
        changed = {name: value for name, value in self.environment.items() if value is not None}
        command = [*self.prefix, sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=kept | changed, umask=self.umask, check=False, **options)

    def says(self) -> str:
        """Return how a command there begins in a shell."""
        removed = [f"-u {name}" for name, value in self.environment.items() if value is None]
        changed = [shlex.quote(f"{name}={value}") for name, value in self.environment.items() if value is not None]
        umask = [f"umask {self.umask:03o};"] if self.umask >= 0 else []
        return " ".join([*umask, "env", *removed, *changed, *self.prefix])


def kernels(isa: str, numpy_levels: tuple[str, ...], *, onednn: bool = False) -> Place:
    """Return the machine with another CPU's kernels.

    Those of matrix products, which oneDNN makes, are of ``isa``. TensorFlow's operations are Eigen's, as on a CPU
    without AVX-512 VNNI, or oneDNN's as on this one. Of NumPy's, only these levels are left of those that it chooses
    between. OpenBLAS's are Haswell's.
    """
    if platform.machine() != "x86_64":
        raise CannotBeMadeError(f"{platform.machine()} has no instruction sets of x86-64")
    from numpy._core import _multiarray_umath as numpy_core

    chosen = [name for name in numpy_core.__cpu_dispatch__ if name not in numpy_levels]
    before = os.environ.get("NPY_DISABLE_CPU_FEATURES", "").split()
    disabled = [name for name in chosen if numpy_core.__cpu_features__[name] or name in before]
    environment: dict[str, str | None] = {"ONEDNN_MAX_CPU_ISA": isa, "OPENBLAS_CORETYPE": "Haswell"}
    environment["NPY_DISABLE_CPU_FEATURES"] = " ".join(disabled)
    environment["TF_ENABLE_ONEDNN_OPTS"] = "1" if onednn else "0"
    features = "__import__('numpy')._core._multiarray_umath.__cpu_features__"
    return Place(environment=environment, checks=(f"not any({features}[name] for name in {chosen})",))


def avx2() -> Place:
    """Return a machine without AVX-512."""
    return kernels("AVX2", ("X86_V3",))


def sse41() -> Place:
    """Return a machine as of 2008."""
    return kernels("SSE41", ())


def onednn_avx2() -> Place:
    """Return a machine without AVX-512 where TF_ENABLE_ONEDNN_OPTS=1 is set."""
    return kernels("AVX2", ("X86_V3",), onednn=True)


def onednn_sse41() -> Place:
    """Return a machine as of 2008 where TF_ENABLE_ONEDNN_OPTS=1 is set."""
    return kernels("SSE41", (), onednn=True)


def one_core() -> Place:
    """Return a machine with one core."""
    if not shutil.which("taskset"):
        raise CannotBeMadeError("taskset is not there: install util-linux")
    core = min(os.sched_getaffinity(0))
    return Place(("taskset", "--cpu-list", str(core)), checks=("len(os.sched_getaffinity(0)) == 1",), workers=1)


def young_clock() -> Place:
    """Return a machine that was started two seconds ago, by its monotonic clocks."""
    # where this process is in such a namespace itself, offsets are still those to the machine's own clocks
    there = Path("/proc/self/timens_offsets")
    before = (
        {name: int(seconds) for name, seconds, _ in map(str.split, there.read_text().splitlines())}
        if there.exists()
        else {}
    )
    offsets = []
    for name in ("monotonic", "boottime"):
        now = time.clock_gettime(getattr(time, f"CLOCK_{name.upper()}"))
        offsets += [f"--{name}", str(before.get(name, 0) + 2 - int(now))]
    reasons = []
    # as root, or else as the same user in a namespace of its own
    for user in ((), ("--user", "--map-current-user")):
        prefix = ("unshare", *user, "--time", *offsets, "--fork", "--kill-child")
        try:
            tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise CannotBeMadeError("unshare is not there: install util-linux") from None
        if tried.returncode == 0:
            return Place(prefix, checks=("0 < time.monotonic() < 600",))
        reasons.append(tried.stderr.strip())
    raise CannotBeMadeError(f"no time namespace: {'; '.join(reasons)}")


def bare() -> Place:
    """Return a machine where nothing is set up: no HOME, the C locale, files of one's own, a zone with odd minutes."""
    environment: dict[str, str | None] = {"HOME": None, "LANG": None, "LC_ALL": "C", "TZ": CHATHAM}
    checks = ("'HOME' not in os.environ", "time.strftime('%z') in ('+1245', '+1345')", "os.umask(0o077) == 0o077")
    return Place(environment=environment, checks=checks, umask=0o077)


def everything() -> Place:
    """Return the machine that is all of these, as far as it can be made."""
    made, reasons = Place(), []
    for part in (young_clock, one_core, avx2, bare):
        try:
            made |= part()
        except CannotBeMadeError as error:
            reasons.append(str(error))
    return made | Place(lacks=tuple(reasons))


PLACES = {
    "avx2": avx2,
    "sse41": sse41,
    "onednn-avx2": onednn_avx2,
    "onednn-sse41": onednn_sse41,
    "one-core": one_core,
    "young-clock": young_clock,
    "bare": bare,
}
SHORT_PLACES = {"everything": everything}


def outcome(name: str, pytest_arguments: list[str]) -> tuple[bool, str]:
    """Run the tests in the place; return whether all is well, and the rest of the place's row."""
    begin = time.monotonic()
    try:
        place = (PLACES | SHORT_PLACES)[name]()
    except CannotBeMadeError as error:
        return True, f"cannot be made on this machine: {error}"
    for check in place.checks:
        if place.run("-c", f"import os, time; assert {check}").returncode:
            return False, f"was made, and is not what it should be: {check}"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        arguments = ["-m", "pytest", "-n", str(place.workers), *pytest_arguments]
        print(f"\n{name}: {place.says()} {shlex.join(['.venv/bin/python', *arguments])}", flush=True)  # noqa: T201
        code = place.run(*arguments, "--junitxml", str(report)).returncode
        if not report.exists():
            return False, f"pytest ended with {code} and without a report"
        (suite,) = ElementTree.parse(report).iter("testsuite")  # noqa: S314  (pytest's own)
    counts = {each: int(suite.attrib[each]) for each in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    row = (
        f"{passed:6} passed {failed:4} failed {counts['skipped']:4} skipped {(time.monotonic() - begin) / 60:6.1f} min"
    )
    return code == 0, "".join([row, *(f"\n    it lacks what this machine cannot make: {lack}" for lack in place.lacks)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.elsewhere", description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help=f"{', '.join(SHORT_PLACES)}: what computes and what waits")
    parser.add_argument(
        "--place", action="append", choices=[*PLACES, *SHORT_PLACES], help="only this one; may be repeated"
    )
    chosen, pytest_arguments = parser.parse_known_args()
    if chosen.short and not any(Path(ROOT, word.partition("::")[0]).exists() for word in pytest_arguments):
        pytest_arguments += SHORT
    names = chosen.place or (SHORT_PLACES if chosen.short else PLACES)
    rows = {name: outcome(name, pytest_arguments) for name in names}
    table = "\n".join(f"{name:12} {row}" for name, (_, row) in rows.items())
    print(f"\n{table}")  # noqa: T201
    return 0 if all(well for well, _ in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
