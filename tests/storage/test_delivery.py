"""The best model lies where the platform wants it: whole, alone, whoever else writes there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.errors import UnavailableError
from job.manifest import Manifest
from job.storage.delivery import deliver
from job.storage.local import LocalStore
from job.storage.store import Store, Stored
from tests.support.small_runs import FILES, MODEL, publish, write_tree

MODEL_FILES = {name.removeprefix(f"{MODEL}/"): content for name, content in FILES.items() if name.startswith(MODEL)}


def content_of(store: Store) -> dict[str, bytes]:
    return {name: store.read(name) or b"" for name in store.list()}


def published(folder: Path, extra: bytes = b"") -> tuple[Store, Manifest]:
    store = LocalStore(folder / "run", "TRANSFER_OUTPUT_URI")
    return store, publish(store, write_tree(folder / "tree", extra))[1]


def test_the_best_model_lies_where_the_platform_wants_it(store: Store, tree: Path, tmp_path: Path) -> None:
    _, record = publish(store, tree)
    models = LocalStore(tmp_path / "models", "AIP_MODEL_DIR")
    deliver(store, record, models)
    assert content_of(models) == MODEL_FILES


def test_a_model_that_lies_there_is_not_copied_again(tmp_path: Path) -> None:
    run, record = published(tmp_path)
    models = LocalStore(tmp_path / "models", "AIP_MODEL_DIR")
    deliver(run, record, models)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*") if path.is_file()}
    deliver(run, record, models)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_damaged_or_missing_file_is_replaced(tmp_path: Path) -> None:
    run, record = published(tmp_path)
    models = LocalStore(tmp_path / "models", "AIP_MODEL_DIR")
    deliver(run, record, models)
    models.put_bytes("saved_model.pb", b"grapf")
    models.delete("variables/variables.index")
    deliver(run, record, models)
    assert content_of(models) == MODEL_FILES


def test_parts_of_another_model_are_removed_and_other_files_left_alone(tmp_path: Path) -> None:
    run, record = published(tmp_path)
    models = LocalStore(tmp_path / "models", "AIP_MODEL_DIR")
    models.put_bytes("saved_model.pb", b"of another run")
    models.put_bytes("variables/variables.data-00001-of-00002", b"of another run")
    models.put_bytes("notes.txt", b"the user's")
    deliver(run, record, models)
    assert content_of(models) == MODEL_FILES | {"notes.txt": b"the user's"}


class Disturbed(LocalStore):
    """A folder in which another run puts its model before one of the calls."""

    def __init__(self, folder: Path, happens: Callable[[], None], before: int) -> None:
        super().__init__(folder, "AIP_MODEL_DIR")
        self.happens, self.before, self.calls = happens, before, itertools.count()

    def _count(self) -> None:
        if next(self.calls) == self.before:
            self.happens()

    def copy(self, name: str, source: Store, source_name: str) -> Stored:
        self._count()
        return super().copy(name, source, source_name)

    def list(self) -> dict[str, Stored]:
        self._count()
        return super().list()


def test_two_runs_never_leave_a_mixture_wherever_one_comes_between_the_other(tmp_path: Path) -> None:
    one, other = published(tmp_path / "one", b"1"), published(tmp_path / "other", b"2")
    whole = [{name: content + extra for name, content in MODEL_FILES.items()} for extra in (b"1", b"2")]
    # two lists and a copy of each file, and two lists after them
    for before in range(4 + len(MODEL_FILES)):
        folder = tmp_path / f"models-{before}"

        def disturb(folder: Path = folder) -> None:
            deliver(*other, LocalStore(folder, "AIP_MODEL_DIR"))

        target = Disturbed(folder, disturb, before)
        deliver(*one, target)
        assert next(target.calls) > before
        assert content_of(target) in whole


def test_many_runs_at_once_leave_one_model(tmp_path: Path) -> None:
    runs = [published(tmp_path / str(number), b"%d" % number) for number in range(4)]
    models = LocalStore(tmp_path / "models", "AIP_MODEL_DIR")
    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(lambda run: deliver(*run, models), runs))
    left = content_of(models)
    assert left in [{name: content + b"%d" % number for name, content in MODEL_FILES.items()} for number in range(4)]


class Forgetful(LocalStore):
    """A folder that loses what is copied to it."""

    def copy(self, name: str, source: Store, source_name: str) -> Stored:
        stored = super().copy(name, source, source_name)
        self.delete(name)
        return stored


def test_a_place_that_never_holds_the_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    with pytest.raises(UnavailableError, match="AIP_MODEL_DIR"):
        deliver(*published(tmp_path), Forgetful(tmp_path / "models", "AIP_MODEL_DIR"))
