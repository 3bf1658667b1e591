"""A folder as a store: what killed writers leave is removed, what living ones write is not."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.local_files import appearing
from job.storage.locations import open_store
from job.storage.store import Store
from tests.support.running import python


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), "TRANSFER_OUTPUT_URI")


def test_what_a_killed_writer_left_is_removed(folder: Store, tmp_path: Path) -> None:
    script = f"""
        import os, pathlib, signal
        from job.local_files import appearing
        with appearing(pathlib.Path({str(tmp_path / "store/below/file")!r}), os.replace) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    python(script, ends=-9)
    folder.put_bytes("below/other", b"whole")
    assert len(list((tmp_path / "store" / "below").iterdir())) == 2
    folder.tidy()
    assert [path.name for path in (tmp_path / "store" / "below").iterdir()] == ["other"]
    folder.delete_all()
    assert not (tmp_path / "store").exists()
    folder.delete_all()
    folder.tidy()


@pytest.mark.parametrize("removal", ["tidy", "delete_all"])
def test_what_is_being_written_is_left_alone(removal: str, folder: Store, tmp_path: Path) -> None:
    with appearing(tmp_path / "store" / "below" / "file", os.replace) as file:
        file.write(b"who")
        getattr(folder, removal)()
        file.write(b"le")
    assert folder.read("below/file") == b"whole"


def test_writers_and_removers_at_the_same_time_do_not_disturb_each_other(folder: Store) -> None:
    def write(number: int) -> None:
        for _ in range(50):
            folder.put_bytes(f"{number}/file", b"whole")

    def remove(_: int) -> None:
        for _ in range(50):
            folder.delete_all()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, number) for number, work in enumerate((write, remove, write, remove))]:
            done.result()
    assert set(folder.list()) <= {"0/file", "2/file"}
