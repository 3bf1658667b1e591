"""Several real processes with one run id at the same time leave one published run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from job.manifest import Manifest
from job.storage.verification import verify
from tests.support.running import ROOT, environment_of


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 10])
def test_all_end_well_and_one_run_is_published(count: int, tiny: dict[str, str], tmp_path: Path) -> None:
    # each saves its progress where the others do; without determinism their results may differ
    changes = {"TRANSFER_DETERMINISTIC": "false", "TRANSFER_CHECKPOINT_SECONDS": "1"}
    environment = environment_of(tiny | changes | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output")})
    logs = [tmp_path / f"{number}.log" for number in range(count)]
    processes = []
    for log in logs:
        with log.open("wb") as out:
            command = [sys.executable, "-m", "job"]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
    codes = [process.wait() for process in processes]
    texts = [log.read_text() for log in logs]
    assert codes == [0] * count, texts
    (run,) = (tmp_path / "output").iterdir()
    assert all(f"published {run}" in text or f"already published and verified: {run}" in text for text in texts)
    assert verify(str(run)) == []
    artifacts = Manifest.model_validate_json((run / "manifest.json").read_bytes()).artifacts
    there = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert there == {artifact.path for artifact in artifacts} | {"manifest.json"}
