"""A run is published once and whole, or not at all, whoever else publishes it and wherever it is killed."""

from __future__ import annotations

import itertools
import logging
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.errors import ConfigError, UnavailableError
from job.manifest import Manifest, Result
from job.storage.commit import Outcome, begin, commit, existing, finish, read_manifest
from job.storage.finished import Finished, Pending, upload_tree
from job.storage.local import LocalStore
from job.storage.locations import open_store
from job.storage.store import Store, checksums
from job.storage.verification import verify
from tests.support.refusals import refused
from tests.support.small_runs import FILES, FINGERPRINT, manifest, publish, write_tree

OTHER = "cd" * 32
NAMES = {*FILES, "manifest.json"}


def test_a_tree_is_uploaded_whole_under_its_prefix(store: Store, tree: Path) -> None:
    artifacts = upload_tree(store, tree, "some/prefix")
    assert [artifact.path for artifact in artifacts] == sorted(f"some/prefix/{name}" for name in FILES)
    for artifact in artifacts:
        measured = checksums(tree / artifact.path.removeprefix("some/prefix/"))
        assert (artifact.bytes, artifact.sha256, artifact.crc32c) == measured == store.checksums(artifact.path)


def test_a_tree_that_is_not_there_is_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError):
        upload_tree(store, tmp_path / "absent")


def assert_sound(store: Store, record: Manifest) -> None:
    """Check that the run is published with this manifest, verifies, and is all that lies there."""
    assert read_manifest(store) == record
    assert verify(store.uri) == []
    assert set(store.list()) == NAMES


def test_a_published_run_is_sound_and_nothing_else_is_left(store: Store, tree: Path) -> None:
    assert not existing(store, FINGERPRINT)
    assert read_manifest(store) is None
    assert verify(store.uri) == [f"{store.uri} has no manifest.json: the run is not complete"]
    outcome, record = publish(store, tree)
    assert outcome is Outcome.PUBLISHED
    assert existing(store, FINGERPRINT)
    assert_sound(store, record)


def test_the_same_run_is_published_once(store: Store, tree: Path, tmp_path: Path) -> None:
    _, first = publish(store, tree)
    outcome, _ = publish(store, write_tree(tmp_path / "again", b"!"), created=datetime(2025, 1, 3, tzinfo=UTC))
    assert outcome is Outcome.ALREADY_PUBLISHED
    assert_sound(store, first)


def test_ten_that_publish_different_files_at_once_leave_one_sound_run(store: Store, tmp_path: Path) -> None:
    def one(number: int) -> tuple[Outcome, Any]:
        tree = write_tree(tmp_path / f"tree{number}", b"%d" % number)
        return publish(store, tree, created=datetime(2025, 1, 1 + number, tzinfo=UTC))

    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(one, range(10)))
    published = read_manifest(store)
    assert published in [record for _, record in found]
    # the one whose commit was decided for may have found it carried out by another
    assert [record for outcome, record in found if outcome is Outcome.PUBLISHED] in ([], [published])
    assert verify(store.uri) == []
    assert set(store.list()) == NAMES


def spending(change: str) -> Callable[..., Any]:
    """Return a method of Dying that makes this change while there are some left."""

    def method(self: Dying, *arguments: Any) -> Any:
        Dying.left -= 1
        if Dying.left < 0:
            raise SystemExit("gone")
        return getattr(LocalStore, change)(self, *arguments)

    return method


class Dying(LocalStore):
    """A folder whose user is gone after some changes to it."""

    left = 10**6
    copy, create, put_bytes, delete_all = map(spending, ("copy", "create", "put_bytes", "delete_all"))

    def child(self, prefix: str) -> LocalStore:
        return Dying(self._folder / prefix, self.variable)


def test_wherever_publishing_ends_the_next_try_completes_it(tmp_path: Path) -> None:
    interrupted = 0
    for changes in range(20):
        folder = tmp_path / str(changes)
        store = open_store(str(folder), "TRANSFER_OUTPUT_URI")
        tree = write_tree(tmp_path / f"tree{changes}")
        Dying.left = changes
        try:
            publish(Dying(folder, "TRANSFER_OUTPUT_URI"), tree)
        except SystemExit:
            interrupted += 1
        decided = store.read("checkpoints/commit.json")
        there = store.read("manifest.json") is not None
        assert not there or verify(str(folder)) == []
        completed = finish(store, FINGERPRINT)
        assert completed == (decided is not None)
        if not completed and not there:
            publish(store, write_tree(tmp_path / f"later{changes}", b"later"))
        assert existing(store, FINGERPRINT)
        assert verify(str(folder)) == []
        assert set(store.list()) == NAMES
    # the commit, every artifact, the manifest, and the end
    assert interrupted == 1 + len(FILES) + 1 + 1


class Interrupted(LocalStore):
    """A folder in which something happens before one of the calls: another process works, or ours is gone."""

    def __init__(self, folder: Path, before: dict[int, Callable[[], None]] | None = None) -> None:
        super().__init__(folder, "TRANSFER_OUTPUT_URI")
        self.before = {} if before is None else before
        self.calls = itertools.count()

    def child(self, prefix: str) -> Interrupted:
        below = Interrupted(self._folder / prefix, self.before)
        below.calls = self.calls
        return below


def counted(call: str) -> Callable[..., Any]:
    def method(self: Interrupted, *arguments: Any) -> Any:
        if happens := self.before.pop(next(self.calls), None):
            happens()
        return getattr(LocalStore, call)(self, *arguments)

    return method


for _call in ("put", "put_bytes", "create", "read", "copy", "list", "delete", "delete_all"):
    setattr(Interrupted, _call, counted(_call))


def gone() -> None:
    raise SystemExit("gone")


def started(store: Store, tree: Path, fingerprint: str, trained: set[str] | None = None) -> str:
    """Do what a process that starts does: complete a commit, verify, or train and publish; return how it ended."""
    try:
        if not begin(store, fingerprint):
            if trained is not None:
                trained.add(fingerprint)
            publish(store, tree, fingerprint=fingerprint)
    except ConfigError:
        return "refused"
    return "published"


def leave_a_commit(folder: Path, tree: Path, fingerprint: str) -> None:
    """Leave what a process left behind that was killed right after it had decided."""
    elsewhere = folder.with_name(f"{folder.name}-left")
    Dying.left = 2  # the fingerprint and the commit; files are stored by put, which is not counted
    with pytest.raises(SystemExit):
        started(Dying(elsewhere, "TRANSFER_OUTPUT_URI"), tree, fingerprint)
    left = LocalStore(elsewhere, "TRANSFER_OUTPUT_URI")
    assert left.read("checkpoints/commit.json") is not None
    shutil.copytree(elsewhere, folder, dirs_exist_ok=True)


BEGINNINGS = {
    "nothing": (),
    "begun": ("begun",),
    "published": ("published",),
    "published, and a commit left behind": ("published", "committed"),
    "published, and another's commit left behind": ("published", "committed by another"),
}


def prepare(beginning: str, folder: Path, one: Path, other: Path) -> Path:
    """Make a folder in which so much has happened; return it."""
    store = LocalStore(folder, "TRANSFER_OUTPUT_URI")
    for happened in BEGINNINGS[beginning]:
        match happened:
            case "begun":
                assert not begin(store, FINGERPRINT)
            case "published":
                assert started(store, one, FINGERPRINT) == "published"
            case "committed":
                leave_a_commit(folder, one, FINGERPRINT)
            case _:
                leave_a_commit(folder, other, OTHER)
    return folder


@pytest.mark.parametrize("second", [FINGERPRINT, OTHER], ids=["the same", "another"])
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_whatever_two_processes_do_between_each_others_steps_one_sound_run_is_published_and_stays(
    tmp_path: Path, beginning: str, second: str, killed: bool, step: int
) -> None:
    """Every step of one process against every step of another, which is killed before one of its own or not.

    The other does its work before a step of the first, from its beginning or up to its end; then both start again, as a
    scheduler has them, the one that was published first once more.
    """
    one, other = write_tree(tmp_path / "one", b"one"), write_tree(tmp_path / "other", b"other")

    whole = Interrupted(prepare(beginning, tmp_path / "count", one, other))
    assert started(whole, one, FINGERPRINT) == "published"
    number, pairs = next(whole.calls), 0
    for at in range(0, number, step):
        for dies in range(1, number, step) if killed else (sys.maxsize,):
            folder = prepare(beginning, tmp_path / f"run-{at}-{dies}", one, other)
            trained: set[str] = set()

            def interrupt(folder: Path = folder, dies: int = dies, trained: set[str] = trained) -> None:
                with suppress(SystemExit):
                    started(Interrupted(folder, {dies: gone}), other, second, trained)

            started(Interrupted(folder, {at: interrupt}), one, FINGERPRINT, trained)
            plain = LocalStore(folder, "TRANSFER_OUTPUT_URI")
            first = read_manifest(plain)
            before = plain.read("manifest.json")
            again = {started(plain, other, second, trained), started(plain, one, FINGERPRINT, trained)}
            assert "published" in again
            assert again == {"published"} or second == OTHER
            assert verify(str(folder)) == []
            if first is not None:
                assert plain.read("manifest.json") == before
            assert set(plain.list()) == NAMES or second == OTHER or "another" in beginning
            # two experiments under one id: the second learns it before it trains
            assert len(trained) <= 1
            pairs += 1
    assert pairs >= number // step
    print(f"{beginning}, {second[:2]}, killed {killed}: {pairs} pairs of steps")  # noqa: T201 - shown by -s


def test_a_commit_whose_files_are_gone_is_replaced(store: Store, tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    pending = store.child("checkpoints")
    place, artifacts = Pending(store, FINGERPRINT).add_files(tree)
    store.put_bytes("arms/frozen/fraction-1.0/seed-0/saved_model/fingerprint.pb", b"of the one before")
    kept = Dying(tree.parent / "died", "TRANSFER_OUTPUT_URI")
    Dying.left = 1
    with pytest.raises(SystemExit):
        commit(kept, manifest(artifacts), [(place, artifacts)])
    pending.put_bytes("commit.json", kept.read("checkpoints/commit.json") or b"")
    pending.child(place).delete("report.html")
    assert not finish(store, FINGERPRINT)
    with caplog.at_level(logging.WARNING):
        outcome, record = publish(store, tree, created=datetime(2025, 1, 5, tzinfo=UTC))
    assert outcome is Outcome.PUBLISHED
    assert "names files that are gone" in caplog.text
    assert_sound(store, record)


def test_another_experiment_under_this_id_is_a_wrong_setting(store: Store, tree: Path) -> None:
    publish(store, tree)
    for attempt in (lambda: publish(store, tree, fingerprint=OTHER), lambda: existing(store, OTHER)):
        with refused("TRANSFER_RUN_ID", "another experiment"):
            attempt()
    assert existing(store, FINGERPRINT)


def test_another_experiment_that_is_being_published_is_a_wrong_setting(store: Store, tree: Path) -> None:
    died = Dying(tree.parent / "died", "TRANSFER_OUTPUT_URI")
    Dying.left = 1
    with pytest.raises(SystemExit):
        publish(died, tree)
    store.put_bytes("checkpoints/commit.json", died.read("checkpoints/commit.json") or b"")
    for attempt in (lambda: publish(store, tree, fingerprint=OTHER), lambda: finish(store, OTHER)):
        with refused("TRANSFER_RUN_ID", "is being published"):
            attempt()
    assert store.read("manifest.json") is None


def test_something_else_under_the_manifests_name_is_a_wrong_setting(store: Store, tree: Path) -> None:
    store.put_bytes("manifest.json", b"[]")
    for attempt in (lambda: publish(store, tree), lambda: existing(store, FINGERPRINT)):
        with refused("TRANSFER_RUN_ID", "no manifest"):
            attempt()
    assert store.read("manifest.json") == b"[]"


def test_a_published_run_that_is_damaged_is_not_taken_for_done(store: Store, tree: Path) -> None:
    publish(store, tree)
    store.delete("report.html")
    for attempt in (lambda: publish(store, tree), lambda: existing(store, FINGERPRINT)):
        with refused("TRANSFER_RUN_ID", "damaged: report.html is missing"):
            attempt()


@pytest.mark.parametrize("content", [b"<html>?</html>", b"other", None])
def test_nothing_is_published_of_files_that_changed(store: Store, tree: Path, content: bytes | None) -> None:
    pending = Pending(store, FINGERPRINT)
    place, artifacts = pending.add_files(tree)
    store.child(f"checkpoints/{place}").delete("report.html")
    if content is not None:
        store.put_bytes(f"checkpoints/{place}/report.html", content)
    with pytest.raises(UnavailableError):
        commit(store, manifest(artifacts), [(place, artifacts)])
    assert store.read("manifest.json") is None


def result() -> Result:
    return manifest([]).results[0]


def finished(store: Store, tree: Path) -> Finished:
    return Pending(store, FINGERPRINT).add("frozen", tree, result(), np.array([True, False, True]))


def test_a_finished_result_is_found_with_all_it_said(store: Store, tree: Path) -> None:
    added = finished(store, tree)
    found = Pending(store, FINGERPRINT).find("frozen")
    assert found == added
    assert found.result == result()
    assert found.hits.tolist() == [True, False, True]
    assert {artifact.path for artifact in found.artifacts} == set(FILES)
    assert Pending(store, FINGERPRINT).find("scratch") is None
    assert Pending(store, OTHER).find("frozen") is None


@pytest.mark.parametrize("damage", ["changed", "missing", "record", "figure in the record"])
def test_a_finished_result_that_is_damaged_is_not_used(
    damage: str, store: Store, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = store.child(f"checkpoints/{finished(store, tree).place}")
    (record,) = [name for name in store.list() if name.endswith("-frozen.json")]
    match damage:
        case "changed":
            place.put_bytes("report.html", b"<html>?</html>")
        case "missing":
            place.delete("report.html")
        case "record":
            store.put_bytes(record, (store.read(record) or b"")[:-9])
        case _:
            sound = store.read(record) or b""
            store.put_bytes(record, sound.replace(b'"accuracy":0.9', b'"accuracy":0.8', 1))
            assert store.read(record) != sound
    with caplog.at_level(logging.WARNING):
        assert Pending(store, FINGERPRINT).find("frozen") is None
    assert "trained again" in caplog.text
