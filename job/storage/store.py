"""What a store is: named objects that appear whole, create-only commits, and the checksums of what is stored.

Names inside a store are relative POSIX paths. A name appears only when its content is whole. Failures come out as the
two errors that a scheduler can tell apart: ConfigError when a retry cannot help, UnavailableError when it can.
"""

from __future__ import annotations

import base64
import hashlib
import tempfile
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from job.errors import ConfigError

# Files are read, written and measured in blocks of so many bytes.
BLOCK = 1 << 20
# The storage client's pool keeps 10 connections; more threads would open and drop one for each request.
THREADS = 8


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
    while block := file.read(BLOCK):
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

    def is_empty(self) -> bool:
        """Return whether there is no object here, nor in folders below."""
        return not self.list()

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
