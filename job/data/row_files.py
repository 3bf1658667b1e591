"""Rows in one .npy file, read and written by position.

Not by memory map: mapped pages count in the resident memory, so the peak would grow with the number of photos; a file
that is cut short under a map kills the process (SIGBUS), and so does a disk that runs full under a writable one.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import google_crc32c
import numpy as np
import numpy.typing as npt

from job.errors import UnavailableError

_BLOCK = 1 << 20
_LONGEST_HEADER = 1 << 14  # NumPy itself refuses headers over 10,000 bytes


class DamagedRowsError(Exception):
    """A file does not hold the rows that its header promises, or has no header that can be read."""


class RowFile:
    """The rows of a .npy file, open for reading; several threads may read at once.

    Behaves like an array where rows are taken by a list of indices or by a slice, and copies them. It goes on reading
    what it opened when the file is renamed, replaced or removed. The descriptor is closed when nobody holds the object.

    path: where the file was when it was opened. shape: of all rows, [n, ...]. dtype: of one value.
    """

    def __init__(self, path: Path, descriptor: int, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Take over an open descriptor whose data begin at byte ``start``; :meth:`open` is the usual way."""
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self._descriptor = descriptor
        self._start = start
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        # not at exit, when threads may still read: the number could by then belong to another file
        weakref.finalize(self, os.close, descriptor).atexit = False

    @classmethod
    def open(cls, path: Path) -> RowFile:
        """Open a file of rows in C order.

        Raises:
            DamagedRowsError: the header cannot be read, or the file has not exactly the bytes that it promises.
            OSError: the file cannot be opened or read.
        """
        descriptor = os.open(path, os.O_RDONLY)
        try:
            start, shape, dtype = _read_header(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, start, shape, dtype)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes, without the header."""
        return self.shape[0] * self._row_bytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: npt.NDArray[np.int64] | slice) -> npt.NDArray[Any]:
        """Return copies of rows [k, ...] in the order of ``index`` [k]; neighbours that follow each other in one read.

        Raises:
            IndexError: an index is negative, too large or no integer.
            UnavailableError: the file got shorter since it was opened, or the disk fails.
        """
        if isinstance(index, slice):
            rows = np.arange(*index.indices(len(self)), dtype=np.int64)
        else:
            rows = np.asarray(index)
            if rows.ndim != 1 or rows.dtype.kind not in "iu":
                raise IndexError(f"rows are taken by integers [k], got {rows.dtype} of shape {rows.shape}")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"rows 0 to {len(self) - 1} are there, asked for {rows.min()} to {rows.max()}")
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        target = out.reshape(-1).view(np.uint8).data
        edges = [0, *(np.flatnonzero(np.diff(rows.astype(np.int64)) != 1) + 1).tolist(), len(rows)]
        for begin, end in itertools.pairwise(edges):
            if begin < end:
                part = target[begin * self._row_bytes : end * self._row_bytes]
                self._read(part, self._start + int(rows[begin]) * self._row_bytes)
        return out

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return all rows, so that NumPy does not take the file for a sequence of numbers."""
        return np.asarray(self.load(), dtype)

    def load(self) -> npt.NDArray[Any]:
        """Return all rows in memory. Raises UnavailableError like indexing."""
        return self[:]

    def crc32c(self) -> int:
        """Return the CRC32C of the data, without the header, read in blocks. Raises UnavailableError like indexing."""
        value = 0
        buffer = np.empty(min(_BLOCK, self.nbytes), np.uint8)
        for begin in range(0, self.nbytes, _BLOCK):
            block = buffer[: self.nbytes - begin]
            self._read(block.data, self._start + begin)
            value = google_crc32c.extend(value, block)
        return value

    def _read(self, target: memoryview, position: int) -> None:
        while len(target):
            try:
                done = os.preadv(self._descriptor, [target], position)
            except OSError as error:
                raise UnavailableError(f"{self.path} cannot be read at byte {position:,}: {error.strerror}") from error
            if not done:
                raise UnavailableError(
                    f"{self.path} was cut short while in use: no data at byte {position:,}, "
                    f"{self._start + self.nbytes:,} bytes when opened; run again, and let nothing else change the file"
                )
            target = target[done:]
            position += done


def _read_header(path: Path, descriptor: int) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Return where the data begin, their shape and dtype, and hold them against the size of the file."""
    found = os.fstat(descriptor).st_size
    file = io.BytesIO(os.pread(descriptor, _LONGEST_HEADER, 0))
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran_order, dtype = read(file)
    except Exception as error:  # NumPy lets through what its tokenizer raises on damaged text
        raise DamagedRowsError(
            f"{path}: no .npy header can be read from its {found:,} bytes, at least 128 expected: {error}"
        ) from error
    if fortran_order or dtype.hasobject or not shape or min(shape) < 0:
        raise DamagedRowsError(
            f"{path}: its {found:,} bytes are no rows in C order: {dtype} of shape {shape}, "
            f"fortran_order {fortran_order}"
        )
    expected = file.tell() + math.prod(shape) * dtype.itemsize
    if found != expected:
        raise DamagedRowsError(f"{path}: {expected:,} bytes expected, found {found:,}")
    return file.tell(), shape, dtype


class RowFileWriter:
    """Writes rows in order to a .npy file; a context manager.

    While it writes, the header promises ``expected`` rows, so the file of a killed process is refused by
    :meth:`RowFile.open` unless all were there. A clean exit puts the number of rows written into the header, which
    may be fewer or more, and opens the result; an exception removes the file.

    path: the file. written: number of rows so far. crc32c: of the data so far, without the header, as an integer.
    rows: the finished rows, from a clean exit on; they stay readable when the file is renamed.

    Raises:
        ValueError: a .npy file cannot keep ``dtype`` (objects, bfloat16).
        OSError: the file cannot be written, unchanged: ENOSPC and EDQUOT mean that the disk is full.
    """

    rows: RowFile

    def __init__(self, path: Path, row_shape: tuple[int, ...], dtype: npt.DTypeLike, expected: int) -> None:
        self.path = path
        self.written = 0
        self.crc32c = 0
        self._row_shape = tuple(row_shape)
        self._dtype = np.dtype(dtype)
        self._expected = expected
        self._file: BinaryIO | None = None
        descr = np.lib.format.dtype_to_descr(self._dtype)
        if self._dtype.hasobject or np.lib.format.descr_to_dtype(descr) != self._dtype:
            raise ValueError(f"a .npy file cannot keep {self._dtype}; store it as an unsigned integer of its size")

    def __enter__(self) -> Self:
        self._file = self.path.open("wb")
        try:
            self._write_header(self._file, self._expected)
        except BaseException:
            self._discard(self._file)
            raise
        return self

    def write(self, rows: npt.NDArray[Any]) -> None:
        """Append rows [k, *row_shape] of the writer's dtype. Raises ValueError for others, OSError."""
        if self._file is None:
            raise ValueError(f"{self.path} is not open for writing")
        if rows.shape[1:] != self._row_shape or rows.ndim != 1 + len(self._row_shape) or rows.dtype != self._dtype:
            raise ValueError(f"rows {self._dtype} [k, *{self._row_shape}] expected, got {rows.dtype} {rows.shape}")
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        self._file.write(data.data)
        self.crc32c = google_crc32c.extend(self.crc32c, data)
        self.written += len(rows)

    def write_row(self, row: npt.NDArray[Any]) -> None:
        """Append one row [*row_shape]. Raises like :meth:`write`."""
        self.write(row[np.newaxis])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        if error is not None:
            self._discard(file)
            return
        try:
            file.seek(0)
            self._write_header(file, self.written)
            file.close()
            self.rows = RowFile.open(self.path)
        except BaseException:
            self._discard(file)
            raise

    def _write_header(self, file: BinaryIO, rows: int) -> None:
        # NumPy leaves room for the first axis to grow (since 1.25), so the header is as long for any number of rows.
        descr = np.lib.format.dtype_to_descr(self._dtype)
        shape = (rows, *self._row_shape)
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})

    def _discard(self, file: BinaryIO) -> None:
        # On a full disk, closing tries once more to write what is buffered and fails with the same error.
        with suppress(OSError):
            file.close()
        self.path.unlink(missing_ok=True)
