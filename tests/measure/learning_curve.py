"""How accuracy grows with examples: 40 results of the job beside 8 of tuned plain Keras; half an hour on two cores.

    python -m tests.measure.learning_curve [--rounds 1] [--output FOLDER] [--quick]

The job trains frozen and fine_tune at four fractions and five seeds in one process; tuned plain Keras
(``plain_keras.py`` beside this) trains the same two arms at the same fractions, at one seed, in one process. Both are
timed from start to end, the job with its 40 SavedModels exported and published. Then the job trains scratch at one
seed. Standard output gets Markdown for docs/, standard error the progress. ``--output`` keeps the published runs;
``--quick`` only shows that everything runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.measure.bench import DEFAULT, QUICK, ProcessError, execute, machine, run_job, say
from tests.measure.bench_report import spread
from tests.support.real import CATS

FRACTIONS = "0.02,0.1,0.5,1.0"
CURVE = DEFAULT | {
    "TRANSFER_TRAIN_SPLIT": "train[:25%]",
    "TRANSFER_VALIDATION_SPLIT": "train[25%:35%]",
    "TRANSFER_TEST_SPLIT": "train[60%:]",
    "TRANSFER_TRAIN_FRACTIONS": FRACTIONS,
}
PRETRAINED = {"TRANSFER_ARMS": "frozen,fine_tune", "TRANSFER_SEEDS": "0,1,2,3,4"}
SCRATCH = {"TRANSFER_ARMS": "scratch", "TRANSFER_SEEDS": "0"}


def accuracies(manifests: Sequence[dict[str, Any]]) -> str:
    """Return a table of test accuracies with 95% intervals: a row for each fraction, a column for each arm.

    The last column has what fine_tune is ahead of frozen over all seeds, in points.
    """
    found = {(one["train_fraction"], one["arm"]): one for manifest in manifests for one in manifest["summaries"]}
    ahead = {
        one["train_fraction"]: _ahead(one)
        for manifest in manifests
        for one in manifest["comparisons"]
        if len(one["seeds"]) > 1
    }
    fractions = sorted({fraction for fraction, _ in found})
    arms = list(dict.fromkeys(arm for _, arm in found))
    seeds = {arm: len(one["seeds"]) for (_, arm), one in found.items()}
    heads = [f"{arm} ({seeds[arm]} seed{'s' * (seeds[arm] > 1)})" for arm in arms]
    lines = [["training photos", *heads, "fine_tune - frozen, points"], ["---:"] + ["---"] * (len(arms) + 1)]
    for fraction in fractions:
        cells = [found[fraction, arm] for arm in arms]
        told = [f"{one['test_accuracy']:.3f} ({one['interval'][0]:.3f} - {one['interval'][1]:.3f})" for one in cells]
        lines.append([f"{cells[0]['train_examples']:,}", *told, ahead.get(fraction, "")])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _ahead(comparison: dict[str, Any]) -> str:
    sign = 1 if comparison["better"] == "fine_tune" else -1
    difference, *bounds = (100 * sign * value for value in (comparison["difference"], *comparison["interval"]))
    low, high = sorted(bounds)
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"


def verdicts(manifest: dict[str, Any]) -> str:
    """Return what the run says of the arms over all seeds."""
    compared = [one["verdict"] for one in manifest["comparisons"] if len(one["seeds"]) > 1]
    return "".join(f"{line}\n" for line in (manifest["verdict"], "", *(f"- {verdict}" for verdict in compared)))


def measure(environment: dict[str, str], rounds: int, folder: Path) -> str:
    """Run everything, in turns, and return the report."""
    walls: dict[str, list[float]] = {"job": [], "keras": []}
    manifest: dict[str, Any] = {}
    for number in range(rounds):
        for name in ("job", "keras") if number % 2 == 0 else ("keras", "job"):
            own = folder / f"{number}-{name}"
            own.mkdir(parents=True)
            say(f"round {number + 1}/{rounds}: {name}")
            if name == "job":
                done, manifest = run_job(environment | PRETRAINED, own)
            else:
                done = execute(["tests.measure.plain_keras", "tuned"], environment | PRETRAINED, own / "log")
            walls[name].append(done.wall)
            say(f"  {done.wall:.1f} s")
    say("scratch")
    own = folder / "scratch"
    own.mkdir()
    done, scratch = run_job(environment | SCRATCH, own)
    say(f"  {done.wall:.1f} s")
    splits = manifest["dataset"]["splits"]
    photos = " / ".join(f"{splits[name]['examples']:,}" for name in ("train", "validation", "test"))
    ratios = [keras / job for keras, job in zip(walls["keras"], walls["job"], strict=True)]
    results = len(manifest["results"])
    return (
        f"{machine()}. {manifest['dataset']['name']}, {photos} photos to train on, validate and test.\n\n"
        f"- the job, {results} results exported and published: {median(walls['job']):.0f} s\n"
        f"- tuned plain Keras, {len(FRACTIONS.split(',')) * 2} results: {median(walls['keras']):.0f} s\n"
        f"- Keras / job: {spread(ratios, '{:.2f}')} ({rounds} rounds)\n\n"
        f"{accuracies([manifest, scratch])}\n{verdicts(manifest)}"
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.learning_curve", description="accuracy by examples")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of both programs (default: 1)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="keep runs and logs there")
    parser.add_argument("--quick", action="store_true", help="a few photos: shows that it runs, measures nothing")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"received --rounds {options.rounds}, accepted: at least 1")
    if (missing := CATS.missing()) is not None:
        sys.exit(f"cats_vs_dogs cannot be measured: {missing}")
    environment = CURVE | {name: QUICK[name] for name in QUICK.keys() - DEFAULT.keys()} if options.quick else CURVE
    with tempfile.TemporaryDirectory() as temporary:
        try:
            text = measure(environment, options.rounds, (options.output or Path(temporary)).absolute())
        except ProcessError as error:
            sys.exit(str(error))
    sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
