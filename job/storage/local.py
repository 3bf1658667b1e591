"""A store over a local folder: a name appears only when its content is whole and on the disk.

Whoever can write to the folder decides neither what is read nor what is written outside of it, nor that a reader waits
for ever: symbolic links in it are not followed, and nothing but plain files is opened.
"""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from job.errors import ConfigError, Problem, UnavailableError
from job.local_files import TEMPORARY, appearing, remove_if_abandoned
from job.storage.store import BLOCK, Digest, Store, Stored, UnusableError, Whole, measure

_PERMANENT = {
    errno.EACCES, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSYS,
    errno.ENOTDIR, errno.ENOTSUP, errno.EPERM, errno.EROFS,
}  # fmt: skip


class LocalStore(Store):
    """A folder; it is made when the first object is stored.

    Symbolic links may lead to ``root``, which is the folder itself or one that it lies in.
    """

    def __init__(self, folder: Path, variable: str, root: Path | None = None) -> None:
        super().__init__(str(folder), variable)
        self._folder = folder
        self._root = root or folder

    def put(self, name: str, source: Path) -> Stored:
        with source.open("rb") as data:
            return self._write(name, lambda sink: shutil.copyfileobj(data, sink, BLOCK))

    def put_bytes(self, name: str, data: bytes) -> Stored:
        return self._write(name, lambda sink: sink.write(data))

    def _write(self, name: str, fill: Callable[[Any], object]) -> Stored:
        target = self._path(name)
        with self._errors("write", target), appearing(target, os.replace) as file:
            digest = Digest(file)
            fill(digest)
        size, _, crc32c = digest.result()
        return Stored(name, size, crc32c)

    def create(self, name: str, data: bytes) -> bool:
        target = self._path(name)
        try:
            # A hard link, unlike a rename, fails when the name is taken.
            with self._errors("create", target), appearing(target, os.link) as file:
                file.write(data)
        except FileExistsError:
            return self.read(name) == data
        return True

    def read(self, name: str) -> bytes | None:
        content = Whole(self, name)
        try:
            with self._open(name) as file:
                shutil.copyfileobj(file, content, BLOCK)
        except FileNotFoundError:
            return None
        return content.getvalue()

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
        for path, status in self._below("list"):
            if not (stat.S_ISDIR(status.st_mode) or path.name.startswith(TEMPORARY)):
                name = path.relative_to(self._folder).as_posix()
                found[name] = Stored(name, status.st_size, None, stat.S_ISREG(status.st_mode))
        return found

    def delete(self, name: str) -> None:
        target = self._path(name)
        with self._errors("delete", target), suppress(NotADirectoryError):  # what lies below a file is not there
            target.unlink(missing_ok=True)

    def delete_all(self) -> None:
        """Delete every file, what killed writers left included, and the folders that are empty then; this one too."""
        folders = [self._folder]
        for path, status in self._below("delete"):
            if stat.S_ISDIR(status.st_mode):
                folders.append(path)
            else:
                with self._errors("delete", path):
                    _remove(path, status)
        for folder in reversed(folders):
            with suppress(OSError):  # gone already, or another run fills it
                folder.rmdir()

    def tidy(self) -> None:
        for path, status in self._below("list"):
            if path.name.startswith(TEMPORARY) and not stat.S_ISDIR(status.st_mode):
                with self._errors("delete", path):
                    _remove(path, status)

    def child(self, prefix: str) -> LocalStore:
        return LocalStore(self._path(prefix), self.variable, self._root)

    def _path(self, name: str) -> Path:
        """Return where ``name`` lies. UnusableError where that is not in this folder."""
        if "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise self.unusable(name, "is no name: a relative path without . and .. is one")
        path = self._folder / name
        self._require_no_link(path.parent)
        return path

    def _require_no_link(self, folder: Path) -> None:
        with self._errors("read", folder):
            for each in (folder, *folder.parents):
                if each == self._root:
                    return
                if each.is_symlink():
                    message = f"{str(each)!r} is a symbolic link, which is not followed; name the place where it leads"
                    raise UnusableError([Problem(self.variable, message)])

    def _below(self, action: str) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield all that lies below this folder; a folder before what is in it."""
        self._require_no_link(self._folder)
        folders = [self._folder]
        with self._errors(action, self._folder):
            while folders:
                entries: builtins.list[os.DirEntry[str]] = []
                # another run may be deleting its own
                with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folders.pop()) as found:
                    entries += found
                for entry in entries:
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISDIR(status.st_mode):
                            folders.append(Path(entry.path))
                        yield Path(entry.path), status

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
        path = self._path(name)
        with self._errors("read", path):
            try:
                file = _open_if_plain(path)
            except NotADirectoryError as error:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
            if file is None:
                raise self.unusable(name, "is not a plain file, and is not read")
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


def _open_if_plain(path: Path) -> BinaryIO | None:
    if not stat.S_ISREG(path.lstat().st_mode):  # opening a device may do something
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # it may have been replaced just now
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    return None


def _remove(path: Path, status: os.stat_result) -> None:
    """Remove a file, unless it has no name yet and its writer lives: that one is left alone."""
    if path.name.startswith(TEMPORARY) and stat.S_ISREG(status.st_mode):
        remove_if_abandoned(path)
    else:
        path.unlink(missing_ok=True)
