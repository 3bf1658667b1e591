"""The job as a process in a control group that limits it, by the kernel's files of one, mounted for it alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.running import ROOT, environment_of

_MOUNTS = subprocess.run(
    ["unshare", "--mount", "mount", "--bind", "/tmp", "/mnt"],  # noqa: S607, S108  (util-linux, wherever it is)
    capture_output=True,
    check=False,
)
mounting = pytest.mark.skipif(
    _MOUNTS.returncode != 0, reason=f"this account cannot mount: {_MOUNTS.stderr.decode(errors='replace').strip()}"
)

POOLS = """
import collections, json, os
from job.machine import limits
from job.settings import environment
environment.bound_threads(limits.cpus())
import sklearn.metrics, tensorflow, threadpoolctl
tensorflow.linalg.matmul(*tensorflow.random.normal([2, 64, 64])).numpy()
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
pools = [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]
print(json.dumps({"cpus": limits.cpus(), "tensorflow": names.count("tf_Compute"), "pools": pools}))
"""


def under_quota(folder: Path, quota: int, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments where its control group may take ``quota`` CPUs, in either version of groups."""
    (folder / "cpu").mkdir(parents=True)
    told = {"cpu.max": f"{100000 * quota} 100000", "cpu/cpu.cfs_quota_us": str(100000 * quota)}
    for name, text in (told | {"cpu/cpu.cfs_period_us": "100000"}).items():
        (folder / name).write_text(f"{text}\n")
    # a test that called the command in this process may have left sizes of pools behind
    kept = {name: value for name, value in environment_of(environment).items() if not name.endswith("_NUM_THREADS")}
    kept = {name: value for name, value in kept.items() if not name.startswith("TF_NUM_")}
    mount = 'mount --bind "$0" /sys/fs/cgroup && exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, str(folder), sys.executable, *command],  # noqa: S607
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        check=True,
    )


@mounting
def test_pools_of_threads_are_as_large_as_the_quota_of_cpus(tmp_path: Path) -> None:
    told = json.loads(under_quota(tmp_path / "group", 1, "-c", POOLS).stdout)
    assert told["cpus"] == told["tensorflow"] == 1
    assert len(told["pools"]) > 1
    assert set(told["pools"]) == {1}


@mounting
def test_plan_tells_the_cpus_of_the_quota(tiny: dict[str, str], tmp_path: Path) -> None:
    changes = {"TRANSFER_ARMS": "frozen", "TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    done = under_quota(tmp_path / "group", 1, "-m", "job", "plan", **tiny, **changes)
    (found,) = (json.loads(line) for line in done.stdout.splitlines() if '"device_proof"' in line)
    assert [device.endswith(" 1 cores)") or device.startswith("GPU") for device in found["devices"]] == [True]
