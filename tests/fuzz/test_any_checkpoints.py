"""Whatever lies where a checkpoint should be is gone on from or passed over; nothing in it runs, memory has a bound."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.manifest import Epoch
from job.storage.locations import open_store
from job.training.checkpoints import Checkpoint, Checkpoints, Progress
from tests.fuzz.inputs import changed, damaged, texts, values, written
from tests.support.bounds import ends_within

FINGERPRINT = "ab" * 32
RESULT = "scratch-fraction-1-seed-0"
OLD, NEW = 3, 7
PHASES = 2
MEMORY = 16 << 20


def checkpoint(step: int) -> Checkpoint:
    loss = {
        "train_loss": 1.1,
        "train_accuracy": 0.4,
        "validation_loss": 1.2,
        "validation_accuracy": 0.5,
        "seconds": 3.0,
    }
    history = (Epoch(epoch=1, phase="all", **loss),)
    arrays = {"variable0000": np.full((3, 4), step, np.float32), "optimizer0000": np.array(step, np.int64)}
    return Checkpoint(Progress(step=step, phase_step=step, history=history, images=16 * step, seconds=0.1), arrays)


@dataclass(frozen=True)
class Place:
    """A run's place for unfinished work, with a sound checkpoint in it, and the bytes of a newer one."""

    folder: Path
    scratch: Path
    older: str
    newer: str
    content: bytes

    def open(self) -> Checkpoints:
        return Checkpoints(open_store(str(self.folder), "URI"), FINGERPRINT, 60, self.scratch)

    def found(self, content: bytes, *, renamed: bool) -> Checkpoint:
        """Lay down another content for the newer one, under the name that is right for it or as it was."""
        name = self.newer
        if renamed:
            name = f"{RESULT}-step-{NEW:09d}-{hashlib.sha256(content).hexdigest()[:16]}.ckpt"
        path = self.folder / name
        path.write_bytes(content)
        tracemalloc.start()
        try:
            with ends_within(120):
                found = self.open().newest(RESULT, PHASES)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            path.unlink()
        assert most < MEMORY
        assert found is not None
        assert not list(self.scratch.iterdir())
        return found


@pytest.fixture(scope="module")
def place(base: Path) -> Iterator[Place]:
    (base / "scratch").mkdir()
    saved = Checkpoints(open_store(str(base / "run"), "URI"), FINGERPRINT, 60, base / "scratch")
    with saved.open():
        for step in (OLD, NEW):
            saved.save(RESULT, checkpoint(step))
    older, newer = sorted(path.name for path in (base / "run").iterdir())
    content = (base / "run" / newer).read_bytes()
    (base / "run" / newer).unlink()
    logging.getLogger("job").setLevel(logging.CRITICAL)
    yield Place(base / "run", base / "scratch", older, newer, content)
    logging.getLogger("job").setLevel(logging.NOTSET)


def assert_sound(found: Checkpoint) -> None:
    progress = found.progress
    counts = (progress.step, progress.phase, progress.phase_step, progress.images, progress.seconds, progress.resumed)
    assert all(0 <= each < float("inf") for each in counts)
    assert progress.phase <= PHASES
    assert all(isinstance(each, Epoch) for each in progress.history)
    assert all(isinstance(each, np.ndarray) and each.dtype.kind in "biuf" for each in found.arrays.values())


@given(data=st.data())
def test_any_damage(place: Place, data: st.DataObject) -> None:
    content = data.draw(damaged(place.content))
    found = place.found(content, renamed=False)
    assert found.progress.step == (NEW if content == place.content else OLD)


@given(data=st.data())
def test_any_bytes_under_a_name_that_is_right_for_them(place: Place, data: st.DataObject) -> None:
    assert_sound(place.found(data.draw(st.one_of(damaged(place.content), st.binary(max_size=200))), renamed=True))


# --- files that are put together ---------------------------------------------------------------------------------


class Runs:
    """What NumPy would load as an array of objects, and by that run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path("ran"),)


def array(header: bytes, content: bytes, magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    return magic + len(header).to_bytes(2, "little") + header + content


sizes = st.sampled_from((0, 1, 2, 3, -1, -4, 12, 10**6, 27 << 30, 2**31, 2**63, 2**64, 10**30))
shapes = st.one_of(st.lists(sizes, max_size=3).map(tuple), st.just((1,) * 70), values)
KINDS = "<f4 <i8 |b1 |u1 >f8 <f2 |O <U0 <U9 |S9 |V2 <M8[s] <c16 f4,O x"
kinds = st.one_of(
    st.sampled_from(KINDS.split()),
    st.sampled_from(([("a", "<f4")], [("a", "|O")], [("a", "<f4", (2**40,))], [("a", "<f4")] * 2)),
    values,
)
SOUND = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }"
odd_headers = st.sampled_from(
    (
        *(
            "(" * 5000,
            "[" * 90 + "]" * 90,
            "1" * 5000,
            "-" * 9000,
            "x" * 20_000,
            "\0" * 50,
            "{",
            '"""',
            "\\",
            "lambda: 0",
        ),
        *("{'descr': '<f4'}", "__import__('os').mkdir('ran')", SOUND.replace("3", "3L"), SOUND.replace("False", "0")),
        *(SOUND, SOUND.replace("3", "9" * 5000), SOUND.replace("f4", "O"), SOUND * 2),
    )
)
told = st.fixed_dictionaries({"descr": kinds, "fortran_order": st.one_of(st.booleans(), values), "shape": shapes})
headers = st.one_of(told.map(repr), odd_headers).map(lambda text: text.encode("latin-1", "replace") + b"\n")
magics = st.sampled_from(
    (b"\x93NUMPY\x01\x00",) * 5 + (b"\x93NUMPY\x02\x00", b"\x93NUMPY\x03\x00", b"\x93NUMPY\x09\x09", b"NUMPY")
)
contents = st.one_of(st.binary(max_size=48), st.just(pickle.dumps(Runs())), st.just(bytes(48)))
arrays = st.one_of(st.builds(array, headers, contents, magics), contents)
names = st.one_of(texts.map(lambda name: name.encode("utf-8", "replace").decode()), st.just("variable0000.npy"))


def saved_array(value: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


@given(
    members=st.dictionaries(names, arrays, max_size=3),
    method=st.sampled_from((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
    evil=st.booleans(),
    again=st.sampled_from((1, 1, 1, 2, 40)),
)
def test_any_arrays(place: Place, members: dict[str, bytes], method: int, evil: bool, again: int) -> None:
    with zipfile.ZipFile(io.BytesIO(place.content)) as sound:
        record = sound.read("record.npy")
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as whole:
        warnings.simplefilter("ignore")  # of names that are there twice
        whole.writestr("record.npy", record)
        if evil:
            whole.writestr("evil.npy", saved_array(np.array([Runs()], object)))
        for name, content in members.items():
            whole.writestr(zipfile.ZipInfo(name), content, method)
        if again > 1:  # the same bytes as many members: what is read grows, and the file does not
            last = whole.filelist[-1]
            whole.filelist += [last] * again
    assert_sound(place.found(file.getvalue(), renamed=True))
    assert not Path("ran").exists()


@given(data=st.data())
def test_any_record(place: Place, data: st.DataObject) -> None:
    with zipfile.ZipFile(io.BytesIO(place.content)) as sound:
        members = {name: sound.read(name) for name in sound.namelist()}
    record = np.load(io.BytesIO(members["record.npy"])).tobytes()
    other = data.draw(st.one_of(changed(json.loads(record)).map(written), damaged(record)))
    members["record.npy"] = saved_array(np.frombuffer(other, np.uint8))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as whole:
        for name, content in members.items():
            whole.writestr(name, content)
    assert_sound(place.found(file.getvalue(), renamed=True))
