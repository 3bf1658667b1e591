"""The job as a process, and where things lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def run_job(environment: dict[str, str], *arguments: str, cwd: Path | None = None) -> Finished:
    """Run ``python -m job`` as a process with this environment and nothing of ours in it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRANSFER_", "AIP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "job", *arguments],
        cwd=cwd or ROOT,
        env=kept | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return Finished(done.returncode, lines, done.stderr + done.stdout)


@dataclass(frozen=True)
class Published:
    """A published run: how the process ended, where the run lies, and its manifest."""

    process: Finished
    folder: Path
    manifest: dict[str, Any]
