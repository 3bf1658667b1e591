"""Rows in a file: what is read is what was written, in bounded memory, and damage is found and named."""

from __future__ import annotations

import errno
import gc
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest

from job.data.row_files import DamagedRowsError, RowFile, RowFileWriter
from job.errors import UnavailableError
from tests.support.running import python

ROWS = np.random.default_rng(0).normal(size=(50, 3, 4)).astype(np.float32)


def times_open(path: Path) -> int:
    """Return how many descriptors of this process lead to the file."""
    gc.collect()
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself, and whatever another thread closes meanwhile
            links.append(descriptor.readlink())
    return links.count(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "rows.npy"
    np.save(path, ROWS)
    return path


def test_a_file_tells_what_it_holds(path: Path) -> None:
    rows = RowFile.open(path)
    assert (rows.shape, rows.dtype, len(rows), rows.nbytes) == (ROWS.shape, ROWS.dtype, 50, ROWS.nbytes)
    assert rows.crc32c() == google_crc32c.value(ROWS.tobytes())
    np.testing.assert_array_equal(rows.load(), ROWS)


@pytest.mark.parametrize(
    "index",
    [
        np.array([7]),
        np.array([5, 6, 7, 8]),
        np.array([49, 0, 3, 3, 4, 5, 5, 0]),
        np.array([9, 8, 7]),
        np.array([], np.int64),
        np.array([1, 2, 40], np.uint8),
        slice(None),
        slice(10, 20),
        slice(-3, None),
        slice(45, 99),
        slice(20, 10),
        slice(40, 2, -7),
    ],
    ids=str,
)
def test_rows_are_taken_as_from_an_array_and_are_copies(path: Path, index: npt.NDArray[Any] | slice) -> None:
    rows = RowFile.open(path)
    taken = rows[index]
    assert taken.dtype == ROWS.dtype
    np.testing.assert_array_equal(taken, ROWS[index])
    taken[:] = 0
    np.testing.assert_array_equal(rows[index], ROWS[index])


@pytest.mark.parametrize("index", [[50], [-1], [0, 50], [[0, 1]], [0.0], [True], 3], ids=str)
def test_an_index_that_is_no_row_is_refused(path: Path, index: Any) -> None:
    with pytest.raises(IndexError):
        RowFile.open(path)[np.array(index)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((0, 3), np.float32), ((4, 0), np.uint8), ((4,), np.float16), ((3, 2, 2, 2), ">i4")],
)
def test_odd_shapes_and_types_are_read(tmp_path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
    expected = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    np.save(tmp_path / "rows.npy", expected)
    loaded = RowFile.open(tmp_path / "rows.npy").load()
    assert loaded.dtype == expected.dtype
    np.testing.assert_array_equal(loaded, expected)


def test_many_threads_read_one_file(path: Path) -> None:
    rows = RowFile.open(path)
    orders = [np.random.default_rng(seed).permutation(50) for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        for order, taken in zip(orders, pool.map(rows.__getitem__, orders), strict=True):
            np.testing.assert_array_equal(taken, ROWS[order])


def test_an_open_file_is_read_to_the_end_when_another_takes_its_name(path: Path, tmp_path: Path) -> None:
    rows = RowFile.open(path)
    np.save(tmp_path / "other.npy", np.zeros((2, 2)))
    (tmp_path / "other.npy").replace(path)
    np.testing.assert_array_equal(rows.load(), ROWS)


def test_the_descriptor_is_closed_when_nobody_holds_the_rows(path: Path) -> None:
    rows = [RowFile.open(path) for _ in range(20)]
    assert times_open(path) == 20
    del rows
    assert times_open(path) == 0


def test_no_descriptor_is_left_open_by_a_refused_file(path: Path) -> None:
    os.truncate(path, 500)
    for _ in range(5):
        with pytest.raises(DamagedRowsError):
            RowFile.open(path)
    assert times_open(path) == 0


@pytest.mark.parametrize("size", [2527, 2529, 1000, 128])
def test_a_file_of_another_size_than_its_header_says_is_refused(path: Path, size: int) -> None:
    os.truncate(path, size)
    with pytest.raises(DamagedRowsError, match=rf"rows\.npy: 2,528 bytes expected, found {size:,}"):
        RowFile.open(path)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x76\x00{'descr'", b"PK\x03\x04" * 100])
def test_a_file_without_a_header_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(
        DamagedRowsError, match=rf"rows\.npy: no \.npy header can be read from its {len(content)} bytes"
    ):
        RowFile.open(path)


def test_no_damage_to_a_header_does_more_than_refuse_it(path: Path) -> None:
    whole = path.read_bytes()
    refused = 0
    for position in range(128):
        for replacement in (0x00, ord("("), ord("'"), ord("9"), 0xFF):
            path.write_bytes(whole[:position] + bytes([replacement]) + whole[position + 1 :])
            try:
                assert RowFile.open(path).load().nbytes == ROWS.nbytes
            except DamagedRowsError:
                refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    "array", [np.asfortranarray(ROWS), np.array([{}]), np.array(3)], ids=["order", "object", "0-d"]
)
def test_arrays_that_are_no_rows_are_refused(tmp_path: Path, array: npt.NDArray[Any]) -> None:
    np.save(tmp_path / "rows.npy", array)
    with pytest.raises(DamagedRowsError, match="no rows in C order"):
        RowFile.open(tmp_path / "rows.npy")


def test_a_file_cut_short_while_open_is_unavailable_and_named(path: Path) -> None:
    rows = RowFile.open(path)
    os.truncate(path, 1000)
    np.testing.assert_array_equal(rows[:10], ROWS[:10])
    with pytest.raises(UnavailableError, match=r"rows\.npy was cut short while in use"):
        rows[np.array([1, 49])]
    with pytest.raises(UnavailableError, match=r"rows\.npy was cut short while in use"):
        rows.crc32c()


def test_reading_a_large_file_row_by_row_takes_no_memory(tmp_path: Path) -> None:
    size = 200 << 20
    path = tmp_path / "rows.npy"
    with RowFileWriter(path, (1 << 20,), np.uint8, 200):
        pass
    with path.open("r+b") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (200, 1 << 20)})
        file.truncate(128 + size)
    # VmHWM, since ru_maxrss of a new process begins with the peak of the one that started it
    code = """if True:
        import sys
        from pathlib import Path
        import numpy as np
        from job.data.row_files import RowFile
        def peak():
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        rows = RowFile.open(Path(sys.argv[1]))
        before = peak()
        total = sum(len(rows[np.array([index])][0]) for index in range(len(rows)))
        rows.crc32c()
        print(total, peak() - before)
    """
    read, taken = map(int, python(code, path).stdout.split())
    assert read == size
    assert taken < size / 10


def test_rows_written_one_by_one_and_together_are_what_numpy_reads(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    with RowFileWriter(path, (3, 4), np.float32, 50) as writer:
        writer.write_row(ROWS[0])
        writer.write(ROWS[1:1])
        writer.write(np.asfortranarray(ROWS[1:30]))
        writer.write(ROWS[::-1][:20][::-1])
    np.testing.assert_array_equal(np.load(path), ROWS)
    np.testing.assert_array_equal(writer.rows.load(), ROWS)
    assert writer.written == 50
    assert writer.crc32c == writer.rows.crc32c() == google_crc32c.value(ROWS.tobytes())


@pytest.mark.parametrize(("expected", "written"), [(1_000_000, 7), (7, 50), (1, 0), (0, 50)])
def test_the_header_says_how_many_rows_were_written_not_how_many_were_expected(
    tmp_path: Path, expected: int, written: int
) -> None:
    with RowFileWriter(tmp_path / "rows.npy", (3, 4), np.float32, expected) as writer:
        writer.write(ROWS[:written])
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), ROWS[:written])
    np.testing.assert_array_equal(writer.rows.load(), ROWS[:written])


def test_an_exception_removes_the_file_and_goes_on(tmp_path: Path) -> None:
    writer = RowFileWriter(tmp_path / "rows.npy", (3, 4), np.float32, 50)

    def write_and_stop() -> None:
        with writer:
            writer.write(ROWS[:5])
            assert writer.path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="not open"):
        writer.write(ROWS)


@pytest.mark.parametrize(
    "rows", [ROWS.astype(np.float64), ROWS[0], ROWS[:, :2], ROWS[None]], ids=lambda a: str(a.shape)
)
def test_rows_of_another_kind_are_refused_and_not_converted(tmp_path: Path, rows: npt.NDArray[Any]) -> None:
    with (
        pytest.raises(ValueError, match=r"rows float32 \[k, \*\(3, 4\)\] expected"),
        RowFileWriter(tmp_path / "rows.npy", (3, 4), np.float32, 50) as writer,
    ):
        writer.write(rows)


def test_types_that_the_format_cannot_keep_are_refused(tmp_path: Path) -> None:
    from ml_dtypes import bfloat16

    for dtype in (bfloat16, object):
        with pytest.raises(ValueError, match="cannot keep"):
            RowFileWriter(tmp_path / "rows.npy", (3,), dtype, 1)


def test_a_full_disk_is_the_systems_own_error(tmp_path: Path) -> None:
    # a link to the device, since the writer removes what it could not finish
    (tmp_path / "rows.npy").symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match="No space left on device") as caught,
        RowFileWriter(tmp_path / "rows.npy", (1 << 20,), np.uint8, 1) as writer,
    ):
        writer.write_row(np.zeros(1 << 20, np.uint8))
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())
    assert Path("/dev/full").is_char_device()


def test_a_write_that_the_system_refuses_leaves_no_file(tmp_path: Path) -> None:
    code = """if True:
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from job.data.row_files import RowFileWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with RowFileWriter(Path(sys.argv[1]), (100,), np.uint8, 200) as writer:
            for _ in range(200):
                writer.write_row(np.zeros(100, np.uint8))
    """
    done = python(code, tmp_path / "rows.npy", ends=1)
    assert done.stderr.splitlines()[-1] == "OSError: [Errno 27] File too large"
    assert not list(tmp_path.iterdir())
