"""Rows between runs: used only when they are whole and their key is the same, and otherwise it is said why not."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from job.data.row_cache import RowCache
from job.errors import ConfigError
from tests.support.running import python

NAME = "cats_vs_dogs-train-block_11"
KEY: dict[str, Any] = {
    "weights": "3f2a" * 16,
    "data": "cats_vs_dogs:4.0.1",
    "split": "train",
    "ids": ["a__0", "a__1"],
    "size": 160,
    "preprocessing": "tf",
    "precision": "float32",
    "cut": None,
    "scaled": True,
}
ROWS = np.random.default_rng(0).normal(size=(700, 512)).astype(np.float32)


def fill(
    cache: RowCache, key: Mapping[str, Any] = KEY, rows: npt.NDArray[Any] = ROWS, name: str = NAME
) -> npt.NDArray[Any]:
    with cache.make(name, key, rows.shape[1:], rows.dtype, len(rows)) as writer:
        writer.write(rows)
    return writer.rows.load()


@pytest.fixture
def cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> RowCache:
    caplog.set_level(logging.INFO, "job.data.row_cache")
    return RowCache(tmp_path / "rows")


@pytest.fixture
def filled(cache: RowCache) -> RowCache:
    np.testing.assert_array_equal(fill(cache), ROWS)
    return cache


@pytest.fixture
def refused(cache: RowCache, caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """What returns why rows of a key are refused: the end of the one line that says so."""

    def reason(key: Mapping[str, Any] = KEY) -> str:
        caplog.clear()
        assert cache.find(NAME, key) is None
        (record,) = caplog.records
        assert record.levelno == logging.INFO
        assert record.name_of_rows == NAME  # type: ignore[attr-defined]
        start, _, reason = record.getMessage().partition(" since ")
        assert start == f"{NAME}: made anew,"
        return reason

    return reason


@pytest.fixture
def file(filled: RowCache, tmp_path: Path) -> Path:
    """The file of rows that are kept; their description lies beside it."""
    assert filled
    return tmp_path / f"rows/{NAME}.npy"


def test_where_nothing_is_kept_nothing_is_found_and_nothing_said(
    cache: RowCache, caplog: pytest.LogCaptureFixture
) -> None:
    assert cache.find(NAME, KEY) is None
    assert not caplog.records


@pytest.mark.usefixtures("filled")
def test_what_was_made_is_found_by_a_cache_opened_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = RowCache(tmp_path / "rows").find(NAME, dict(reversed(KEY.items())))
    assert found is not None
    np.testing.assert_array_equal(found.load(), ROWS)
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == [f"{NAME}.json", f"{NAME}.npy"]
    assert not caplog.records


def test_no_rows_at_all_can_be_kept(cache: RowCache) -> None:
    fill(cache, rows=ROWS[:0])
    found = cache.find(NAME, KEY)
    assert found is not None
    assert found.load().shape == (0, 512)


@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        ("weights", "9c41" * 16, f"weights changed from {('3f2a' * 16)[:37]}... to {('9c41' * 16)[:37]}..."),
        ("data", "cats_vs_dogs:4.0.2", "data changed from cats_vs_dogs:4.0.1 to cats_vs_dogs:4.0.2"),
        ("split", "train[:50%]", "split changed from train to train[:50%]"),
        ("ids", ["a__0", "a__2"], 'ids changed from ["a__0", "a__1"] to ["a__0", "a__2"]'),
        ("size", 160.0, "size changed from 160 to 160.0"),
        ("preprocessing", "tensorflow" + "x" * 90, f"preprocessing changed from tf to tensorflow{'x' * 27}..."),
        ("precision", "float16", "precision changed from float32 to float16"),
        ("cut", "block_11", "cut changed from null to block_11"),
        ("scaled", 1, "scaled changed from true to 1"),
        ("another", 5, "another is new"),
    ],
)
def test_rows_of_another_key_are_refused_and_the_difference_named(
    filled: RowCache, refused: Callable[..., str], entry: str, value: Any, reason: str
) -> None:
    assert refused(KEY | {entry: value}) == reason
    assert filled.find(NAME, KEY) is not None


@pytest.mark.usefixtures("filled")
def test_every_difference_is_named(refused: Callable[..., str]) -> None:
    key = {entry: value for entry, value in KEY.items() if entry != "cut"} | {"size": 224}
    assert refused(key) == "cut is gone, size changed from 160 to 224"


def test_a_difference_deep_in_a_long_list_is_named_without_the_list(
    cache: RowCache, refused: Callable[..., str]
) -> None:
    ids = [f"a__{index}" for index in range(1000)]
    fill(cache, {"ids": ids})
    assert refused({"ids": [*ids[:-1], "b"]}) == "ids changed"


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (10_000, "the file is cut short: 10,000 bytes of 1,433,728"),
        (1_433_729, "the file is too long: 1,433,729 bytes of 1,433,728"),
    ],
)
def test_a_file_cut_short_or_grown_is_refused_with_both_sizes(
    refused: Callable[..., str], file: Path, size: int, reason: str
) -> None:
    os.truncate(file, size)
    assert refused() == reason


@pytest.mark.parametrize("position", [128, 700_000, 1_100_000, 1_433_727])
def test_a_flipped_bit_is_refused(refused: Callable[..., str], file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    assert refused() == "the file's checksum differs"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"<f4", b"<i4", "the file's header differs: <i4 of shape [700, 512]"),
        (b"(700, 512)", b"(512, 700)", "the file's header differs: <f4 of shape [512, 700]"),
        (b"NUMPY", b"numpy", "the file cannot be read: "),
    ],
)
def test_a_changed_header_is_refused(
    refused: Callable[..., str], file: Path, old: bytes, new: bytes, reason: str
) -> None:
    file.write_bytes(file.read_bytes().replace(old, new, 1))
    assert refused().startswith(reason)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"{}", b"\xff", b'{"key": {}, "bytes": 1}', b"[" * 100_000,
        b'{"key": [], "bytes": 1, "crc32c": "", "shape": [], "dtype": ""}',
        b'{"key": {"a": NaN}, "bytes": 1, "crc32c": "", "shape": [], "dtype": ""}',
        b'{"key": {}, "bytes": "1", "crc32c": "", "shape": [], "dtype": ""}',
    ],
    ids=lambda content: content[:30].decode(errors="replace"),
)  # fmt: skip
def test_a_damaged_description_is_refused(refused: Callable[..., str], file: Path, content: bytes) -> None:
    file.with_suffix(".json").write_bytes(content)
    assert refused() == "their description cannot be read"


def test_one_file_without_the_other_is_refused(refused: Callable[..., str], file: Path) -> None:
    aside = file.with_suffix(".json").rename(file.with_name("aside"))
    assert refused() == "they were not finished: there is no description"
    aside.rename(file.with_suffix(".json"))
    file.unlink()
    assert refused() == "the file is missing"


def test_new_rows_beside_the_description_of_the_old_are_refused(
    filled: RowCache, refused: Callable[..., str], file: Path
) -> None:
    old = file.with_suffix(".json").read_bytes()
    fill(filled, KEY | {"weights": "other"}, ROWS + 1)
    file.with_suffix(".json").write_bytes(old)
    assert refused() == "the file's checksum differs"


def test_rows_in_use_are_read_to_the_end_when_others_take_their_name(filled: RowCache) -> None:
    before = filled.find(NAME, KEY)
    assert before is not None
    fill(filled, KEY | {"size": 224}, ROWS + 1)
    np.testing.assert_array_equal(before.load(), ROWS)


def test_an_exception_keeps_what_was_there_and_leaves_nothing_else(filled: RowCache, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in (tmp_path / "rows").iterdir()}

    def write_and_stop() -> None:
        with filled.make(NAME, KEY | {"size": 224}, ROWS.shape[1:], ROWS.dtype, len(ROWS)) as writer:
            writer.write(ROWS)
            assert len(list((tmp_path / "rows").iterdir())) == 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert {path.name: path.read_bytes() for path in (tmp_path / "rows").iterdir()} == before


def test_a_key_that_json_cannot_keep_is_an_error_and_leaves_nothing(cache: RowCache, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        fill(cache, {"rate": float("nan")})
    assert not list((tmp_path / "rows").iterdir())


@pytest.mark.parametrize("name", ["a/b", "../a", "", ".", "..", ".hidden", "x" * 500, "Käse", "a b", "a\nb", "a\0b"])
def test_any_name_is_kept_inside_the_folder(cache: RowCache, tmp_path: Path, name: str) -> None:
    fill(cache, name=name)
    assert cache.find(name, KEY) is not None
    assert sorted(path.suffix for path in (tmp_path / "rows").iterdir()) == [".json", ".npy"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_names_that_differ_in_what_a_file_system_refuses_are_kept_apart(cache: RowCache) -> None:
    names = ["a/b", "a:b", "a_b", "x" * 500, "x" * 501]
    for number, name in enumerate(names):
        fill(cache, rows=ROWS[: number + 1], name=name)
    assert [len(cache.find(name, KEY) or ()) for name in names] == [1, 2, 3, 4, 5]


def test_a_full_disk_is_the_systems_own_error_and_leaves_what_was_there(tmp_path: Path) -> None:
    code = """if True:
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from job.data.row_cache import RowCache
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        cache = RowCache(Path(sys.argv[1]))
        for rows in (10, 200):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            with cache.make("rows", {}, (100,), np.uint8, rows) as writer:
                writer.write(np.zeros((rows, 100), np.uint8))
    """
    done = python(code, tmp_path, ends=1)
    assert done.stderr.splitlines()[-1] == "OSError: [Errno 27] File too large"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "rows.npy"]
    assert len(RowCache(tmp_path).find("rows", {}) or ()) == 10


@pytest.mark.parametrize("place", ["file/below", "file"])
def test_a_folder_that_cannot_be_made_is_the_users_to_correct(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"TRANSFER_CACHE_DIR: .*file.* cannot be used for rows"):
        RowCache(tmp_path / place)


def test_a_folder_that_cannot_be_written_is_the_users_to_correct() -> None:
    with pytest.raises(ConfigError, match="TRANSFER_CACHE_DIR: /proc/self/task cannot be used for rows"):
        RowCache(Path("/proc/self/task"))


WRITE = """if True:
    import itertools, sys
    from pathlib import Path
    import numpy as np
    from job.data.row_cache import RowCache
    cache = RowCache(Path(sys.argv[1]))
    lines = itertools.count(1)
    for turn in itertools.count():
        with cache.make("rows", {"key": turn % 2}, (1000,), np.int64, 20) as writer:
            for _ in range(20):
                writer.write_row(np.full(1000, turn % 2))
                line = next(lines)
                print(line, flush=True)
                if line == int(sys.argv[2]):
                    sys.stdin.read()
"""


def kill_after(lines: int, folder: Path, *, waiting: bool) -> None:
    """Start a process that makes the same rows again and again, by turns of key 0 and 1, and kill it.

    lines: how many rows it has written when it is killed; more where it is not ``waiting`` for that.
    """
    with subprocess.Popen(
        [sys.executable, "-c", WRITE, str(folder), str(lines if waiting else 0)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for _ in range(lines):
            assert process.stdout.readline()
        process.kill()
    assert process.returncode == -9


@pytest.mark.parametrize(("lines", "kept"), [(1, None), (20, None), (25, 0), (60, 1)])
def test_what_a_killed_process_did_not_finish_is_not_found_and_removed_by_the_next(
    tmp_path: Path, lines: int, kept: int | None
) -> None:
    kill_after(lines, tmp_path, waiting=True)
    whole = set() if kept is None else {"rows.json", "rows.npy"}
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left - whole) == 1
    cache = RowCache(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == whole
    assert found_by_turns(cache) == [key == kept for key in (0, 1)]


@pytest.mark.parametrize("lines", [39, 40, 41, 100])
def test_rows_are_right_or_refused_whenever_a_process_is_killed(tmp_path: Path, lines: int) -> None:
    kill_after(lines, tmp_path, waiting=False)
    assert sum(found_by_turns(RowCache(tmp_path))) <= 1
    assert {path.name for path in tmp_path.iterdir()} == {"rows.json", "rows.npy"}


def found_by_turns(cache: RowCache) -> list[bool]:
    """Return for key 0 and 1 whether its rows are found, and hold those that are against what was written."""
    found = [cache.find("rows", {"key": key}) for key in (0, 1)]
    for key, rows in enumerate(found):
        np.testing.assert_array_equal(rows.load() if rows else [], np.full((20, 1000), key) if rows else [])
    return [rows is not None for rows in found]


def test_what_is_being_written_and_what_others_own_is_left_alone(cache: RowCache, tmp_path: Path) -> None:
    others = tmp_path / "rows/weights.part"
    others.touch()
    with cache.make(NAME, KEY, ROWS.shape[1:], ROWS.dtype, len(ROWS)) as writer:
        RowCache(tmp_path / "rows")
        assert writer.path.exists()
        writer.write(ROWS)
    assert cache.find(NAME, KEY) is not None
    assert others.exists()


def test_the_description_can_be_read_by_people(file: Path) -> None:
    told = json.loads(file.with_suffix(".json").read_text())
    assert told["key"] == KEY
    assert told["bytes"] == file.stat().st_size
