"""A small real experiment for all tests: generated photos, a weights file of the smallest usual backbone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.storage.locations import open_store
from job.storage.store import Store
from tests.support import kills
from tests.support.running import CLASSES, Published, published_by
from tests.support.servers import FaultyProxy, faulty_proxy, gcs_server


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared TFDS directory: 120 photos of three classes, one of them undecodable."""
    from tests.support.photos import write_dataset

    return write_dataset(tmp_path_factory.mktemp("tfds"), "pets", {"train": 120}, CLASSES, size=40, bad=(50,))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file for MobileNet without top, in Keras's own format.

    Its values are random, but its BatchNorm statistics are those of photos: with the initial ones the activations
    of so deep a network shrink to nothing, and every photo gets the same answer.
    """
    import keras
    import numpy as np

    from job.arms import Part
    from job.backbone_table import BACKBONES
    from job.data.rows import Rows
    from job.models.backbones import build, preprocessing
    from job.models.classifier import Classifier, Head
    from job.models.recalibration import Recalibrator
    from tests.support.photos import photo

    keras.utils.set_random_seed(7)
    row = BACKBONES["MobileNet"]
    model = Classifier(build(row, 32), preprocessing(row), Head(2), 0)
    generator = np.random.default_rng(7)
    pixels = np.stack([photo(generator, index % 3, 3, 32) for index in range(64)])
    rows = Rows(("",) * 64, np.zeros(64, np.int32), pixels, (b"",) * 64)
    Recalibrator(model, model.cut(Part.ALL)).recalibrate(rows, np.arange(64), 64)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.weights.h5"
    model.backbone.save_weights(path)
    return path


@pytest.fixture(scope="session")
def small(photos: Path, weights: Path) -> dict[str, str]:
    """The environment of the smallest comparison that has everything; TRANSFER_OUTPUT_URI is the test's to add."""
    return {
        "TRANSFER_DATASET": str(photos),
        "TRANSFER_TRAIN_SPLIT": "train[:60%]",
        "TRANSFER_VALIDATION_SPLIT": "train[60%:80%]",
        "TRANSFER_TEST_SPLIT": "train[80%:]",
        "TRANSFER_BACKBONE": "MobileNet",
        "TRANSFER_IMAGE_SIZE": "32",
        "TRANSFER_WEIGHTS": str(weights),
        "TRANSFER_EPOCHS": "2",
        "TRANSFER_BATCH_SIZE": "16",
        "TRANSFER_FINE_TUNE_FROM": "conv_pw_12",
        "TRANSFER_DETERMINISTIC": "true",
        "TRANSFER_MAX_BAD_IMAGES": "0.05",
    }


@pytest.fixture(scope="session")
def tiny(small: dict[str, str]) -> dict[str, str]:
    """The same of two of MobileNet's blocks, for what does not turn on the network: a third of the time to compile."""
    return small | {"TRANSFER_TRUNCATE_AT": "conv_pw_2_relu", "TRANSFER_FINE_TUNE_FROM": "conv_pw_2"}


@pytest.fixture(scope="session")
def published(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The small comparison, run once by the real command and published to a local folder."""
    return published_by(small | {"TRANSFER_COST_PER_HOUR": "3.6"}, tmp_path_factory.mktemp("output"))


@pytest.fixture(scope="module")
def undisturbed(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> kills.Undisturbed:
    """The tiny comparison, checkpointed often, as it ends where nothing disturbs it."""
    return kills.undisturbed(tiny, tmp_path_factory)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a storage server with one bucket, ``bucket``."""
    data = tmp_path_factory.mktemp("buckets")
    (data / "bucket").mkdir()
    with gcs_server(data) as url:
        yield url


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A prefix of the test's own in the bucket, as the server is shared."""
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """An unreliable front of the storage server, which gs:// leads to."""
    with faulty_proxy(server) as front:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", front.url)
        yield front


@pytest.fixture
def dtype_policy(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keras's dtype policy of the name that the test is parametrised with, and after it the one before."""
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield
    keras.config.set_dtype_policy(before)


@pytest.fixture(params=["local", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty place for a run, in a folder and in a bucket."""
    if request.param == "local":
        return open_store(str(tmp_path / "store" / "run"), "TRANSFER_OUTPUT_URI")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("server"))
    return open_store(f"gs://bucket/{request.getfixturevalue('prefix')}/run", "TRANSFER_OUTPUT_URI", 30)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with the files of a small run."""
    from tests.support.small_runs import write_tree

    return write_tree(tmp_path / "tree")
