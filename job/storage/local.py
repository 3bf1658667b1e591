"""A store over a local folder: a name appears only when its content is whole and on the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from job.errors import ConfigError, UnavailableError
from job.local_files import TEMPORARY, appearing, remove_if_abandoned
from job.storage.store import BLOCK, Digest, Store, Stored, measure

_PERMANENT = {
    errno.EACCES, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSYS,
    errno.ENOTDIR, errno.ENOTSUP, errno.EPERM, errno.EROFS,
}  # fmt: skip


class LocalStore(Store):
    """A folder; it is made when the first object is stored."""

    def __init__(self, folder: Path, variable: str) -> None:
        super().__init__(str(folder), variable)
        self._folder = folder

    def put(self, name: str, source: Path) -> Stored:
        with source.open("rb") as data:
            return self._write(name, lambda sink: shutil.copyfileobj(data, sink, BLOCK))

    def put_bytes(self, name: str, data: bytes) -> Stored:
        return self._write(name, lambda sink: sink.write(data))

    def _write(self, name: str, fill: Callable[[Any], object]) -> Stored:
        target = self._folder / name
        with self._errors("write", target), appearing(target, os.replace) as file:
            digest = Digest(file)
            fill(digest)
        size, _, crc32c = digest.result()
        return Stored(name, size, crc32c)

    def create(self, name: str, data: bytes) -> bool:
        target = self._folder / name
        try:
            # A hard link, unlike a rename, fails when the name is taken.
            with self._errors("create", target), appearing(target, os.link) as file:
                file.write(data)
        except FileExistsError:
            return self.read(name) == data
        return True

    def read(self, name: str) -> bytes | None:
        try:
            with self._open(name) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def checksums(self, name: str) -> tuple[int, str, str]:
        with self._open(name) as file:
            return measure(file)

    def download(self, name: str, target: Path) -> None:
        with self._open(name) as source, self._errors("write", target), appearing(target, os.replace) as file:
            shutil.copyfileobj(source, file, BLOCK)

    def copy(self, name: str, source: Store, source_name: str) -> Stored:
        if not isinstance(source, LocalStore):
            return super().copy(name, source, source_name)
        with source._open(source_name) as data:
            return self._write(name, lambda sink: shutil.copyfileobj(data, sink, BLOCK))

    def list(self) -> dict[str, Stored]:
        found = {}
        with self._errors("list", self._folder):
            for folder, _, names in os.walk(self._folder, onerror=_raise_unless_absent):
                for path in (Path(folder, name) for name in names if not name.startswith(TEMPORARY)):
                    name = path.relative_to(self._folder).as_posix()
                    with suppress(FileNotFoundError):  # another run may be deleting its own
                        found[name] = Stored(name, path.stat().st_size, None)
        return found

    def delete(self, name: str) -> None:
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

    def tidy(self) -> None:
        with self._errors("list", self._folder):
            for path in self._folder.rglob(f"{TEMPORARY}*"):
                _remove(path)

    def child(self, prefix: str) -> LocalStore:
        return LocalStore(self._folder / prefix, self.variable)

    def probe(self) -> None:
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


def _remove(path: Path) -> None:
    """Remove a file, unless it has no name yet and its writer lives: that one is left alone."""
    if path.name.startswith(TEMPORARY):
        remove_if_abandoned(path)
    else:
        path.unlink(missing_ok=True)
