"""What falls short of the goals of the GPU acceptance run, in words, from what its parts found.

    python -m tests.measure.gpu_goals FOLDER    judges FOLDER/gpu_acceptance.json anew; ends with 1 where something does

A shortfall is of a kind: ``wrong`` where a result is, ``slower`` than a goal, ``failed`` where a part crashed or ran
out of its time, ``not run`` where the whole did.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

JSON = "gpu_acceptance.json"
ARMS = ("scratch", "frozen", "fine_tune")
SHARE_OF_BARE_STEP, UTILISATION, SHARE_OF_DECODING, SHARE_OF_LINEAR, AGREEMENT = 0.95, 0.90, 0.90, 0.90, 0.99
TIMES_KERAS = {"frozen": 10.0, "fine_tune": 3.0}
# Where the manifest has no proof of the export with a tolerance of its own.
PROBABILITY = 0.05
# The job's default: what the rates of plain Keras are compared over.
EPOCHS, HEAD_EPOCHS = 10, 2
KINDS = {"wrong": "wrong", "failed": "failed", "slower": "slower than the goal", "not run": "not run"}

Found = Mapping[str, Any]


class Shortfall(NamedTuple):
    """What falls short: its kind, and a sentence that says of what."""

    kind: str
    text: str


def judge(part: str, found: Found, *, cpu: bool = False) -> list[Shortfall]:
    """Return what falls short in a part. On a CPU no speed is judged: the goals are those of a GPU."""
    shortfalls = list(_JUDGES[part](found)) if part in _JUDGES else []
    return [each for each in shortfalls if not (cpu and each.kind == "slower")]


def _wrong(text: str) -> Shortfall:
    return Shortfall("wrong", text)


def _slower(text: str, goal: str) -> Shortfall:
    return Shortfall("slower", f"{text}; the goal is {goal}")


def _ended_well(name: str, run: Found) -> Iterator[Shortfall]:
    if run["code"] != 0:
        yield _wrong(f"{name} ended with exit code {run['code']}")


def _apart(name: str, run: Found, other_name: str, other: Found) -> Iterator[Shortfall]:
    """Yield the arms whose intervals of test accuracy do not overlap."""
    for arm, result in run["arms"].items():
        if arm in other["arms"]:
            (low, high), (least, most) = result["interval"], other["arms"][arm]["interval"]
            if low > most or high < least:
                accuracies = f"{result['accuracy']:.3f} and {other['arms'][arm]['accuracy']:.3f}"
                yield _wrong(f"{arm} differs between {name} and {other_name}: test accuracy {accuracies}")


def _machine(found: Found) -> Iterator[Shortfall]:
    if "why_none" in found:
        yield _wrong(f"TensorFlow can use no GPU: {found['why_none']}")


def _run(found: Found) -> Iterator[Shortfall]:
    yield from _ended_well("the quickstart", found)
    if found["code"] == 0 and found["verify"] != 0:
        yield _wrong(f"verify of the published run ended with exit code {found['verify']}")
    if missing := [arm for arm in ARMS if arm not in found["arms"]]:
        yield _wrong(f"the published run has no {', '.join(missing)}")


def _precision(found: Found) -> Iterator[Shortfall]:
    runs = found["runs"]
    for name, run in runs.items():
        yield from _ended_well(name, run)
        yield from _apart(name, run, "float32", runs["float32"])
        if run["code"] == 0 and run["precision"] != name.partition("-")[0]:
            yield _wrong(f"{name} was asked for, and the manifest says {run['precision']}")
        if name.endswith("without-tf32") and run["tf32"]:
            yield _wrong("TF32 was switched off by NVIDIA_TF32_OVERRIDE=0, and the manifest says that it was used")


def _xla(found: Found) -> Iterator[Shortfall]:
    runs = found["runs"]
    for mode, run in runs.items():
        yield from _ended_well(f"XLA {mode}", run)
        if run["code"] == 0 and run["xla"] is not (mode == "on"):
            yield _wrong(f"XLA {mode} was asked for, and the manifest says {run['xla']}")
    yield from _apart("XLA on", runs["on"], "XLA off", runs["off"])


def _same_files(what: str, found: Found) -> Iterator[Shortfall]:
    if differing := found["differing"]:
        named = ", ".join(differing[:3])
        yield _wrong(f"{what}: {len(differing)} of {found['compared']} files differ, such as {named}")
    elif not found["compared"]:
        yield _wrong(f"{what}: there are no files to compare")


def _deterministic(found: Found) -> Iterator[Shortfall]:
    for name, run in found["runs"].items():
        yield from _ended_well(f"the deterministic run ({name})", run)
    yield from _same_files("two deterministic runs", found)


def _kill(found: Found) -> Iterator[Shortfall]:
    if not found["killed"]:
        yield _wrong(f"the run could not be killed in time: it ended with exit code {found['code']} before")
    yield from _ended_well("the undisturbed run", found["undisturbed"])
    yield from _ended_well("the run that was killed and started again", found["run"])
    if found["run"]["code"] == 0 and not any(arm["resumed"] for arm in found["run"]["arms"].values()):
        yield _wrong("the run that was started again began anew instead of going on")
    yield from _same_files("a run that was killed, and one that was not", found)


def _memory(found: Found) -> Iterator[Shortfall]:
    if (code := found["refused"]["code"]) != 78:
        yield _wrong(f"plan of a batch that cannot fit ended with exit code {code} instead of 78")
    elif found["variable"] != "TRANSFER_BATCH_SIZE":
        yield _wrong(f"plan of a batch that cannot fit names {found['variable']} instead of TRANSFER_BATCH_SIZE")
    elif found["number"] is None:
        yield _wrong(f"plan of a batch that cannot fit names no number that does: {found['message']}")
    elif (code := found["fitting"]["code"]) != 0:
        yield _wrong(f"plan of the batch of {found['batch']} that was named ended with exit code {code}")


def off_and_accepted(served: Found) -> tuple[float, float, str]:
    """Return how far what is served is off, how far it may be, and of what: logits where the manifest has a proof."""
    if served["proof"]:
        return served["largest_logit_difference"], served["proof"]["tolerance"], "a logit"
    return served["largest_difference"], PROBABILITY, "a probability"


def _serve(found: Found) -> Iterator[Shortfall]:
    if not found["arms"]:
        yield _wrong("no model was served")
    for arm, served in found["arms"].items():
        off, accepted, of = off_and_accepted(served)
        if not off <= accepted:
            yield _wrong(f"{arm}'s model, served on the CPU, is off by {off:.3g} in {of}; {accepted:.3g} is accepted")
        if not served["agreement"] >= AGREEMENT:
            share = f"{served['agreement']:.1%} of {served['examples']} test photos"
            yield _wrong(f"{arm}'s model, served on the CPU, names the same class for {share}; the goal is 99%")


def _devices(found: Found) -> Iterator[Shortfall]:
    if found["count"] < 2:
        return
    for kind in ("runs", "rates"):
        for name, run in found[kind].items():
            yield from _ended_well("the run on one device" if name == "one" else "the run on all devices", run)
    yield from _apart("all devices", found["runs"]["all"], "one", found["runs"]["one"])
    if (share := linear_share(found)) is not None and share < SHARE_OF_LINEAR:
        yield _slower(f"scratch on {found['count']} devices reaches {share:.0%} of linear", f"{SHARE_OF_LINEAR:.0%}")


def linear_share(found: Found) -> float | None:
    """Return the rate of all devices as a share of so many times that of one; None where it is not known."""
    rates = [found["rates"][name]["arms"].get("scratch", {}).get("examples_per_second") for name in ("one", "all")]
    return None if None in rates else rates[1] / (found["count"] * rates[0])


def _rates(found: Found) -> Iterator[Shortfall]:
    for batch, workers in found["batches"].items():
        yield from _faults(batch, workers)
        for name, worker in workers.items():
            for arm, rate in worker["arms"].items():
                if rate["share"] < SHARE_OF_BARE_STEP:
                    said = f"{arm} at batch {batch} ({name}) trains at {rate['share']:.1%} of its bare step rate"
                    yield _slower(said, f"{SHARE_OF_BARE_STEP:.0%}")
        # of the two ways to run the steps, a long training takes the faster
        name, rate = fastest(workers, "job", "scratch")
        if "memory" in rate and "utilisation" not in rate:
            yield Shortfall("failed", f"how busy the GPU is at batch {batch} was not told")
        elif rate.get("utilisation", 1.0) < UTILISATION:
            said = f"scratch at batch {batch} ({name}) keeps the GPU busy {rate['utilisation']:.0%} of the time"
            yield _slower(said, f"{UTILISATION:.0%}")
    yield from _unmeasured(found)


def _faults(batch: str, workers: Found) -> Iterator[Shortfall]:
    for name, worker in workers.items():
        if worker["fault"]:
            yield Shortfall("failed", f"{name} at batch {batch}: {worker['fault']}")


def _unmeasured(found: Found) -> Iterator[Shortfall]:
    for batch in found["sizes"]:
        if str(batch) not in found["batches"]:
            yield Shortfall("not run", f"nothing was measured at batch {batch}: out of time")


def fastest(workers: Found, who: str, arm: str) -> tuple[str, dict[str, float]]:
    """Return which of ``who``'s processes trains an arm the fastest, and its rates; empty where none was measured."""
    own = [(name, worker["arms"]) for name, worker in workers.items() if name.startswith(who)]
    measured = [(name, arms[arm]) for name, arms in own if arm in arms]
    return max(measured, key=lambda each: each[1]["training"], default=("", {}))


def seconds_of_arm(workers: Found, who: str, arm: str, examples: int) -> float | None:
    """Return the seconds of an arm's ten epochs without compilation and validation; None where they are not known.

    Each phase as ``who`` trains it faster, with XLA or without. fine_tune begins with two epochs of the head alone. The
    job's frozen layers run once for each photo, before the first epoch.
    """
    head_epochs = HEAD_EPOCHS if arm == "fine_tune" else 0
    rate, of_head = (fastest(workers, who, each)[1].get("training") for each in (arm, "frozen" if head_epochs else arm))
    if rate is None or of_head is None:
        return None
    seconds = head_epochs * examples / of_head + (EPOCHS - head_epochs) * examples / rate
    if who == "job" and arm != "scratch":
        passes = [worker["ready"].get("features") for name, worker in workers.items() if name.startswith(who)]
        if not any(passes):
            return None
        seconds += examples / max(filter(None, passes))
    return seconds


def times_keras(workers: Found, arm: str, examples: int) -> float | None:
    """Return how many times as fast as tuned Keras the job trains an arm; None where it is not known."""
    ours, theirs = (seconds_of_arm(workers, who, arm, examples) for who in ("job", "Keras"))
    return None if ours is None or theirs is None else theirs / ours


def _keras(found: Found) -> Iterator[Shortfall]:
    for batch, workers in found["batches"].items():
        yield from _faults(batch, {name: each for name, each in workers.items() if name.startswith("Keras")})
        for arm, goal in TIMES_KERAS.items():
            times = times_keras(workers, arm, found["examples"])
            if times is None:
                yield Shortfall("failed", f"{arm} at batch {batch} could not be compared with tuned Keras")
            elif times < goal:
                yield _slower(f"{arm} at batch {batch} trains {times:.1f} times as fast as tuned Keras", f"{goal:g}")
    yield from _unmeasured(found)


def _decode(found: Found) -> Iterator[Shortfall]:
    if found["share"] < SHARE_OF_DECODING:
        said = f"photos are read at {found['share']:.0%} of the rate of decoding alone"
        yield _slower(said, f"{SHARE_OF_DECODING:.0%}")


_JUDGES: dict[str, Callable[[Found], Iterator[Shortfall]]] = {
    "machine": _machine,
    "run": _run,
    "serve": _serve,
    "deterministic": _deterministic,
    "kill": _kill,
    "memory": _memory,
    "rates": _rates,
    "keras": _keras,
    "precision": _precision,
    "xla": _xla,
    "decode": _decode,
    "devices": _devices,
}


# --- the whole ---------------------------------------------------------------------------------------------------


def shortfalls_of(report: Found) -> list[tuple[str, Shortfall]]:
    """Return everything that falls short, with its part, the worst kind first."""
    every = [(name, Shortfall(*each)) for name, part in report["parts"].items() for each in part["shortfalls"]]
    return sorted(every, key=lambda each: list(KINDS).index(each[1].kind))


def status(part: Found) -> str:
    """Return in words how a part ended: passed, or the worst of what falls short."""
    if part["state"] != "ended":
        return str(part["state"])
    kinds = [kind for kind in KINDS if kind in {each[0] for each in part["shortfalls"]}]
    return KINDS[kinds[0]] if kinds else "passed"


def exit_code(report: Found) -> int:
    """Return 0 where all parts ran and nothing falls short, else 1."""
    return int(any(status(part) != "passed" for part in report["parts"].values()))


def judged_anew(report: Found) -> dict[str, Any]:
    """Return the report with every part held against the goals as they are now."""
    parts = {}
    for name, part in report["parts"].items():
        kept = [each for each in part["shortfalls"] if each[0] in ("failed", "not run")]
        found = [list(each) for each in judge(name, part["found"], cpu=report["cpu"])] if part["found"] else []
        parts[name] = {**part, "shortfalls": [*found, *(each for each in kept if each not in found)]}
    return {**report, "parts": parts}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.gpu_goals", description="what falls short")
    parser.add_argument("folder", type=Path)
    report = judged_anew(json.loads((parser.parse_args().folder / JSON).read_text(encoding="utf-8")))
    for name, each in shortfalls_of(report):
        sys.stdout.write(f"{name}: {KINDS[each.kind]}: {each.text}\n")
    return exit_code(report)


if __name__ == "__main__":
    sys.exit(main())
