"""The range over seeds, from a published manifest, and the command that trains the quickstart at several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.report_example import example
from tests.support.running import ROOT, environment_of


def test_each_arm_has_its_mean_its_interval_and_the_range_of_its_seeds(tmp_path: Path) -> None:
    record = example(fractions=(0.1, 1.0), seeds=(0, 1, 2))
    (tmp_path / "manifest.json").write_bytes(record.to_json())
    command = [sys.executable, "-m", "tests.measure.seeds", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    title, _, head, _, *rows = done.stdout.splitlines()
    assert title == "tf_flowers 3.0.1, 240 test photos, MobileNetV2 at 160 px"
    assert head == "| arm | training photos | seeds | test accuracy, 95% interval | least and largest of a seed |"
    assert len(rows) == len(record.summaries) == 6
    for row, one in zip(rows, record.summaries, strict=True):
        right = sorted(
            result.metrics.test.accuracy
            for result in record.results
            if result.arm == one.arm and result.train_fraction == one.train_fraction
        )
        least, mean, largest = (f"{value:.3f}" for value in (right[0], sum(right) / 3, right[-1]))
        low, high = (f"{value:.3f}" for value in one.interval)
        photos = {0.1: "294", 1.0: "2,936"}[one.train_fraction]
        assert row == f"| {one.arm} | {photos} | 3 | {mean} ({low} - {high}) | {least} - {largest} |"
        assert least < largest


def test_make_run_hands_other_settings_to_the_job() -> None:
    """Refused settings show which ones arrive; the environment is taken as it is, newer pyproject or not."""
    folder = Path(sys.executable).parent
    command = ["make", "--old-file", ".venv/installed", "run", f"BIN={folder}", "TRANSFER_SEEDS=0,1,2,3,x"]
    done = subprocess.run(command, cwd=ROOT, env=environment_of({}), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TRANSFER_SEEDS" in done.stdout + done.stderr
    assert "'x'" in done.stdout + done.stderr
