"""What checkpoints cost: trainings with and without them, alternating, on cats_vs_dogs; many minutes on two cores.

    python -m tests.measure.checkpoint_cost [--seconds 60] [--epochs 12] [--pairs 3]

Ends in one line of JSON: seconds of each training, checkpoints saved, and the median ratio over the pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

from job.arms import ARMS
from job.storage.locations import open_store
from job.training.checkpoints import Checkpoint, Checkpoints
from job.training.trainer import Saving
from tests.measure.step_rate import prepared


class Counted(Checkpoints):
    """Checkpoints that count what is saved."""

    saves = 0

    def save(self, result: str, checkpoint: Checkpoint) -> None:
        self.saves += 1
        super().save(result, checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm", default="scratch", choices=list(ARMS))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=3)
    chosen = parser.parse_args()
    found: dict[str, list[float]] = {"with": [], "without": [], "saves": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan, experiment, index = prepared(folder, TRANSFER_EPOCHS=str(chosen.epochs))

        def seconds(saving: Saving | None = None) -> float:
            trainer, stages = experiment.prepare(ARMS[chosen.arm], index, seed=0)
            return trainer.train(stages, 0, saving).seconds

        seconds()  # compiles
        for pair in range(chosen.pairs):
            store = open_store(str(folder / f"checkpoints{pair}"), "TRANSFER_CHECKPOINT_URI")
            checkpoints = Counted(store, plan.fingerprint, chosen.seconds, folder)
            with checkpoints.open():
                found["with"].append(seconds(saving=Saving(checkpoints, chosen.arm)))
            found["saves"].append(checkpoints.saves)
            found["without"].append(seconds())
            sys.stderr.write(f"{found}\n")
    ratios = [a / b for a, b in zip(found["with"], found["without"], strict=True)]
    sys.stdout.write(json.dumps(found | {"ratio": median(ratios)}) + "\n")


if __name__ == "__main__":
    main()
