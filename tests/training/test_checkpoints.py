"""What is saved is found again, whole and of this run, or not used at all."""

from __future__ import annotations

import hashlib
import io
import logging
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.manifest import Epoch
from job.storage.locations import open_store
from job.storage.store import Store
from job.training.checkpoints import Checkpoint, Checkpoints, Progress
from tests.support.running import python

FINGERPRINT = "ab" * 32
RESULT = "scratch-fraction-1-seed-0"
EPOCH = Epoch(
    epoch=1, phase="all", train_loss=1.1, train_accuracy=0.4, validation_loss=1.2, validation_accuracy=0.5, seconds=3.0
)


def checkpoint(step: int) -> Checkpoint:
    arrays = {"variable0000": np.full((3, 4), step, np.float32), "optimizer0000": np.array(step, np.int64)}
    return Checkpoint(Progress(step=step, phase_step=step, history=(EPOCH,), images=16 * step, seconds=0.1), arrays)


def open_at(store: Store, tmp_path: Path, fingerprint: str = FINGERPRINT, seconds: float = 1e-9) -> Checkpoints:
    return Checkpoints(store, fingerprint, seconds, tmp_path)


def save(store: Store, tmp_path: Path, *steps: int, fingerprint: str = FINGERPRINT) -> list[str]:
    """Save checkpoints at ``steps`` and return the names that are there then, the oldest first."""
    checkpoints = open_at(store, tmp_path, fingerprint)
    with checkpoints.open():
        for step in steps:
            checkpoints.save(RESULT, checkpoint(step))
            while not checkpoints.due():
                pass
    return sorted(store.list())


def newest(store: Store, tmp_path: Path) -> Checkpoint | None:
    return open_at(store, tmp_path).newest(RESULT, 1)


def newest_step(store: Store, tmp_path: Path) -> int | None:
    found = newest(store, tmp_path)
    return found and found.progress.step


def test_what_is_saved_is_found_again(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 7)
    found = newest(store, tmp_path)
    assert found is not None
    assert found.progress == Progress(step=7, phase_step=7, history=(EPOCH,), images=112, seconds=0.1, resumed=1)
    assert found.arrays.keys() == {"variable0000", "optimizer0000"}
    for name, values in checkpoint(7).arrays.items():
        np.testing.assert_array_equal(found.arrays[name], values)
        assert found.arrays[name].dtype == values.dtype
    assert open_at(store, tmp_path).newest("scratch-fraction-1-seed-01", 1) is None


def test_the_last_two_are_kept_and_nothing_else(store: Store, tmp_path: Path) -> None:
    names = save(store, tmp_path, 9, 10, 100)
    assert ["000000010" in names[0], "000000100" in names[1], len(names)] == [True, True, 2]
    assert newest_step(store, tmp_path) == 100
    assert not (tmp_path / "checkpoint").exists()


def test_a_result_that_is_finished_leaves_no_checkpoint(store: Store, tmp_path: Path) -> None:
    save(store, tmp_path, 1, 2)
    store.put_bytes("frozen-fraction-1-seed-0-step-000000001-0123456789abcdef.ckpt", b"another result's")
    open_at(store, tmp_path).forget(RESULT)
    assert [name.split("-step")[0] for name in store.list()] == ["frozen-fraction-1-seed-0"]


def flip(data: bytes) -> bytes:
    at = 7 * len(data) // 11
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[: len(data) // 2],
    "bit flipped": flip,
    "first bit flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "last bit flipped": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    "longer": lambda data: data + b"\0",
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_the_newest_is_damaged_the_one_before_is_used(
    damage: str, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(store, tmp_path, 1, 2)
    store.put_bytes(newer, DAMAGES[damage](store.read(newer) or b""))
    with caplog.at_level(logging.WARNING):
        assert newest_step(store, tmp_path) == 1
    assert f"checkpoint {newer} is not used: it is damaged" in caplog.text
    store.put_bytes(older, DAMAGES[damage](store.read(older) or b""))
    assert newest(store, tmp_path) is None


def test_one_of_another_run_is_refused_with_the_reason(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, tmp_path, 5, fingerprint="cd" * 32)
    with caplog.at_level(logging.WARNING):
        assert newest(store, tmp_path) is None
    assert "belongs to another run or other settings (fingerprint cdcdcdcdcdcd instead of abababababab)" in caplog.text
    assert len(store.list()) == 1


def test_junk_under_a_sound_name_is_no_checkpoint(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    junk = b"junk"
    store.put_bytes(f"{RESULT}-step-000000001-{hashlib.sha256(junk).hexdigest()[:16]}.ckpt", junk)
    with caplog.at_level(logging.WARNING):
        assert newest(store, tmp_path) is None
    assert "it is no checkpoint" in caplog.text


def npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


def record_of(text: str) -> bytes:
    return npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({len(text)},), }}", text.encode())


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as whole:
        for name, content in members.items():
            whole.writestr(name, content)
    return file.getvalue()


class Runs:
    """What would be loaded as an array of objects, and by that run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path("ran"),)


def objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Runs()], object), allow_pickle=True)
    return file.getvalue()


def repeated(members: dict[str, bytes]) -> bytes:
    """Return an archive whose last member is listed a thousand times."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as whole:
        for name, content in members.items():
            whole.writestr(name, content)
        whole.filelist += [whole.filelist[-1]] * 1000
    return file.getvalue()


PROGRESS = '"history": [], "images": 0, "seconds": 1.0, "epoch_seconds": 0.0, "resumed": 0, "phase": 0, "phase_step": 0'
RECORD = f'{{"version": 1, "fingerprint": "{FINGERPRINT}", "progress": {{"step": 1, {PROGRESS}}}}}'
SOUND = record_of(RECORD)
SHAPE = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }"
HUGE = SHAPE % (27 * 2**28)

CRAFTED: dict[str, Callable[[], bytes]] = {
    "27 GiB in a header": lambda: zipped({"record.npy": SOUND, "variable0000.npy": npy(HUGE, bytes(4500))}),
    "64 MiB compressed": lambda: zipped(
        {"record.npy": SOUND, "x.npy": npy(SHAPE % 2**24, bytes(2**26))}, zipfile.ZIP_DEFLATED
    ),
    "the same 64 KiB a thousand times": lambda: repeated(
        {"record.npy": SOUND, "x.npy": npy(SHAPE % 2**14, bytes(2**16))}
    ),
    "a size below zero": lambda: zipped({"record.npy": SOUND, "x.npy": npy(SHAPE % -1, bytes(4))}),
    "objects": lambda: zipped({"record.npy": SOUND, "x.npy": objects()}),
    "a header that nests": lambda: zipped({"record.npy": SOUND, "x.npy": npy("(" * 5000)}),
    "another method": lambda: zipped({"record.npy": SOUND}).replace(b"\x14\0\0\0\0\0", b"\x14\0\0\0\x63\0"),
    "encrypted": lambda: zipped({"record.npy": SOUND}).replace(b"\x14\0\0\0\0\0", b"\x14\0\x01\0\0\0"),
    "a record that is no array": lambda: zipped({"record": RECORD.encode()}),
    "a record that nests": lambda: zipped({"record.npy": record_of("[" * 100_000)}),
    "a step below zero": lambda: zipped({"record.npy": record_of(RECORD.replace('"step": 1', '"step": -1'))}),
    "a phase below zero": lambda: zipped({"record.npy": record_of(RECORD.replace('"phase": 0', '"phase": -1'))}),
    "seconds without end": lambda: zipped({"record.npy": record_of(RECORD.replace("1.0", "Infinity"))}),
    "one array": lambda: SOUND,
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_what_is_made_to_look_like_a_checkpoint_takes_no_memory_and_runs_nothing(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store(str(tmp_path / "store"), "TRANSFER_CHECKPOINT_URI")
    whole = zipped({"record.npy": SOUND, "variable0000.npy": npy(SHAPE % 2, bytes(8))})
    for number, content in ((1, whole), (2, CRAFTED[kind]())):
        store.put_bytes(f"{RESULT}-step-{number:09d}-{hashlib.sha256(content).hexdigest()[:16]}.ckpt", content)
    tracemalloc.start()
    try:
        with caplog.at_level(logging.WARNING):
            found = newest(store, tmp_path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found is not None
    assert found.arrays.keys() == {"variable0000"}
    assert "it is no checkpoint" in caplog.text
    assert most < 8 << 20
    assert not Path("ran").exists()


def test_training_goes_on_where_no_checkpoint_can_be_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = open_store(str(tmp_path / "file" / "below"), "TRANSFER_CHECKPOINT_URI")
    checkpoints = open_at(store, tmp_path)
    with caplog.at_level(logging.WARNING), checkpoints.open():
        checkpoints.save(RESULT, checkpoint(1))
    assert "no checkpoint at step 1" in caplog.text
    assert "training goes on" in caplog.text


def test_a_checkpoint_is_due_after_the_seconds_of_work_that_may_be_lost(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"), "TRANSFER_CHECKPOINT_URI")
    assert not open_at(store, tmp_path, seconds=3600).due()
    assert open_at(store, tmp_path, seconds=1e-9).due()
    checkpoints = open_at(store, tmp_path, seconds=3600)
    with checkpoints.open():
        checkpoints.hold(RESULT, checkpoint(1))
    assert store.list() == {}


def test_what_is_held_is_saved_when_the_process_is_asked_to_stop_even_in_native_code(tmp_path: Path) -> None:
    script = f"""
        import ctypes, os, pathlib, signal, threading, time
        from job import stopping
        stopping.heed()
        from job.training.checkpoints import Checkpoints
        from job.storage.locations import open_store
        from tests.training.test_checkpoints import checkpoint
        store = open_store({str(tmp_path / "store")!r}, "TRANSFER_CHECKPOINT_URI")
        checkpoints = Checkpoints(store, {FINGERPRINT!r}, 3600, pathlib.Path({str(tmp_path)!r}))

        def ask():
            os.kill(os.getpid(), signal.SIGTERM)
            while not store.list():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        with stopping.deferred(), checkpoints.open():
            checkpoints.hold({RESULT!r}, checkpoint(3))
            threading.Thread(target=ask).start()
            while True:
                ctypes.CDLL(None).sleep(600)
    """
    python(script, ends=143)
    assert newest_step(open_store(str(tmp_path / "store"), "TRANSFER_CHECKPOINT_URI"), tmp_path) == 3


def test_a_request_while_what_is_held_is_saved_does_not_lose_it(tmp_path: Path) -> None:
    # as where another worker's request has ended the steps, and this one's own comes then
    script = f"""
        import os, pathlib, signal, time
        from job import stopping
        stopping.heed()
        from job.storage.local import LocalStore
        from job.training.checkpoints import Checkpoints
        from tests.training.test_checkpoints import checkpoint

        class Slow(LocalStore):
            def put(self, name, source):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)
                return super().put(name, source)

        store = Slow(pathlib.Path({str(tmp_path / "store")!r}), "TRANSFER_CHECKPOINT_URI")
        checkpoints = Checkpoints(store, {FINGERPRINT!r}, 3600, pathlib.Path({str(tmp_path)!r}))
        with checkpoints.open():
            checkpoints.hold({RESULT!r}, checkpoint(3))
            stopping.stop()
    """
    python(script, ends=1)
    assert newest_step(open_store(str(tmp_path / "store"), "TRANSFER_CHECKPOINT_URI"), tmp_path) == 3
