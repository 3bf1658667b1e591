"""Native code that ends the process or hangs while TensorFlow is loaded: what it said of the reason is in the log."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.kills import PID_1, started, with_pid_1
from tests.support.running import ROOT, python, run_job

REASON = "compiled to use AVX instructions, but these aren't available"


def with_tensorflow(small: dict[str, str], folder: Path, code: str) -> dict[str, str]:
    """Return an environment whose tensorflow and keras are packages of this code, which says REASON first."""
    for name in ("tensorflow", "keras"):
        (folder / "faulty" / name).mkdir(parents=True)
        beginning = f"import os, time\nos.write(2, b{REASON!r} + b'\\n')\n"
        (folder / "faulty" / name / "__init__.py").write_text(beginning + code)
    return small | {"PYTHONPATH": f"{folder / 'faulty'}:{ROOT}", "TRANSFER_OUTPUT_URI": str(folder / "output")}


@pytest.mark.parametrize("verb", ["run", "plan"])
@pytest.mark.parametrize(
    "number", [signal.SIGABRT, signal.SIGILL, signal.SIGSEGV, signal.SIGKILL], ids=lambda it: it.name
)
def test_what_was_said_before_a_fatal_signal_is_shown(
    small: dict[str, str], tmp_path: Path, number: signal.Signals, verb: str
) -> None:
    done = run_job(with_tensorflow(small, tmp_path, f"os.kill(os.getpid(), {number:d})\n"), verb)
    assert done.code == -number
    assert done.errors.startswith(REASON)
    assert not (tmp_path / "output").exists()


@with_pid_1
def test_it_is_shown_by_a_job_with_pid_1_too(small: dict[str, str], tmp_path: Path) -> None:
    with started(with_tensorflow(small, tmp_path, "os.abort()\n"), before=PID_1) as running:
        done = running.end()
    assert done.code != 0
    assert done.errors.startswith(REASON)


def test_a_request_to_stop_in_it_ends_the_job_as_ever_and_shows_it(small: dict[str, str], tmp_path: Path) -> None:
    done = run_job(with_tensorflow(small, tmp_path, "os.kill(os.getpid(), 15)\ntime.sleep(60)\n"))
    assert done.code == 143
    assert done.errors.startswith(REASON)
    assert "asked to stop" in done.text


def test_notices_of_the_real_one_are_not_shown_where_it_starts_well(small: dict[str, str], tmp_path: Path) -> None:
    all_of_them = {"TF_CPP_MIN_LOG_LEVEL": "0"}
    notice = "This TensorFlow binary is optimized to use available CPU instructions"
    assert notice in python("import tensorflow", **all_of_them).stderr
    wrong = {"TRANSFER_DATASET": str(tmp_path / "nothing"), "TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    done = run_job(small | all_of_them | wrong)  # found after TensorFlow was loaded
    assert done.code == 78
    assert "training on " in done.text
    assert notice not in done.errors
