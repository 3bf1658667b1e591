"""Photos that lie in several splits are found, as copies and encoded anew, and none are invented."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from job.data.dataset import open_source
from job.data.duplicates import Found, find
from job.data.reading import read_splits
from job.data.rows import Placement, Rows
from job.machine.replicas import Replicas
from job.settings.groups import DataSettings
from tests.support.group import tf_config
from tests.support.photos import write_examples
from tests.support.running import ROOT, python
from tests.support.servers import free_port

SIZE = 48
SPLITS = ("train", "validation", "test")


def jpeg(pixels: npt.NDArray[np.uint8], quality: int = 95) -> bytes:
    return bytes(tf.io.encode_jpeg(pixels, quality=quality).numpy())


def resized(pixels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    return np.asarray(tf.saturate_cast(tf.round(tf.image.resize(pixels, [side, side], antialias=True)), tf.uint8))


def scene(rng: np.random.Generator, side: int = 64) -> npt.NDArray[np.uint8]:
    """Return a photo of large and small things with a little noise, uint8 [side, side, 3]."""
    large, small = (tf.image.resize(rng.normal(0, 1, (n, n, 3)), [side, side], "bicubic").numpy() for n in (6, 24))
    noise = rng.normal(0, 3, (side, side, 3))
    return np.asarray((128 + 40 * large + 15 * small + noise).clip(0, 255), np.uint8)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 60 photos, of which four lie in several splits, and one twice in the same."""
    rng = np.random.default_rng(8)
    photos = [scene(rng) for _ in range(60)]
    photos[30:40] = [np.broadcast_to(each[..., 1:2], each.shape) for each in photos[30:40]]
    splits = {"train": photos[:40], "validation": photos[40:50], "test": photos[50:]}
    encoded = {split: [jpeg(each) for each in some] for split, some in splits.items()}
    encoded["test"] += [encoded["train"][0], jpeg(photos[1], 50), encoded["test"][0]]
    encoded["validation"] += [
        jpeg(resized(photos[1], 96), 90),
        bytes(tf.io.encode_png(resized(photos[50], 48)).numpy()),
    ]
    # grey once more, with one channel
    encoded["validation"] += [jpeg(photos[30][..., :1], 70)]
    labelled = {split: [(each, i % 2) for i, each in enumerate(some)] for split, some in encoded.items()}
    return write_examples(tmp_path_factory.mktemp("tfds"), "planted", labelled)


def read(dataset: Path, folder: Path, replicas: Replicas | None = None) -> dict[str, Rows]:
    settings = DataSettings(dataset=str(dataset), train_split="train", validation_split="validation", test_split="test")
    return read_splits(open_source(settings), SIZE, folder, 0.0, replicas=replicas)


@pytest.fixture(scope="module")
def rows(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    return read(planted, tmp_path_factory.mktemp("rows"))


def named(found: Found) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(each.kind, [(example.split, example.example_id) for example in each.examples]) for each in found.listed]


def test_copies_and_photos_encoded_anew_are_found_with_all_their_examples(rows: dict[str, Rows]) -> None:
    found = find(rows, Replicas())
    encoded = {split: dict(zip(rows[split].ids, rows[split].digests, strict=True)) for split in SPLITS}
    groups = named(found)
    assert found.count == len(groups) == 4
    assert sorted(kind for kind, _ in groups) == ["exact", "near", "near", "near"]
    assert sorted(tuple(split for split, _ in group) for _, group in groups) == [
        ("train", "test"),
        ("train", "validation"),
        ("train", "validation", "test"),
        ("validation", "test", "test"),
    ]
    for kind, group in groups:
        digests = [encoded[split][example] for split, example in group]
        assert (len(set(digests)) == 1) == (kind == "exact")
        brightness = [rows[split].values[:][rows[split].ids.index(example)].mean((0, 1)) for split, example in group]
        np.testing.assert_allclose(brightness, np.broadcast_to(brightness[0], np.shape(brightness)), atol=4)


def test_none_are_invented_among_other_photos(rows: dict[str, Rows]) -> None:
    taken = {example.example_id for each in find(rows, Replicas()).listed for example in each.examples}
    others = {}
    for split, some in rows.items():
        kept = np.array([i for i, example in enumerate(some.ids) if example not in taken])
        others[split] = rows_of(split, some.values[kept], [some.digests[i] for i in kept])
    assert sum(map(len, others.values())) == 66 - 10
    assert find(others, Replicas()) == Found(0, ())


def rows_of(split: str, pixels: npt.NDArray[np.uint8], digests: list[bytes] | None = None) -> Rows:
    ids = tuple(f"{split}__{i}" for i in range(len(pixels)))
    unique = [f"{example:>16}".encode() for example in ids]
    return Rows(ids, np.zeros(len(pixels), np.int32), pixels, tuple(digests or unique))


def test_photos_of_one_scene_with_noise_of_their_own_are_not_the_same() -> None:
    rng = np.random.default_rng(1)
    still = scene(rng, SIZE).astype(float)
    noisy = [(still + rng.normal(0, 15, still.shape)).clip(0, 255).astype(np.uint8) for _ in range(30)]
    parts = {split: rows_of(split, np.stack(noisy[i::3])) for i, split in enumerate(SPLITS)}
    assert find(parts, Replicas()).count == 0


def test_what_lies_within_the_cells_tells_pages_apart() -> None:
    rng = np.random.default_rng(2)
    page = np.kron(rng.integers(60, 200, (12, 12)), np.ones((4, 4), int))
    # writing that leaves the mean of each cell as it is
    signs = np.kron(rng.integers(0, 2, (2, 24, 24)) * 2 - 1, np.array([[1, -1], [-1, 1]]))
    pages = np.stack([page + 40 * signs[0], page + 40 * signs[1]])[..., None].repeat(3, axis=3).astype(np.uint8)
    assert find({"train": rows_of("train", pages[:1]), "test": rows_of("test", pages[1:])}, Replicas()).count == 0
    again = np.stack([tf.io.decode_jpeg(jpeg(pages[0], 90)).numpy()])
    assert find({"train": rows_of("train", pages[:1]), "test": rows_of("test", again)}, Replicas()).count == 1


def test_photos_without_contrast_are_compared_byte_for_byte() -> None:
    blank = np.full((2, SIZE, SIZE, 3), 200, np.uint8)
    blank[1] += np.random.default_rng(3).integers(0, 2, (SIZE, SIZE, 1)).astype(np.uint8)
    train, test = rows_of("train", blank), rows_of("test", blank[::-1])
    assert find({"train": train, "test": test}, Replicas()).count == 0
    (same,) = find(
        {"train": train, "test": replace(test, digests=train.digests[:1] + test.digests[1:])}, Replicas()
    ).listed
    assert (same.kind, [each.example_id for each in same.examples]) == ("exact", ["train__0", "test__0"])


def test_a_set_that_is_all_one_photo_is_one_group() -> None:
    rng = np.random.default_rng(4)
    one = scene(rng, SIZE)
    same = np.stack([one] * 400)
    parts = {
        "train": rows_of("train", same[:300]),
        "validation": rows_of("validation", same[:0]),
        "test": rows_of("test", same[300:]),
    }
    found = find(parts, Replicas())
    assert found.count == 1
    assert len(found.listed[0].examples) == 400


def test_a_thousand_are_listed_and_all_are_counted() -> None:
    pixels = np.zeros((1200, 1, 1, 3), np.uint8)
    train, test = rows_of("train", pixels), rows_of("test", pixels)
    found = find({"train": train, "test": replace(test, digests=train.digests)}, Replicas())
    assert (found.count, len(found.listed)) == (1200, 1000)
    assert [each.examples[0].example_id for each in found.listed] == [f"train__{i}" for i in range(1000)]


def test_the_answer_does_not_depend_on_where_the_rows_lie(rows: dict[str, Rows]) -> None:
    scattered = {}
    for split, some in rows.items():
        order = np.random.default_rng(5).permutation(len(some))
        placement = Placement(np.zeros(len(some), np.int32), np.argsort(order))
        scattered[split] = replace(some, values=some.values[:][order], placement=placement)
    assert find(scattered, Replicas()) == find(rows, Replicas())


WORKER = """
import json, sys
from pathlib import Path
from job.settings import cluster
from job.machine import replicas
from job.data.duplicates import find
from tests.data.test_duplicates import named, read
joined = replicas.connect(cluster.parse(sys.argv[3]), [None])
folder = Path(sys.argv[2])
folder.mkdir()
rows = read(Path(sys.argv[1]), folder, joined)
assert 0 < len(rows["train"].values) < len(rows["train"])
print(json.dumps(named(find(rows, joined))))
"""


@pytest.mark.slow
def test_two_workers_that_hold_a_share_each_find_what_one_finds(
    planted: Path, rows: dict[str, Rows], tmp_path: Path
) -> None:
    ports = [free_port(), free_port()]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, planted, tmp_path / str(index), tf_config(ports, index)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    told = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    expected = json.loads(json.dumps(named(find(rows, Replicas()))))
    assert [json.loads(each.splitlines()[-1]) for each in told] == [expected, expected]


STOPPED = """
import os, signal, time
from job import stopping
stopping.heed()
import numpy as np
from job.machine.replicas import Replicas
from job.data.duplicates import find
from job.errors import Stopped
from job.data.rows import Rows
rows = Rows(("a", "b"), np.zeros(2, np.int32), np.zeros((2, 24, 24, 3), np.uint8), (b"a", b"b"))
with stopping.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    while not stopping._heard:
        time.sleep(0.01)
    try:
        find({"train": rows, "test": rows}, Replicas())
    except Stopped as stop:
        stopping.leave(stop.exit_code)
"""


def test_a_request_to_stop_ends_the_search() -> None:
    python(STOPPED, ends=128 + signal.SIGTERM)
