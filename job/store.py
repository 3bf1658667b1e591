"""What a store is, and the one over a local folder: whole files only, create-only commits.

Names inside a store are relative POSIX paths. A name appears only when its content is whole. Failures come out as the
two errors that a scheduler can tell apart: ConfigError when a retry cannot help, UnavailableError when it can.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

from job.errors import ConfigError, UnavailableError

_BLOCK = 1 << 20
_ATTEMPTS = 5
_TEMPORARY = ".part-"
_PERMANENT = {
    errno.EACCES, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSYS,
    errno.ENOTDIR, errno.ENOTSUP, errno.EPERM, errno.EROFS,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A stored object: its name in the store, its size, and its CRC32C in base64 where known without reading it."""

    name: str
    bytes: int
    crc32c: str | None


class Digest:
    """A sink that measures what is written to it, and passes it on to ``file`` when there is one."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        self._file = file
        self._bytes = 0
        self._sha256 = hashlib.sha256()
        self._crc32c = 0

    def write(self, data: bytes) -> int:
        """Take in a block, as files do."""
        self._bytes += len(data)
        self._sha256.update(data)
        self._crc32c = google_crc32c.extend(self._crc32c, data)
        return len(data) if self._file is None else self._file.write(data)

    def result(self) -> tuple[int, str, str]:
        """Return size in bytes, SHA-256 in hexadecimal and CRC32C (big-endian) in base64 of what was written."""
        return self._bytes, self._sha256.hexdigest(), base64.b64encode(self._crc32c.to_bytes(4, "big")).decode()


def checksums(path: Path) -> tuple[int, str, str]:
    """Return a file's size in bytes, SHA-256 in hexadecimal and CRC32C in base64, read once and in blocks."""
    with path.open("rb") as file:
        return measure(file)


def measure(file: BinaryIO) -> tuple[int, str, str]:
    """Like :func:`checksums`, of an open file from where it stands."""
    digest = Digest()
    while block := file.read(_BLOCK):
        digest.write(block)
    return digest.result()


class Store(ABC):
    """A place for named objects: a local folder, or a prefix in a bucket.

    uri: where it is, fit for logs. ``variable`` names the setting that chose it, for :class:`ConfigError`.
    Every method raises ConfigError (no permission, no such bucket, not a folder) and UnavailableError (out of reach
    after retries, disk full). A store may be used by several threads.
    """

    def __init__(self, uri: str, variable: str) -> None:
        self.uri = uri
        self.variable = variable

    @abstractmethod
    def put(self, name: str, source: Path) -> Stored:
        """Store a file's content under ``name``, in place of what was there."""

    @abstractmethod
    def put_bytes(self, name: str, data: bytes) -> Stored:
        """Store ``data`` under ``name``, in place of what was there."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Store ``data`` under ``name`` unless something is there; return whether ``data`` is what is there now.

        That is also True when the answer to our own, successful attempt was lost and its retry found the name taken.
        """

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return an object's content, None when there is no such object."""

    @abstractmethod
    def checksums(self, name: str) -> tuple[int, str, str]:
        """Like :func:`checksums`, of a stored object, read from end to end. FileNotFoundError when it is not there."""

    @abstractmethod
    def download(self, name: str, target: Path) -> None:
        """Copy an object to the local file ``target``. FileNotFoundError when it is not there."""

    def copy(self, name: str, source: Store, source_name: str) -> Stored:
        """Store a copy of an object of another store under ``name``, in place of what was there.

        FileNotFoundError when there is no such object.
        """
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder, "copy")
            source.download(source_name, whole)
            return self.put(name, whole)

    @abstractmethod
    def list(self) -> dict[str, Stored]:
        """Return all objects by name, those in folders below included."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete an object; nothing happens when it is not there."""

    @abstractmethod
    def delete_all(self) -> None:
        """Delete every object, those in folders below included; another process may be doing the same."""

    def tidy(self) -> None:
        """Remove what killed writers left half-written here and below. Object storage does that itself."""
        return

    @abstractmethod
    def child(self, prefix: str) -> Store:
        """Return the store below ``prefix``."""

    def probe(self) -> None:
        """Prove that this place can be written, read and cleaned, create-only commits included; leave nothing behind.

        Raises:
            ConfigError: it cannot.
            UnavailableError: it is out of reach.
        """
        name = f".probe-{uuid.uuid4().hex}"
        data = name.encode()
        sound = self.create(name, data)
        try:
            sound = sound and self.read(name) == data
        finally:
            self.delete(name)
        if not sound:
            raise ConfigError.of(self.variable, f"{self.uri} does not give back what was written to it; choose another")


class LocalStore(Store):
    """A folder; it is made when the first object is stored."""

    def __init__(self, folder: Path, variable: str) -> None:
        super().__init__(str(folder), variable)
        self._folder = folder

    def put(self, name: str, source: Path) -> Stored:  # noqa: D102
        with source.open("rb") as data:
            return self._write(name, lambda sink: shutil.copyfileobj(data, sink, _BLOCK))

    def put_bytes(self, name: str, data: bytes) -> Stored:  # noqa: D102
        return self._write(name, lambda sink: sink.write(data))

    def _write(self, name: str, fill: Callable[[Any], object]) -> Stored:
        target = self._folder / name
        with self._errors("write", target), appearing(target, os.replace) as file:
            digest = Digest(file)
            fill(digest)
        size, _, crc32c = digest.result()
        return Stored(name, size, crc32c)

    def create(self, name: str, data: bytes) -> bool:  # noqa: D102
        target = self._folder / name
        try:
            # A hard link, unlike a rename, fails when the name is taken.
            with self._errors("create", target), appearing(target, os.link) as file:
                file.write(data)
        except FileExistsError:
            return self.read(name) == data
        return True

    def read(self, name: str) -> bytes | None:  # noqa: D102
        try:
            with self._open(name) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def checksums(self, name: str) -> tuple[int, str, str]:  # noqa: D102
        with self._open(name) as file:
            return measure(file)

    def download(self, name: str, target: Path) -> None:  # noqa: D102
        with self._open(name) as source, self._errors("write", target), appearing(target, os.replace) as file:
            shutil.copyfileobj(source, file, _BLOCK)

    def copy(self, name: str, source: Store, source_name: str) -> Stored:  # noqa: D102
        if not isinstance(source, LocalStore):
            return super().copy(name, source, source_name)
        with source._open(source_name) as data:
            return self._write(name, lambda sink: shutil.copyfileobj(data, sink, _BLOCK))

    def list(self) -> dict[str, Stored]:  # noqa: D102
        found = {}
        with self._errors("list", self._folder):
            for folder, _, names in os.walk(self._folder, onerror=_raise_unless_absent):
                for path in (Path(folder, name) for name in names if not name.startswith(_TEMPORARY)):
                    name = path.relative_to(self._folder).as_posix()
                    with suppress(FileNotFoundError):  # another run may be deleting its own
                        found[name] = Stored(name, path.stat().st_size, None)
        return found

    def delete(self, name: str) -> None:  # noqa: D102
        target = self._folder / name
        with self._errors("delete", target), suppress(NotADirectoryError):  # what lies below a file is not there
            target.unlink(missing_ok=True)

    def delete_all(self) -> None:
        """Delete every file, what killed writers left included, and the folders that are empty then; this one too."""
        with self._errors("delete", self._folder):
            for folder, _, names in os.walk(self._folder, topdown=False, onerror=_raise_unless_absent):
                for path in (Path(folder, name) for name in names):
                    _remove(path)
                with suppress(OSError):  # gone already, or another run fills it
                    Path(folder).rmdir()

    def tidy(self) -> None:  # noqa: D102
        with self._errors("list", self._folder):
            for path in self._folder.rglob(f"{_TEMPORARY}*"):
                _remove(path)

    def child(self, prefix: str) -> LocalStore:  # noqa: D102
        return LocalStore(self._folder / prefix, self.variable)

    def probe(self) -> None:  # noqa: D102
        missing = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        try:
            super().probe()
        finally:
            for folder in missing:
                with suppress(OSError):  # never made, or another run has begun to fill it
                    folder.rmdir()

    @contextmanager
    def _open(self, name: str) -> Iterator[BinaryIO]:
        path = self._folder / name
        with self._errors("read", path):
            try:
                file = path.open("rb")
            except NotADirectoryError as error:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
            with file:
                yield file

    @contextmanager
    def _errors(self, action: str, path: Path) -> Iterator[None]:
        """Turn what the file system raises into the job's errors, but for the answers "taken" and "not there"."""
        try:
            yield
        except OSError as error:
            if isinstance(error, FileExistsError) or (action == "read" and isinstance(error, FileNotFoundError)):
                raise
            what = f"could not {action} {path}: {error.strerror or type(error).__name__}"
            if error.errno in _PERMANENT:
                advice = "give a folder that can be written and whose file system has hard links, or gs://bucket/prefix"
                raise ConfigError.of(self.variable, f"{what}; {advice}") from error
            raise UnavailableError(what) from error


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextmanager
def appearing(target: Path, commit: Callable[[Path, Path], None]) -> Iterator[BinaryIO]:
    """Yield a temporary file beside ``target`` which ``commit`` gives its name once it is whole and on the disk."""
    temporary = target.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
    file = _open_new(temporary)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            commit(temporary, target)  # as long as it is open, nobody takes it for a killed writer's
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # some network file systems have no fsync for folders: the name is safe without it
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _open_new(path: Path) -> BinaryIO:
    """Open a new file, marked as being written for as long as it is open."""
    for _ in range(_ATTEMPTS - 1):
        with suppress(FileNotFoundError):  # another run may just have taken its empty folder away again
            return _open_once(path)
    return _open_once(path)


def _open_once(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if not path.parent.exists():  # mkdir found it, and then did not
            raise FileNotFoundError(path.parent) from error
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from error
    file = path.open("xb")
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX)
    if not path.exists():  # removed before it was locked
        file.close()
        raise FileNotFoundError(path)
    return file


def _remove(path: Path) -> None:
    """Remove a file, unless it has no name yet and its writer lives: that one is left alone."""
    if not path.name.startswith(_TEMPORARY):
        path.unlink(missing_ok=True)
        return
    with suppress(OSError), path.open("rb") as file:  # locked; or gone, or not to be known
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
