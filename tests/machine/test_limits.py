"""Memory, disk and CPUs that may be used: limits of control groups in the layouts that containers have."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from job.errors import ConfigError
from job.machine.limits import Quota, cpus, disk_left, in_memory, memory_left, memory_limit, require_memory
from tests.support.running import python

GIB = 1 << 30
# of the kernel, a tmpfs on every usual Linux
SHARED_MEMORY = Path("/dev", "shm")
NONE_IN_V1 = "9223372036854771712"


def machine(root: Path, groups: str, files: dict[str, str], memory: int = 16, free: int = 12) -> Path:
    """Write the kernel's files of a machine with ``memory`` and ``free`` GiB."""
    meminfo = f"MemTotal: {memory << 20} kB\nMemFree: 1 kB\nMemAvailable: {free << 20} kB\nHugePages_Total: 0\n"
    for name, text in {"proc/self/cgroup": groups, "proc/meminfo": meminfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(group: str, limit: str, used: int, inactive_file: int) -> dict[str, str]:
    told = {"max": limit, "current": used, "stat": f"anon 1\nfile 99\nactive_file 7\ninactive_file {inactive_file}"}
    return {f"sys/fs/cgroup{group}/memory.{name}": f"{text}\n" for name, text in told.items()}


def v1(group: str, limit: str, used: int, inactive_file: int) -> dict[str, str]:
    stat = f"inactive_file 5\ntotal_inactive_file {inactive_file}"
    told = {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": stat}
    return {f"sys/fs/cgroup/memory{group}/memory.{name}": f"{text}\n" for name, text in told.items()}


V1_GROUPS = "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n1:name=systemd:/\n0::/system.slice\n"


@pytest.mark.parametrize(
    ("groups", "files", "limit", "left"),
    [
        ("0::/\n", {}, 16 * GIB, 12 * GIB),
        ("0::/\n", v2("", str(4 * GIB), 3 * GIB, GIB), 4 * GIB, 2 * GIB),
        ("0::/\n", v2("", "max", 3 * GIB, GIB), 16 * GIB, 12 * GIB),
        ("0::/\n", v2("", str(99 * GIB), GIB, 0), 16 * GIB, 12 * GIB),
        ("0::/\n", v2("", str(14 * GIB), GIB, 0), 14 * GIB, 12 * GIB),
        ("0::/a/b\n", v2("/a/b", str(4 * GIB), GIB, 0), 4 * GIB, 3 * GIB),
        ("0::/a/b\n", v2("/a/b", "max", GIB, 0) | v2("/a", str(6 * GIB), 2 * GIB, 0), 6 * GIB, 4 * GIB),
        (
            "0::/a/b\n",
            v2("/a/b", str(4 * GIB), GIB, 0) | v2("/a", str(6 * GIB), 5 * GIB, 0),
            4 * GIB,
            1 * GIB,
        ),
        ("0::/../pod:7/x\n", v2("", str(4 * GIB), GIB, 0), 4 * GIB, 3 * GIB),
        ("0::/pod:7\n", v2("/pod:7", str(4 * GIB), GIB, 0), 4 * GIB, 3 * GIB),
        (V1_GROUPS, v1("", str(4 * GIB), 3 * GIB, GIB), 4 * GIB, 2 * GIB),
        (V1_GROUPS, v1("/docker/abc", str(4 * GIB), GIB, 0) | v1("", NONE_IN_V1, 9 * GIB, 0), 4 * GIB, 3 * GIB),
        (V1_GROUPS, v1("/docker/abc", NONE_IN_V1, GIB, 0) | v1("", NONE_IN_V1, 9 * GIB, 0), 16 * GIB, 12 * GIB),
        ("0::/\n", v2("", str(4 * GIB), 5 * GIB, 0), 4 * GIB, 0),
        ("0::/\n", v2("", str(4 * GIB), GIB, 2 * GIB), 4 * GIB, 4 * GIB),
        ("0::/\n", {"sys/fs/cgroup/memory.max": str(4 * GIB)}, 4 * GIB, 4 * GIB),
        ("0::/\n", v2("", "much", GIB, 0), 16 * GIB, 12 * GIB),
        ("\nodd\n0:\n::\n", {}, 16 * GIB, 12 * GIB),
    ],
    ids=[
        "no group", "v2 in a container", "v2 unlimited", "more than the machine", "more than is free",
        "v2 below the root", "v2 limit of the parent", "v2 parent nearly full", "v2 path of the host",
        "v2 colon in the path", "v1 path of the host", "v1 below the root", "v1 unlimited", "over the limit",
        "more cache than use", "no use told", "odd limit", "odd groups",
    ],
)  # fmt: skip
def test_the_tightest_limit_counts(tmp_path: Path, groups: str, files: dict[str, str], limit: int, left: int) -> None:
    root = machine(tmp_path, groups, files)
    assert (memory_limit(root), memory_left(root)) == (limit, left)


def test_a_limit_outside_the_mount_is_not_looked_for(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/../../..\n", {"memory.max": "1", "sys/memory.max": "1"})
    assert memory_limit(root) == 16 * GIB


def test_without_any_of_the_kernels_files_the_machines_memory_is_known(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) == memory_left(tmp_path) > GIB // 4


def test_a_limit_is_known_without_meminfo(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n", v2("", str(GIB // 8), GIB // 16, 0))
    (root / "proc/meminfo").unlink()
    assert (memory_limit(root), memory_left(root)) == (GIB // 8, GIB // 16)


def quota_v2(group: str, text: str) -> dict[str, str]:
    return {f"sys/fs/cgroup{group}/cpu.max": f"{text}\n"}


def quota_v1(group: str, quota: str, period: str = "100000") -> dict[str, str]:
    told = {"quota": quota, "period": period}
    return {f"sys/fs/cgroup/cpu{group}/cpu.cfs_{name}_us": f"{text}\n" for name, text in told.items()}


HERE = min(len(os.sched_getaffinity(0)), os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, HERE),
        ("0::/\n", quota_v2("", "max 100000"), HERE),
        ("0::/\n", quota_v2("", "100000 100000"), 1),
        ("0::/\n", quota_v2("", "1000 100000"), 1),
        ("0::/\n", quota_v2("", "20000 10000"), min(HERE, 2)),
        ("0::/\n", quota_v2("", "110000 100000"), min(HERE, 2)),
        ("0::/\n", quota_v2("", "99900000 100000"), HERE),
        ("0::/a/b\n", quota_v2("/a/b", "max 100000") | quota_v2("/a", "100000 100000"), 1),
        ("0::/a/b\n", quota_v2("/a/b", "100000 100000") | quota_v2("/a", "500000 100000"), 1),
        ("0::/../pod:7/x\n", quota_v2("", "100000 100000"), 1),
        (V1_GROUPS, quota_v1("", "100000"), 1),
        (V1_GROUPS, quota_v1("/x", "150000") | quota_v1("", "-1"), min(HERE, 2)),
        (V1_GROUPS, quota_v1("/x", "50000", "50000") | quota_v1("", "-1"), 1),
        (V1_GROUPS, quota_v1("", "-1"), HERE),
        ("4:memory:/x\n", quota_v1("", "100000"), HERE),
        ("0::/\n", quota_v2("", "100000"), HERE),
        ("0::/\n", quota_v2("", "100000 0"), HERE),
        ("0::/\n", quota_v2("", "much 100000"), HERE),
    ],
    ids=[
        "no group", "v2 unlimited", "v2 one", "v2 a hundredth", "v2 two", "v2 a part more", "more than there are",
        "v2 quota of the parent", "v2 quota below the parent's", "v2 path of the host", "v1 path of the host",
        "v1 below the root", "v1 another period", "v1 unlimited", "v1 of memory alone", "no period", "empty period",
        "odd quota",
    ],
)  # fmt: skip
def test_cpus_are_those_whose_time_may_be_taken(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    assert cpus(machine(tmp_path, groups, files)) == expected


def test_cpus_are_those_that_the_process_may_run_on() -> None:
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    code += "from job.machine.limits import cpus; print(cpus())"
    assert python(code).stdout == "1\n"


def test_this_process_has_memory_and_disk_left(tmp_path: Path) -> None:
    assert 0 < memory_left() <= memory_limit()
    assert 0 < disk_left(tmp_path) <= shutil.disk_usage(tmp_path).total


def test_disk_is_that_of_the_folder_above_where_there_is_none_yet(tmp_path: Path) -> None:
    assert 0 < disk_left(tmp_path / "not/yet") <= shutil.disk_usage(tmp_path).total


def test_less_memory_than_tensorflow_takes_is_refused_before_it_is_imported(tmp_path: Path) -> None:
    enough, little = (machine(tmp_path / limit, "0::/\n", v2("", limit, 0, 0)) for limit in ("536870912", "300000000"))
    require_memory(enough)
    with pytest.raises(ConfigError, match="300 MB of memory may be used, and TensorFlow alone needs 537 MB"):
        require_memory(little)


def test_a_quota_is_used_up_by_what_lies_in_its_folder(tmp_path: Path) -> None:
    assert Quota(10**6, tmp_path / "not yet").left() == Quota(10**6, tmp_path).left() == 10**6
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(bytes(400_000))
    (tmp_path / "link").symlink_to("/")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10**12)
    assert 500_000 < Quota(10**6, tmp_path).left() <= 600_000
    assert Quota(1000, tmp_path).left() == 0


MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:23 / /ram rw,nosuid - tmpfs tmpfs rw,size=64m
24 22 254:1 /disks/a /ram/cache rw master:2 propagate_from:1 - xfs /dev/vdb rw
25 22 0:24 / /two\040words\134 rw - ramfs none rw
26 22 254:0 /x /covered rw - ext4 /dev/vda rw
27 26 0:25 / /covered rw - tmpfs tmpfs rw
28 22 0:26 / /uncovered rw - tmpfs tmpfs rw
29 28 254:0 /x /uncovered rw - ext4 /dev/vda rw
30 22 0:27 / /größer rw - tmpfs tmpfs rw
31 22 0:28 / /odd - and short
short - tmpfs

"""


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/", False), ("/ram", True), ("/ram/not/yet", True), ("/ramfs", False), ("/ram/cache", False),
        ("/ram/cache/features", False), ("/ram/cached", True), ("/two words\\", True), ("/two words\\/below", True),
        ("/two", False), ("/covered/x", True), ("/uncovered/x", False), ("/größer/x", True), ("/short", False),
    ],
)  # fmt: skip
def test_files_lie_in_memory_where_the_nearest_mount_above_does(tmp_path: Path, folder: str, expected: bool) -> None:
    root = machine(tmp_path, "0::/\n", {})
    (root / "proc/self/mountinfo").write_text(MOUNTS, encoding="utf-8")
    assert in_memory(Path(folder), root) is expected


def test_a_link_is_followed_to_where_its_files_lie(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(f"9 1 0:9 / {tmp_path}/there rw - tmpfs tmpfs rw\n")
    assert in_memory(tmp_path / "link" / "not yet", tmp_path)
    assert not in_memory(tmp_path / "other", tmp_path)


def test_without_a_list_of_mounts_files_lie_on_disk(tmp_path: Path) -> None:
    assert not in_memory(Path("/ram"), tmp_path)


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason=f"there is no {SHARED_MEMORY}: mount a tmpfs there")
def test_this_machines_shared_memory_is_memory_and_the_kernels_files_are_not() -> None:
    assert in_memory(SHARED_MEMORY / "not" / "yet")
    assert not in_memory(Path("/proc/self"))
