"""A folder as a store: what killed writers leave is removed, what living ones write is not; nothing leads out of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from job.errors import ConfigError
from job.local_files import appearing
from job.storage.commit import finish
from job.storage.finished import Pending
from job.storage.locations import open_store
from job.storage.store import Store, UnusableError
from tests.support.bounds import ends_within
from tests.support.running import python
from tests.support.small_runs import FINGERPRINT, manifest, write_tree


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


# --- what others put into the folder -----------------------------------------------------------------------------

USES: dict[str, Callable[[Store, str, Path], object]] = {
    "put": lambda store, name, file: store.put(name, file),
    "put_bytes": lambda store, name, _: store.put_bytes(name, b"x"),
    "create": lambda store, name, _: store.create(name, b"x"),
    "read": lambda store, name, _: store.read(name),
    "checksums": lambda store, name, _: store.checksums(name),
    "download": lambda store, name, file: store.download(name, file.with_name("target")),
    "copy to": lambda store, name, _: store.copy(name, store, "inside"),
    "copy from": lambda store, name, _: store.copy("copy", store, name),
    "delete": lambda store, name, _: store.delete(name),
    "child": lambda store, name, _: store.child(name).delete_all(),
}


@pytest.fixture
def outside(folder: Store, tmp_path: Path) -> Path:
    """A folder beside the store with one file, and a store with one file and links to both."""
    folder.put_bytes("inside", b"inside")
    beside = tmp_path / "outside"
    beside.mkdir()
    (beside / "file").write_bytes(b"outside")
    (tmp_path / "store" / "folder").symlink_to(beside)
    (tmp_path / "store" / "file").symlink_to(beside / "file")
    return beside


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "name", ["../outside/file", "a/../../outside/file", "{outside}/file", "folder/file", "", ".", "a\0b"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused_in_every_use(
    folder: Store, outside: Path, tmp_path: Path, use: str, name: str
) -> None:
    whole = tmp_path / "whole"
    whole.write_bytes(b"x")
    with pytest.raises(UnusableError):
        USES[use](folder, name.format(outside=outside), whole)
    assert [path.read_bytes() for path in outside.iterdir()] == [b"outside"]
    assert not (tmp_path / "target").exists()
    assert set(folder.list()) == {"inside", "file", "folder"}


@pytest.mark.parametrize("use", ["read", "checksums", "download", "copy from"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_plain_file_is_not_opened(folder: Store, outside: Path, tmp_path: Path, use: str, kind: str) -> None:
    path = tmp_path / "store" / "file"
    if kind != "link":
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with ends_within(60), pytest.raises(UnusableError, match=r"'file' in .* is not a plain file"):
        USES[use](folder, "file", outside / "file")


def test_links_and_pipes_are_listed_as_what_they_are_and_removed_without_being_opened(
    folder: Store, outside: Path, tmp_path: Path
) -> None:
    for name in ("pipe", ".part-pipe"):
        os.mkfifo(tmp_path / "store" / name)
    (tmp_path / "store" / ".part-link").symlink_to(outside / "file")
    assert {name: stored.plain for name, stored in folder.list().items()} == {
        "inside": True, "file": False, "folder": False, "pipe": False,
    }  # fmt: skip
    with ends_within(60):
        folder.tidy()
        assert {path.name for path in (tmp_path / "store").iterdir()} == {"inside", "file", "folder", "pipe"}
        folder.delete_all()
    assert not (tmp_path / "store").exists()
    assert [path.read_bytes() for path in outside.iterdir()] == [b"outside"]


def test_what_is_written_takes_the_place_of_a_link_and_not_of_what_it_leads_to(folder: Store, outside: Path) -> None:
    folder.put_bytes("file", b"new")
    assert folder.read("file") == b"new"
    assert (outside / "file").read_bytes() == b"outside"


def test_a_store_may_be_named_by_a_link(outside: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(outside)
    store = open_store(str(tmp_path / "link"), "TRANSFER_OUTPUT_URI")
    store.probe()
    store.child("below").put_bytes("x", b"x")
    assert set(store.list()) == {"file", "below/x"}
    assert (outside / "below" / "x").read_bytes() == b"x"


@pytest.mark.parametrize("which", ["path", "stored", "missing", "link"])
def test_a_commit_that_somebody_made_up_writes_nothing_outside_and_reads_nothing_there(
    folder: Store, outside: Path, tmp_path: Path, which: str
) -> None:
    place, artifacts = Pending(folder, FINGERPRINT).add_files(write_tree(tmp_path / "tree"))
    fields = manifest(artifacts).model_dump(mode="json")
    stored = {artifact.path: f"{place}/{artifact.path}" for artifact in artifacts}
    first = artifacts[0].path
    if which == "path":
        fields["artifacts"][0]["path"] = "../outside/new"
        stored["../outside/new"] = stored[first]
    elif which == "stored":
        stored[first] = "../../outside/file"
    elif which == "missing":
        del stored[first]
    else:
        (tmp_path / "store" / "arms").symlink_to(outside)
    content = json.dumps({"manifest": fields, "stored": stored}).encode()
    folder.put_bytes("checkpoints/commit.json", hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    with suppress(ConfigError):
        assert not finish(folder, FINGERPRINT)
    assert [path.read_bytes() for path in outside.iterdir()] == [b"outside"]
    assert folder.read("manifest.json") is None
    files = [name for name, stored in folder.list().items() if stored.plain]
    assert all(folder.read(name) != b"outside" for name in files)
