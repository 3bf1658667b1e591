"""How much memory and disk and how many CPUs this process may use, inside a container as outside.

Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst and scheduler/sched-bwc.rst, and of
mounts filesystems/proc.rst.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from job.errors import ConfigError

_ROOT = Path("/")
# TensorFlow, imported, held 277 MB of its own; with 300 MB the kernel ended the process before it could say a word.
_LEAST = 512 * 2**20
# The unit of ``st_blocks``, whatever a file system's own blocks are.
_BLOCK = 512
# File systems whose files are memory: they count against the limit of the control group that writes them.
_IN_MEMORY = {"tmpfs", "ramfs"}


@dataclass(frozen=True)
class _Version:
    """Where a version of control groups is mounted, and what its files are called."""

    mount: str
    cpu_mount: str
    limit: str
    usage: str
    reclaimable: str


_V1 = _Version(
    "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
_V2 = _Version("sys/fs/cgroup", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def cpus(root: Path = _ROOT) -> int:
    """Return how many CPUs this process may use, and so how many threads are worth having: at least 1.

    The smallest of those that it may run on, those of the machine, and the time that its control group and all groups
    above may take of them, rounded up: ``docker run --cpus`` and Kubernetes' ``limits.cpu`` set nothing else.

    Args:
        root: as in :func:`memory_limit`.
    """
    quotas = [math.ceil(time / period) for time, period in _quotas(root)]
    return max(1, min([*quotas, len(os.sched_getaffinity(0)), os.cpu_count() or 1]))


def memory_limit(root: Path = _ROOT) -> int:
    """Return the bytes of memory that this process and its companions may use at most.

    The smallest of the limits of its control group and all groups above, and the memory of the machine.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    limits = [limit for limit, _ in _groups(root)]
    return min([*limits, _meminfo(root).get("MemTotal", _physical_memory())])


def require_memory(root: Path = _ROOT) -> None:
    """Refuse to go on where not even TensorFlow fits; call before it is imported.

    Raises:
        ConfigError: too little memory may be used.
    """
    if (limit := memory_limit(root)) < _LEAST:
        raise ConfigError.of(
            "memory limit",
            f"{limit / 1e6:.0f} MB of memory may be used, and TensorFlow alone needs {_LEAST / 1e6:.0f} MB; give more "
            "(docker run --memory, resources.limits.memory): plan says how much an experiment takes",
        )


def memory_left(root: Path = _ROOT) -> int:
    """Return the bytes of memory that may still be taken, at least 0.

    The smallest of what each control group leaves and what the machine has. Cached files that nobody uses count as
    free, as the kernel gives them up first (Kubernetes' working set is counted like this).

    Args:
        root: as in :func:`memory_limit`.
    """
    left = [limit - used for limit, used in _groups(root)]
    return max(0, min([*left, _meminfo(root).get("MemAvailable", memory_limit(root))]))


def disk_left(folder: Path) -> int:
    """Return the bytes that a user without special rights may still write below ``folder``, which need not exist yet.

    Raises:
        OSError: the folder, or the nearest one above it that exists, cannot be looked at.
    """
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free


@dataclass(frozen=True)
class Quota:
    """What the platform lets files take, on whatever disk: more, and it ends the container.

    bytes: of all files below ``folder``.
    """

    bytes: int
    folder: Path

    def left(self) -> int:
        """Return the bytes that may still be written, at least 0."""
        return max(0, self.bytes - _bytes_below(self.folder))


def _bytes_below(folder: Path) -> int:
    """Return what files below ``folder`` take, but for those of other disks and those that cannot be looked at."""
    try:
        disk = folder.stat().st_dev
    except OSError:
        return 0
    used, waiting = 0, [folder]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                if about.st_dev == disk:
                    used += _BLOCK * about.st_blocks
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry))
    return used


def in_memory(folder: Path, root: Path = _ROOT) -> bool:
    """Return whether files in ``folder``, which need not exist yet, lie in memory.

    Args:
        folder: links on the way to it are followed.
        root: as in :func:`memory_limit`.
    """
    place, depth, kind = Path(os.path.realpath(folder)), -1, ""
    for mount, file_system in _mounts(root):
        # of several mounts on one place, the last hides those before it
        if len(mount.parts) >= depth and place.is_relative_to(mount):
            depth, kind = len(mount.parts), file_system
    return kind in _IN_MEMORY


def gigabytes(size: int) -> str:
    """Return a number of bytes for people."""
    if size < 10**9:
        return f"{size / 1e6:,.0f} MB"
    return f"{size / 1e9:,.{1 if size >= 10**10 else 2}f} GB"


def _mounts(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield where each file system is mounted, and its type.

    A line is "id parent device root place options [tags ...] - type source options"; in a place, blanks and backslashes
    are written as three octal digits, and other bytes as they are.
    """
    try:
        text = os.fsdecode((root / "proc/self/mountinfo").read_bytes())
    except OSError:
        return
    for line in text.split("\n"):
        about, _, source = line.partition(" - ")
        words = about.split(" ")
        if len(words) > 4 and source:
            place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), words[4])
            yield Path(place), source.split(" ")[0]


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use in bytes of each control group that limits this process."""
    for version, group in _memberships(root, "memory"):
        for folder in _folders(root / version.mount, group):
            limit = _number(folder / version.limit)
            if limit is not None:
                used = _number(folder / version.usage) or 0
                unused_cache = _fields(folder / "memory.stat").get(version.reclaimable, 0)
                yield limit, max(0, used - unused_cache)


def _quotas(root: Path) -> Iterator[tuple[int, int]]:
    """Yield the microseconds of CPU time that each control group may take in a period, and the period's."""
    for version, group in _memberships(root, "cpu"):
        for folder in _folders(root / version.cpu_mount, group):
            if version is _V2:
                words = _text(folder / "cpu.max").split()
            else:
                words = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            # "max", or -1, is no quota
            if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
                yield int(words[0]), int(words[1])


def _folders(mount: Path, group: str) -> Iterator[Path]:
    """Yield the folders of a control group and of all above it, up to where the hierarchy is mounted.

    A container without a cgroup namespace is told the host's path, which is not below its mount; the mount is then
    the container's own group. So every folder of the path is tried, and the mount itself.
    """
    below = mount.joinpath(*(part for part in group.split("/") if part not in ("", ".", "..")))
    for folder in (below, *below.parents):
        yield folder
        if folder == mount:
            return


def _memberships(root: Path, controller: str) -> Iterator[tuple[_Version, str]]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy == "0" and not controllers:
            yield _V2, group
        elif controller in controllers.split(","):
            yield _V1, group


def _meminfo(root: Path) -> dict[str, int]:
    """Return /proc/meminfo in bytes; its "kB" are KiB."""
    return {name.rstrip(":"): 1024 * value for name, value in _fields(root / "proc/meminfo").items()}


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _fields(path: Path) -> dict[str, int]:
    """Return the lines "name number ..." of a file."""
    words = (line.split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _number(path: Path) -> int | None:
    """Return the number in a file, None where there is no such file or it says "max"."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
