"""The program that runs the tests in other places: the places are what they say, and what fails there is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import elsewhere
from tests.support.running import ROOT


def made(name: str) -> elsewhere.Place:
    try:
        return (elsewhere.PLACES | elsewhere.SHORT_PLACES)[name]()
    except elsewhere.CannotBeMadeError as error:
        pytest.skip(str(error))


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.elsewhere", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", [*elsewhere.PLACES, *elsewhere.SHORT_PLACES])
def test_a_place_is_what_it_says(name: str) -> None:
    place = made(name)
    assert place.checks
    for check in place.checks:
        assert place.run("-c", f"import os, time; assert {check}").returncode == 0


def test_everything_is_all_places_but_the_oldest_kernels() -> None:
    parts = [made(name) for name in ("avx2", "one-core", "young-clock", "bare")]
    assert {check for part in parts for check in part.checks} == set(made("everything").checks)


@pytest.mark.parametrize(("name", "isa"), [("onednn-avx2", "Intel AVX2"), ("onednn-sse41", "Intel SSE4.1")])
def test_onednn_takes_the_kernels_of_the_place(name: str, isa: str) -> None:
    code = "import tensorflow as tf; tf.linalg.matmul(tf.ones([300, 300]), tf.ones([300, 300]))"
    place = made(name) | elsewhere.Place(environment={"ONEDNN_VERBOSE": "1"})
    assert f"cpu,isa:{isa}" in place.run("-c", code, capture_output=True, text=True).stdout


def write_test(folder: Path, body: str) -> list[str | Path]:
    """Write a file with one test, and return what pytest must be told to run it by the project's settings."""
    file = folder / "test_one.py"
    file.write_text(f"import os\n\ndef test_one():\n    {body}\n")
    return ["-c", ROOT / "pyproject.toml", "-n", "0", file]


def test_a_test_that_fails_in_one_place_only_is_told(tmp_path: Path) -> None:
    done = run("--place", "bare", "--place", "one-core", *write_test(tmp_path, "assert 'HOME' in os.environ"), HOME="/")
    assert done.returncode == 1, done.stdout
    rows = done.stdout.rpartition("\n\n")[2]
    assert " 0 passed    1 failed" in rows.splitlines()[0]
    assert " 1 passed    0 failed" in rows.splitlines()[1] or "cannot be made" in rows


def test_a_test_that_is_skipped_is_counted(tmp_path: Path) -> None:
    done = run("--place", "bare", *write_test(tmp_path, "import pytest; pytest.skip('-')"))
    assert done.returncode == 0, done.stdout
    assert " 0 passed    0 failed    1 skipped" in done.stdout


def test_a_place_that_the_machine_cannot_make_is_named_with_the_reason(tmp_path: Path) -> None:
    tests = write_test(tmp_path, "pass")
    done = run("--place", "one-core", "--place", "young-clock", *tests, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "one-core     cannot be made on this machine: taskset is not there" in done.stdout
    assert "young-clock  cannot be made on this machine: unshare is not there" in done.stdout
    short = run("--short", *tests, PATH=str(tmp_path))
    assert short.returncode == 0, short.stderr
    assert " 1 passed    0 failed" in short.stdout
    assert "it lacks what this machine cannot make: unshare is not there" in short.stdout


def test_the_short_half_names_tests_that_are_there() -> None:
    assert all((ROOT / name).exists() for name in elsewhere.SHORT)
