"""The learning curve's own arithmetic."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.measure.learning_curve import CURVE, PRETRAINED, accuracies
from tests.support.real import CATS
from tests.support.running import ROOT


def manifest(arms: tuple[str, ...], seeds: list[int], compared: list[dict[str, Any]]) -> dict[str, Any]:
    cells = [(arm, fraction) for fraction in (0.1, 1.0) for arm in arms]
    summaries = [
        {
            "arm": arm, "train_fraction": fraction, "train_examples": int(1000 * fraction), "seeds": seeds,
            "test_accuracy": 0.9, "interval": [0.85, 0.95],
        }
        for arm, fraction in cells
    ]  # fmt: skip
    return {"summaries": summaries, "comparisons": compared}


def test_the_table_has_what_fine_tune_is_ahead_whoever_is_better_and_scratch_beside_it() -> None:
    compared = [
        {"train_fraction": 0.1, "seeds": [0, 1], "better": "frozen", "difference": 0.02, "interval": [-0.01, 0.05]},
        {"train_fraction": 1.0, "seeds": [0, 1], "better": "fine_tune", "difference": 0.03, "interval": [0.01, 0.05]},
        {"train_fraction": 1.0, "seeds": [0], "better": "frozen", "difference": 0.5, "interval": [0.4, 0.6]},
    ]
    runs = [manifest(("frozen", "fine_tune"), [0, 1], compared), manifest(("scratch",), [0], [])]
    head, _, few, many = accuracies(runs).splitlines()
    assert head == (
        "| training photos | frozen (2 seeds) | fine_tune (2 seeds) | scratch (1 seed) | fine_tune - frozen, points |"
    )
    assert few.startswith("| 100 | 0.900 (0.850 - 0.950) |")
    assert few.endswith("| -2.0 (-5.0 to +1.0) |")
    assert many.endswith("| +3.0 (+1.0 to +5.0) |")


def test_forty_results_are_trained() -> None:
    environment = CURVE | PRETRAINED
    names = ("TRANSFER_ARMS", "TRANSFER_SEEDS", "TRANSFER_TRAIN_FRACTIONS")
    arms, seeds, fractions = (len(environment[name].split(",")) for name in names)
    assert arms * seeds * fractions == 40


@pytest.mark.slow
def test_a_few_photos_run_through_the_whole_of_it(tmp_path: Path) -> None:
    if (missing := CATS.missing()) is not None:
        pytest.skip(missing)
    command = [sys.executable, "-m", "tests.measure.learning_curve", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "- the job, 40 results exported and published: " in done.stdout
    assert "scratch (1 seed)" in done.stdout
