"""Rows kept on local disk between runs, under a readable name and with a key of everything that decides them."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from job.data.row_files import DamagedRowsError, RowFile, RowFileWriter
from job.errors import ConfigError, UnavailableError
from job.local_files import TEMPORARY, remove_if_abandoned, unfinished

logger = logging.getLogger(__name__)

_LONGEST_NAME = 180
_LONGEST_VALUE = 40


@dataclass(frozen=True)
class _Description:
    """The JSON beside the rows: their key, and by what the file is known again.

    bytes: size of the whole file. crc32c: of the data, base64 as elsewhere in the job. shape and dtype: of the header,
    which the checksum does not cover.
    """

    key: dict[str, Any]
    bytes: int
    crc32c: str
    shape: list[int]
    dtype: str


def _parse(text: bytes) -> _Description:
    """Raise ValueError or TypeError where ``text`` is no description."""
    found = _Description(**json.loads(text))
    if not isinstance(found.key, dict) or not isinstance(found.bytes, int):
        raise TypeError("key or bytes have the wrong type")
    _canonical(found.key)
    return found


def folder_in(scratch: str | Path) -> Path:
    """Return where rows of frozen layers are kept below a run's scratch space or TRANSFER_CACHE_DIR."""
    return Path(scratch) / "features"


class _RefusedError(Exception):
    """Rows are there but may not be used; the message says why."""


class RowCache:
    """A folder of rows, ``<name>.npy`` with a description ``<name>.json`` beside each.

    Several processes may share it: what is written gets its name only when it is whole, the description last, and
    rows that somebody reads stay readable when others take their name. Neither file is synced to the disk: what a
    power failure leaves is found out by its size and checksum.
    """

    def __init__(self, folder: Path) -> None:
        """Open ``folder``, make it if need be, and remove what killed processes left half-written.

        Raises:
            ConfigError: the folder cannot be made or written.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError.of(
                "TRANSFER_CACHE_DIR",
                f"{folder} cannot be used for rows: {error.strerror}; give a folder on local disk that can be written",
            ) from error
        for path in folder.glob(f"{TEMPORARY}*"):
            remove_if_abandoned(path)

    def find(self, name: str, key: Mapping[str, Any]) -> RowFile | None:
        """Return the rows kept under ``name``, or None where there are none that may be used.

        They are used only if their key is ``key`` and the file is, by size and CRC32C, the one that was written. If
        something else was there, a log line says what differs.

        Args:
            name: what the rows are, for people; any text.
            key: everything that decides the rows: JSON scalars, lists and objects.
        """
        data, description = self._paths(name)
        if not data.exists() and not description.exists():
            return None
        try:
            return _open(data, description, key)
        except _RefusedError as reason:
            extra = {"name_of_rows": name, "reason": str(reason)}
            logger.info("%s: made anew, since %s", name, reason, extra=extra)
            return None

    @contextmanager
    def make(
        self, name: str, key: Mapping[str, Any], row_shape: tuple[int, ...], dtype: npt.DTypeLike, expected: int
    ) -> Iterator[RowFileWriter]:
        """Write rows anew, in place of what is kept under ``name``.

        A clean exit keeps them, and the writer's ``rows`` are then theirs; an exception leaves what was there before.

        Args:
            name: as in :meth:`find`.
            key: as in :meth:`find`.
            row_shape: shape of one row.
            dtype: of the values.
            expected: how many rows there will probably be.

        Raises:
            OSError: the file cannot be written, unchanged: ENOSPC and EDQUOT mean that the disk is full.
        """
        data, description = self._paths(name)
        with unfinished(data) as file:
            with RowFileWriter(Path(file.name), row_shape, dtype, expected) as writer:
                yield writer
            rows, size = writer.rows, Path(file.name).stat().st_size
            told = _Description(dict(key), size, _base64(writer.crc32c), list(rows.shape), rows.dtype.str)
            with unfinished(description) as of_it:
                of_it.write(_canonical(asdict(told)).encode())
                of_it.flush()
                # A kill between the two leaves new rows with an old description or none: find refuses both.
                Path(file.name).replace(data)
                Path(of_it.name).replace(description)

    def _paths(self, name: str) -> tuple[Path, Path]:
        safe = re.sub(r"[^\w.+=@-]|^\.", "_", name, flags=re.ASCII)[:_LONGEST_NAME]
        if safe != name or not safe:
            safe += "-" + hashlib.sha256(name.encode()).hexdigest()[:12]
        return self.folder / f"{safe}.npy", self.folder / f"{safe}.json"


def kept_rows(folder: Path, key: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """Return the bytes of rows that a cache in ``folder`` holds already, by cut and split.

    Whether they may be used is found out when they are: that takes reading them.

    key: what decides the rows, beside cut, split and examples.
    """
    found = {}
    for description in folder.glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            told = json.loads(description.read_bytes())["key"]
            if {name: told.get(name) for name in key} == json.loads(json.dumps(dict(key))):
                size = description.with_suffix(".npy").stat().st_size
                found[str(told["cut"]), str(told["split"])] = size
    return found


def _open(data: Path, description: Path, key: Mapping[str, Any]) -> RowFile:
    """Return the rows if they may be used. Raises _RefusedError."""
    try:
        told = _parse(description.read_bytes())
    except FileNotFoundError:
        raise _RefusedError("they were not finished: there is no description") from None
    except (OSError, ValueError, TypeError, RecursionError):
        raise _RefusedError("their description cannot be read") from None
    if _canonical(told.key) != _canonical(key):
        raise _RefusedError(_differences(told.key, json.loads(_canonical(key))))
    try:
        size = data.stat().st_size
        if size != told.bytes:
            what = "is cut short" if size < told.bytes else "is too long"
            raise _RefusedError(f"the file {what}: {size:,} bytes of {told.bytes:,}")
        rows = RowFile.open(data)
        if [list(rows.shape), rows.dtype.str] != [told.shape, told.dtype]:
            raise _RefusedError(f"the file's header differs: {rows.dtype.str} of shape {list(rows.shape)}")
        if _base64(rows.crc32c()) != told.crc32c:
            raise _RefusedError("the file's checksum differs")
    except FileNotFoundError:
        raise _RefusedError("the file is missing") from None
    except (OSError, DamagedRowsError, UnavailableError) as error:
        raise _RefusedError(f"the file cannot be read: {error}") from error
    return rows


def _base64(crc32c: int) -> str:
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()


def _canonical(value: Mapping[str, Any]) -> str:
    # Compared as text, since to Python 1, 1.0 and True are equal.
    return json.dumps(dict(value), sort_keys=True, allow_nan=False)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say which entries of the key differ; a list of thousands of ids is named, but not written out."""
    said = []
    for entry in sorted(old.keys() | new.keys()):
        before, after = (json.dumps(each[entry], sort_keys=True) if entry in each else None for each in (old, new))
        if before == after:
            continue
        if before is None or after is None:
            said.append(f"{entry} is {'new' if before is None else 'gone'}")
            continue
        shown = [_shortened(text.strip('"')) for text in (before, after)]
        said.append(f"{entry} changed" if shown[0] == shown[1] else f"{entry} changed from {shown[0]} to {shown[1]}")
    return ", ".join(said)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
