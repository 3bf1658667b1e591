"""Local files that others can tell are being written, or were left by a process that was killed: they are locked.

A lock ends with its process, however that ends. A process id in a name would not do: in a restarted container the same
id is another process, and the processes of a second container that shares the folder cannot be seen.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".part-"
_ATTEMPTS = 5


def create_locked(path: Path) -> BinaryIO:
    """Open a new file, which counts as in use for as long as it is open.

    Raises:
        FileExistsError: something has its name.
        FileNotFoundError: its folder is not there, or somebody took it for abandoned before it was locked.
    """
    file = path.open("xb")
    with suppress(OSError):  # a file system without locks: nothing on it is ever taken for abandoned
        fcntl.flock(file, fcntl.LOCK_EX)
    if not path.exists():
        file.close()
        raise FileNotFoundError(path)
    return file


@contextmanager
def locked_if_abandoned(path: Path) -> Iterator[bool]:
    """Yield whether ``path`` is there and no living process has it open as :func:`create_locked` does.

    It is locked meanwhile, so that of two processes one finds it abandoned.
    """
    file = _lock(path)
    try:
        yield file is not None
    finally:
        if file is not None:
            file.close()


def _lock(path: Path) -> BinaryIO | None:
    file = None
    try:
        # NFS locks only what is open for writing; elsewhere another user's file can be locked too
        file = path.open("r+b" if os.access(path, os.W_OK) else "rb")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # gone by now, not to be opened, or in use
        if file is not None:
            file.close()
        return None
    return file


def remove_if_abandoned(path: Path) -> None:
    """Remove a file that its writer left; one that is being written is left alone."""
    with locked_if_abandoned(path) as abandoned, suppress(OSError):  # its folder may not be ours to change
        if abandoned:
            path.unlink()


@contextmanager
def unfinished(target: Path) -> Iterator[BinaryIO]:
    """Yield a new, locked file beside ``target``, whose folder is made if need be; in the end nothing has its name.

    Whoever wants to keep it gives it another one first. While it is open nobody takes it for a killed writer's.
    """
    path = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    file = _open_new(path)
    try:
        with file:
            yield file
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def appearing(target: Path, commit: Callable[[Path, Path], None]) -> Iterator[BinaryIO]:
    """Yield a file beside ``target`` which ``commit`` gives its name once it is whole and on the disk."""
    with unfinished(target) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        commit(Path(file.name), target)
    with suppress(OSError):  # some network file systems have no fsync for folders: the name is safe without it
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _open_new(path: Path) -> BinaryIO:
    # another process may take the folder away while it is empty, or the file before it is locked
    for _ in range(_ATTEMPTS - 1):
        with suppress(FileNotFoundError):
            return _open_once(path)
    return _open_once(path)


def _open_once(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if not path.parent.exists():  # mkdir found it, and then did not
            raise FileNotFoundError(path.parent) from error
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from error
    return create_locked(path)
