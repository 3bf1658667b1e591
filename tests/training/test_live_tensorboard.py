"""What TensorBoard is shown while a run trains."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job import manifest
from job.settings.environment import load
from job.storage.locations import open_store
from job.storage.store import Store
from job.training.live_tensorboard import Board, hparams

WHERE = "arms/frozen/fraction-1/seed-0"
SETTINGS = load({"TRANSFER_HEAD_UNITS": "64,32"}).resolved()


def epochs(count: int) -> tuple[manifest.Epoch, ...]:
    return tuple(
        manifest.Epoch(
            epoch=i, phase="head", train_loss=1 / i, train_accuracy=0.5, validation_loss=1 / i,
            validation_accuracy=0.5, seconds=1.0,
        )
        for i in range(1, count + 1)
    )  # fmt: skip


def losses(folder: Path) -> list[float]:
    shown = EventAccumulator(str(folder / "frozen" / "fraction-1" / "seed-0")).Reload()
    return [float(event.tensor_proto.float_val[0]) for event in shown.Tensors("loss/train")]


@pytest.mark.parametrize(("seconds_between", "shown"), [(3600, [1.0]), (0, [1.0, 0.5])])
def test_epochs_are_shown_while_it_trains_but_not_each_of_a_head(
    tmp_path: Path, seconds_between: float, shown: list[float]
) -> None:
    store = open_store(str(tmp_path / "logs"), "AIP_TENSORBOARD_LOG_DIR")
    board = Board(store, SETTINGS, tmp_path, seconds_between)
    with board.open():
        told = board.result(WHERE, "frozen", 1.0, 0)
        told(epochs(1))
        told(epochs(2))
    assert losses(tmp_path / "logs") == shown


def test_a_bucket_gets_the_same(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    store = open_store("gs://bucket/logs", "AIP_TENSORBOARD_LOG_DIR", 10)
    board = Board(store, SETTINGS, tmp_path)
    with board.open():
        board.result(WHERE, "frozen", 1.0, 0)(epochs(3))
    (name,) = store.list()
    fetched = tmp_path / "fetched" / name
    fetched.parent.mkdir(parents=True)
    fetched.write_bytes(store.read(name) or b"")
    assert losses(tmp_path / "fetched") == [1.0, 0.5, pytest.approx(1 / 3)]


def test_a_place_that_cannot_be_written_costs_a_warning_and_nothing_else(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.put_bytes("frozen", b"a file where a folder belongs")
    board = Board(store, SETTINGS, tmp_path)
    with caplog.at_level(logging.WARNING), board.open():
        board.result(WHERE, "frozen", 1.0, 0)(epochs(1))
    if store.uri.startswith("gs://"):  # where names are no folders
        assert not caplog.records
    else:
        assert "TensorBoard is not shown" in caplog.text


def test_without_a_place_nothing_is_written(tmp_path: Path) -> None:
    board = Board(None, SETTINGS, tmp_path)
    with board.open():
        board.result(WHERE, "frozen", 1.0, 0)(epochs(1))
    assert not list(tmp_path.rglob("*tfevents*"))


def test_the_table_has_the_settings_that_decide_a_result_as_plain_values() -> None:
    found = hparams(SETTINGS, "fine_tune", 0.1, 3)
    assert found["arm"] == "fine_tune"
    assert (found["train_fraction"], found["seed"], found["head_units"]) == (0.1, 3, "64,32")
    assert "truncate_at" not in found
