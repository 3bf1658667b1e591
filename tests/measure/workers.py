"""What a second worker, and a second device, is worth: images a second, each worker on a core of its own.

``python -m tests.measure.workers`` trains MobileNetV2 at 160 px on photos of ../shared, in four ways by turns, and
prints a table. One core against two is the fair comparison on one machine: two workers on the same cores share them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.support.group import start, tf_config
from tests.support.kills import Running
from tests.support.real import CATS
from tests.support.running import published_in
from tests.support.servers import free_port

ARMS = ("scratch", "frozen", "fine_tune")
# name: the cores of each worker, and the devices that each divides its own into
WAYS: dict[str, tuple[tuple[Sequence[int], ...], int]] = {
    "one worker on one core": (([0],), 1),
    "one worker on two cores": (([0, 1],), 1),
    "two workers on one core each": (([0], [1]), 1),
    "one worker, two devices on two cores": (([0, 1],), 2),
}


def measure(way: str, environment: dict[str, str], output: Path) -> dict[str, float]:
    """Return the images a second of every arm: in the last phase's steps, the first call left out."""
    cores, devices = WAYS[way]
    ports = [free_port() for _ in cores]
    workers: list[Running] = []
    allowed = os.sched_getaffinity(0)
    try:
        for index, on in enumerate(cores):
            told = {"TF_CONFIG": tf_config(ports, index)} if len(cores) > 1 else {}
            os.sched_setaffinity(0, on)  # which the process inherits
            workers.append(start(environment | told | {"TRANSFER_OUTPUT_URI": str(output)}, devices=devices))
    finally:
        os.sched_setaffinity(0, allowed)
    for worker in workers:
        run = worker.end(3600)
        if run.code:
            sys.exit(run.errors)
    _, manifest = published_in(output)
    return {result["arm"]: result["examples_per_second"] for result in manifest["results"]}


def main() -> None:
    """Print images a second of every way and arm, medians, and the ratio to one worker on one core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--examples", type=int, default=320)
    chosen = parser.parse_args()
    if missing := CATS.missing():
        sys.exit(missing)
    environment = CATS.environment | {
        "TRANSFER_TRAIN_SPLIT": f"train[:{chosen.examples}]",
        "TRANSFER_VALIDATION_SPLIT": "train[1000:1064]",
        "TRANSFER_TEST_SPLIT": "train[2000:2064]",
        "TRANSFER_EPOCHS": str(chosen.epochs),
        "TRANSFER_HEAD_EPOCHS": "1",
    }
    rates: dict[tuple[str, str], list[float]] = {}
    for _ in range(chosen.rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                for arm, rate in measure(way, environment, Path(folder)).items():
                    rates.setdefault((way, arm), []).append(rate)
    base = next(iter(WAYS))
    print(f"| images/s ({chosen.rounds} rounds, medians) | {' | '.join(ARMS)} |\n| --- |{' ---: |' * len(ARMS)}")  # noqa: T201
    for way in WAYS:
        figures = []
        for arm in ARMS:
            ratios = [one / other for one, other in zip(rates[way, arm], rates[base, arm], strict=True)]
            figures.append(f"{median(rates[way, arm]):.0f} ({median(ratios):.2f})")
        print(f"| {way} | {' | '.join(figures)} |")  # noqa: T201


if __name__ == "__main__":
    main()
