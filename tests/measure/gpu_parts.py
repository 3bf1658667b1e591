"""The parts of the GPU acceptance run that start the real command: what each finds, as JSON, judged elsewhere.

    python -m tests.measure.gpu_parts run    of what gpu_data prepared in output/gpu/work; see ``gpu_acceptance``

A part records how every process ended, and goes on where one fails; what that means is for ``gpu_goals`` to say.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.measure.gpu_data import Found, Place, alone, demo, generated, rated, run_program
from tests.support.running import ROOT

TAIL = 20
AT_ONCE = 4
# Long enough to be killed in the middle, and saved often enough to go on from there.
INTERRUPTED = {"deterministic": "true", "epochs": "4", "checkpoint_seconds": "0.2"}
# Bytes that a training step of --cpu's few blocks keeps of an image, for each of its pixels.
_BYTES_PER_PIXEL = 611
# Of the large split that the check of memory is given with --cpu.
_MANY = 900
# The larger of two batches: what a GPU has enough to do with, of the steps that several share.
_BATCH_OF_DEVICE = 256


@dataclass(frozen=True)
class Done:
    """A process of the job that ended. lines: of its log. output: where it published."""

    code: int
    seconds: float
    lines: list[dict[str, Any]]
    tail: list[str]
    output: Path

    @property
    def folder(self) -> Path | None:
        """Return the published run; None where there is none."""
        return next((path.parent for path in self.output.glob("*/manifest.json")), None)

    @property
    def manifest(self) -> dict[str, Any]:
        """Return the manifest, empty where nothing is published."""
        folder = self.folder
        return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))) if folder else {}


def job(
    place: Place,
    name: str,
    environment: Mapping[str, str],
    *arguments: str,
    command: Sequence[str] = ("-m", "job"),
    all_gpus: bool = False,
) -> Done:
    """Run the job to its end; its log is ``name``'s. command: what Python is to run."""
    settings = dict(environment) | place.places(name)
    log = place.log("-".join([name, *(each for each in arguments if each.isalpha())]))
    start = time.perf_counter()
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, *command, *arguments],
            cwd=ROOT,
            env=place.environment(settings, all_gpus=all_gpus),
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return ended(done.returncode, time.perf_counter() - start, log.read_text("utf-8", "replace"), settings)


def ended(code: int, seconds: float, text: str, settings: Mapping[str, str]) -> Done:
    """Return a process of the job that ended, from what it printed."""
    lines = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                lines.append(json.loads(line))
            except ValueError:  # the last line of a killed process may be cut short
                continue
    return Done(code, seconds, lines, text.splitlines()[-TAIL:], Path(settings["TRANSFER_OUTPUT_URI"]))


def several(place: Place, environments: Mapping[str, Mapping[str, str]]) -> dict[str, Done]:
    """Run jobs under these names at once, at most four."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = pool.map(lambda each: job(place, *each), environments.items())
        return dict(zip(environments, done, strict=True))


def told(done: Done) -> Found:
    """Return what is kept of a job: how it ended and, of what it published, accuracies, seconds and rates."""
    manifest = done.manifest
    environment = manifest.get("environment", {})
    arms = {
        result["arm"]: {
            "accuracy": result["metrics"]["test"]["accuracy"],
            "interval": result["metrics"]["test"]["accuracy_interval"],
            "seconds": result["seconds"],
            "examples_per_second": result["examples_per_second"],
            "energy_joules": result.get("energy_joules"),
            "resumed": result["resumed"],
        }
        for result in manifest.get("results", ())
    }
    return {
        "code": done.code,
        "seconds": done.seconds,
        **{name: environment.get(name) for name in ("devices", "precision", "tf32", "xla", "deterministic")},
        "arms": arms,
        "output": done.tail if done.code else [],
    }


# --- parts -------------------------------------------------------------------------------------------------------


def run(place: Place) -> Found:
    """Run the quickstart as it comes, and verify what it published."""
    done = job(place, "run", demo(place))
    verified = job(place, "run", {}, "verify", str(done.folder)).code if done.folder else None
    log = [str(line.get("message")) for line in done.lines]
    return told(done) | {"verify": verified, "log": log}


def repeats(place: Place, wanted: Sequence[str], _seconds: float) -> None:
    """Run one deterministic comparison twice and, beside them, a third time that is killed and started again."""
    settings = demo(place, **INTERRUPTED)
    work: dict[str, Callable[[], Any]] = {name: partial(job, place, name, settings) for name in ("once", "again")}
    if "deterministic" not in wanted:
        del work["again"]
    if "kill" in wanted:
        work["killed"] = lambda: _killed_and_started_again(place, settings)
    with ThreadPoolExecutor(len(work)) as pool:
        futures = {name: pool.submit(each) for name, each in work.items()}
        done: dict[str, Any] = {name: future.result() for name, future in futures.items()}
    once = done["once"]
    if "again" in done:
        runs = {name: told(done[name]) for name in ("once", "again")}
        place.keep("deterministic", {"runs": runs} | _compared(once, done["again"]))
    if "killed" in done:
        killed, last = done["killed"]
        place.keep("kill", killed | {"undisturbed": told(once), "run": told(last)} | _compared(once, last))


def _killed_and_started_again(place: Place, settings: Mapping[str, str]) -> tuple[Found, Done]:
    """Kill the job as soon as an epoch and a checkpoint are there; return where it was, and how its successor ended."""
    import signal

    from tests.support.kills import checkpoints_in, moment_of, started

    environment = place.environment(dict(settings) | place.places("killed"))
    output = Path(environment["TRANSFER_OUTPUT_URI"])
    with started(environment) as running:
        trained = running.until(r"^scratch: epoch \d")
        while trained and running.process.poll() is None and not checkpoints_in(output):
            time.sleep(0.005)
        alive = running.process.poll() is None
        if alive:
            running.send(signal.SIGKILL)
        end = running.end()
        place.log("killed-first").write_text(end.errors)
    found = {"killed": alive and end.code == -signal.SIGKILL, "at": str(moment_of(running.messages)), "code": end.code}
    return found, job(place, "killed", settings)


def _compared(one: Done, other: Done) -> Found:
    """Return how many files of predictions and variables were compared byte for byte, and which differ."""
    from tests.measure.same_results import compared, differences

    if one.folder is None or other.folder is None:
        return {"compared": 0, "differing": [], "further": []}
    paths = {
        path.relative_to(folder).as_posix()
        for folder in (one.folder, other.folder)
        for pattern in ("arms/**/predictions.csv", "arms/**/variables/*")
        for path in folder.glob(pattern)
    }
    further = list(differences(compared(one.folder), compared(other.folder)))
    differing = [path for path in sorted(paths) if _bytes(one.folder / path) != _bytes(other.folder / path)]
    return {"compared": len(paths), "differing": differing, "further": further[:TAIL]}


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def memory(place: Place) -> Found:
    """Ask ``plan`` for a batch that cannot fit, then for the one that it names."""
    settings = _too_large(place)
    refused = job(place, "memory-refused", settings, "plan")
    errors = [line for line in refused.lines if line.get("variable")]
    said = str(errors[0]["message"]) if errors else ""
    number = re.search(r"at most ([\d,]+)", said)
    found: Found = {
        "refused": told(refused),
        "variable": errors[0]["variable"] if errors else None,
        "message": said,
        "number": int(number[1].replace(",", "")) if number else None,
    }
    if found["number"]:
        # the number named fills the memory: with --cpu that of a machine which others use, too
        batch = min(found["number"], 16) if place.cpu else found["number"]
        fitting = job(place, "memory-fitting", settings | {"TRANSFER_BATCH_SIZE": str(batch)}, "plan")
        found |= {"batch": batch, "fitting": told(fitting)}
    return found


def _too_large(place: Place) -> dict[str, str]:
    if not place.cpu:
        large = {"backbone": "ResNet152", "image_size": "512", "arms": "scratch", "batch_size": "8192"}
        settings = demo(place, **large)
        del settings["TRANSFER_WEIGHTS"]  # scratch needs none, and those are another network's
        return settings
    from job.machine.limits import memory_limit

    # twice what there is, for a step on the whole split; a pass without gradients then takes a twentieth
    side = math.isqrt(2 * memory_limit() // (_MANY * _BYTES_PER_PIXEL))
    size = str(min(4096, side))
    return generated(place, (_MANY, 50, 50), arms="scratch", epochs="1", image_size=size, batch_size="8192")


def precision(place: Place) -> Found:
    """Train in every precision at once, and in float32 without TF32 too."""
    settings = demo(place)
    environments = {
        "float32": settings | {"TRANSFER_PRECISION": "float32"},
        "float32-without-tf32": settings | {"TRANSFER_PRECISION": "float32", "NVIDIA_TF32_OVERRIDE": "0"},
        "mixed_float16": settings | {"TRANSFER_PRECISION": "mixed_float16"},
        "mixed_bfloat16": settings | {"TRANSFER_PRECISION": "mixed_bfloat16"},
    }
    return {"runs": {name: told(done) for name, done in several(place, environments).items()}}


def xla(place: Place) -> Found:
    """Train with XLA and without, one after the other: their seconds are compared."""
    return {"runs": {mode: told(job(place, f"xla-{mode}", demo(place, xla=mode))) for mode in ("off", "on")}}


def devices(place: Place) -> Found:
    """Train on one device and on all; with --cpu, on the CPU as one device and divided in two."""
    known = place.found("machine") or {}
    count = 2 if place.cpu else len(known.get("gpus", ()))
    if count < 2:
        return {"count": count}
    runs, rates = {}, {}
    for name, number in (("one", 1), ("all", count)):
        work = partial(job, command=_command(number if place.cpu else 1), all_gpus=number > 1)
        runs[name] = told(work(place, f"devices-{name}", demo(place)))
        batch = number * (place.sizes.batches[0] if place.cpu else _BATCH_OF_DEVICE)
        # without XLA on both sides: what several devices exchange cannot be compiled
        steps = rated(place, arms="scratch", epochs="2", batch_size=str(batch), xla="off")
        rates[name] = told(work(place, f"devices-rate-{name}", steps))
    return {"count": count, "runs": runs, "rates": rates}


def _command(devices: int) -> tuple[str, ...]:
    """Return what Python runs, so that the job sees the CPU as so many devices where there are several."""
    from tests.support.group import _DIVIDED

    return ("-m", "job") if devices == 1 else ("-c", _DIVIDED.format(devices=devices))


PARTS = {function.__name__: alone(function) for function in (run, memory, precision, xla, devices)} | {
    "deterministic": repeats,
    "kill": repeats,
}

if __name__ == "__main__":
    run_program("gpu_parts", "parts of the GPU acceptance run", PARTS)
