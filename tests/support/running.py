"""The job as a process, Python code as a process, and where things lie."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
CLASSES = ("cat", "dog", "owl")


@dataclass(frozen=True)
class Finished:
    """A process of the job that ended: exit code, and its log lines parsed."""

    code: int
    lines: list[dict[str, Any]]
    errors: str

    @property
    def text(self) -> str:
        return "\n".join(line["message"] for line in self.lines)


def environment_of(changes: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without the job's variables, with ``changes``."""
    ours = ("TRANSFER_", "AIP_", "TF_CONFIG")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"PYTHONPATH": str(ROOT)} | dict(changes)


def places(folder: Path) -> dict[str, str]:
    """Return the settings by which a run is published and keeps its scratch files below ``folder``."""
    return {"TRANSFER_OUTPUT_URI": str(folder / "output"), "TRANSFER_CACHE_DIR": str(folder / "cache")}


def run_job(environment: dict[str, str], *arguments: str, cwd: Path | None = None) -> Finished:
    """Run ``python -m job`` as a process with this environment and nothing of ours in it."""
    done = subprocess.run(
        [sys.executable, "-m", "job", *arguments],
        cwd=cwd or ROOT,
        env=environment_of(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return Finished(done.returncode, lines, done.stderr + done.stdout)


def completed(environment: dict[str, str], *arguments: str) -> Finished:
    """Run the job as a process, which must end well."""
    done = run_job(environment, *arguments)
    assert done.code == 0, done.errors
    return done


def python(
    code: str, *arguments: object, ends: int = 0, seconds: float | None = None, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code as a process with these arguments and variables; it must end with the code ``ends``."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == ends, done.stderr
    return done


def compile_driver(library: Path, source: str, defined: Mapping[str, object]) -> None:
    """Compile a driver of our own to a shared library, with these macros; skip the test where there is no compiler."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler for the driver: install gcc")
    code = library.with_suffix(".c")
    code.write_text(source)
    macros = [f"-D{name}={value}" for name, value in defined.items()]
    subprocess.run([compiler, "-shared", "-fPIC", *macros, "-o", library, code], check=True)


@dataclass(frozen=True)
class Published:
    """A published run: how the process ended, where the run lies, and its manifest."""

    process: Finished
    folder: Path
    manifest: dict[str, Any]


def published_in(output: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the run that alone lies in ``output``, and its manifest."""
    (folder,) = output.iterdir()
    return folder, json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def published_by(environment: dict[str, str], output: Path) -> Published:
    """Let a run with this environment be published to ``output``, which is empty or not there."""
    process = completed(environment | {"TRANSFER_OUTPUT_URI": str(output)})
    return Published(process, *published_in(output))
