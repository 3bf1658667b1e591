"""Peak memory does not grow with the photos; long, and run by ``make test-real``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.real import FLOWERS
from tests.support.running import ROOT, environment_of, published_in

pytestmark = pytest.mark.slow

# Beyond what TensorFlow takes for itself, ten times the photos may cost this share more.
GROWTH = 0.10
# One epoch of scratch, frozen and fine_tune's tail: what grows with the photos shows in the first.
SETTINGS = {"TRANSFER_EPOCHS": "1", "TRANSFER_HEAD_EPOCHS": "0"}
IMPORTS = "import tensorflow, keras, tensorflow_datasets, job.experiment.run; tensorflow.zeros([1])"
# A process's peak begins at its parent's, whose memory it shared before it became another program: a small parent of
# its own keeps this suite's out of the figure.
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def peak(arguments: list[str], environment: dict[str, str]) -> int:
    """Return the peak resident memory of Python with these arguments, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, sys.executable, *arguments],
        cwd=ROOT,
        env=environment_of(environment),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.parametrize("arms", ["frozen,fine_tune", "scratch"])
def test_ten_times_the_photos_cost_a_tenth_more_memory_at_most(arms: str, tmp_path: Path) -> None:
    environment = FLOWERS.required().environment | SETTINGS
    own = peak(["-c", IMPORTS], {})
    peaks = {}
    for name, split in (("few", "train[:8%]"), ("many", "train[:80%]")):
        changes = {"TRANSFER_ARMS": arms, "TRANSFER_TRAIN_SPLIT": split, "TRANSFER_OUTPUT_URI": str(tmp_path / name)}
        peaks[name] = peak(["-m", "job"], environment | changes) - own
        results = published_in(tmp_path / name)[1]["results"]
        assert {result["rows"]["kept"] for result in results if result["arm"] != "frozen"} == {"disk"}
    sys.stderr.write(f"TensorFlow's own {own / 1e6:.0f} MB, beyond it {json.dumps(peaks)}\n")
    assert peaks["many"] <= (1 + GROWTH) * peaks["few"], peaks
