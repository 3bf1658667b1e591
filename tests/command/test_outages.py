"""The real command against storage that fails: a run that verifies, or exit 74 or 78, soon, and no manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from job.storage.locations import open_store
from job.storage.store import Store
from tests.support.running import Finished, completed, run_job
from tests.support.servers import FAULTS, FaultyProxy, faulty_proxy, gcs_server
from tests.support.unreachable import lost_port, refusing_port, silent_port

QUICK = tuple(fault for fault in FAULTS if fault not in ("stall", "stall_download"))


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The bucket as it is behind the proxy."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
    return open_store("gs://bucket", "TRANSFER_OUTPUT_URI")


def environment(tiny: dict[str, str], proxy: FaultyProxy, place: str) -> dict[str, str]:
    return tiny | {
        "TRANSFER_ARMS": "frozen",
        "TRANSFER_EPOCHS": "1",
        "TRANSFER_OUTPUT_URI": f"gs://bucket/{place}",
        "TRANSFER_RUN_ID": "one",
        "STORAGE_EMULATOR_HOST": proxy.url,
    }


def verify(proxy: FaultyProxy, place: str) -> None:
    proxy.heal()
    completed({"STORAGE_EMULATOR_HOST": proxy.url}, "verify", f"gs://bucket/{place}/one")


# A stall takes as long as the job waits for an answer, half a minute.
@pytest.mark.parametrize(("faults", "share"), [(QUICK, 0.08), pytest.param(FAULTS, 0.15, marks=pytest.mark.slow)])
def test_a_run_gets_through_a_storage_that_fails_in_every_way(
    tiny: dict[str, str], proxy: FaultyProxy, bucket: Store, faults: tuple[str, ...], share: float
) -> None:
    for fault in faults:  # by the luck of the draw one could be missing
        proxy.plan(fault, 1)
    proxy.mix(7, share, QUICK)
    completed(environment(tiny, proxy, "mixture"))
    assert set(proxy.happened) == set(faults)
    assert proxy.happened.total() > len(faults)
    verify(proxy, "mixture")
    assert not [name for name in bucket.list() if "checkpoints" in name or ".probe" in name]


# The job tries for 120 s before it gives up.
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["drop_before", "refuse"])
def test_a_run_whose_storage_dies_exits_74_without_a_manifest_and_completes_when_it_is_back(
    fault: str, tiny: dict[str, str], proxy: FaultyProxy, bucket: Store
) -> None:
    given = environment(tiny, proxy, fault)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(run_job, given)
        # the probe's upload, and the first of a result's
        while sum("/upload/" in request.path for request in proxy.received) < 2 and not run.done():
            time.sleep(0.01)
        proxy.plan(fault)
        finished = run.result()
    assert finished.code == 74, finished.errors
    assert f"gs://bucket/{fault}/one" in finished.text
    assert "within 120 s" in finished.text
    assert proxy.happened[fault] > 10
    assert f"{fault}/one/manifest.json" not in bucket.list()
    proxy.heal()
    completed(given)
    verify(proxy, fault)


# How long TensorFlow's own client waits for gs://, which the job itself bounds by two minutes.
IMPATIENT = {
    "GCS_REQUEST_CONNECTION_TIMEOUT_SECS": "1",
    "GCS_REQUEST_IDLE_TIMEOUT_SECS": "1",
    "GCS_RETRY_CONFIG_INIT_DELAY_TIME_US": "1000",
    "GCS_RETRY_CONFIG_MAX_RETRIES": "1",
}
# By its name in a folder, of which TFDS has code, and by its path.
LOOKED_FOR = {"TRANSFER_DATASET": "cats_vs_dogs", "TRANSFER_DATA_DIR": "gs://bucket/tfds"}
GIVEN = {"TRANSFER_DATASET": "gs://bucket/tfds/pets/1.0.0"}
PORTS: dict[str, Callable[[], AbstractContextManager[int]]] = {
    "refused": refusing_port,
    "silent": silent_port,
    "lost": lost_port,
}


@pytest.fixture
def nobody(tiny: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a small run without credentials: TensorFlow alone asks for gs://."""
    home = tmp_path / "home"
    home.mkdir()
    without = {"HOME": str(home), "GOOGLE_APPLICATION_CREDENTIALS": "", "NO_GCE_CHECK": "true"}
    return tiny | without | {"TRANSFER_ARMS": "scratch", "TRANSFER_OUTPUT_URI": str(tmp_path / "output")}


@pytest.fixture(scope="module")
def pets(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a storage server with a data set."""
    buckets = tmp_path_factory.mktemp("with-data")
    shutil.copytree(photos, buckets / "bucket" / "tfds" / "pets" / "1.0.0")
    with gcs_server(buckets) as url:
        yield url


@pytest.fixture
def front(pets: str) -> Iterator[FaultyProxy]:
    """An unreliable front of that server, for TensorFlow."""
    with faulty_proxy(pets) as proxy:
        yield proxy


def assert_said(finished: Finished, code: int, *said: str) -> None:
    """Check how the job ended, and that its last word is no traceback and holds all of ``said``."""
    assert finished.code == code, finished.errors
    assert "Traceback" not in finished.text
    (message,) = (line["message"] for line in finished.lines if line["severity"] == "ERROR")
    for words in said:
        assert words in message


@pytest.mark.parametrize(
    ("port", "data"),
    [
        ("refused", LOOKED_FOR),
        pytest.param("silent", GIVEN, marks=pytest.mark.slow),
        pytest.param("lost", LOOKED_FOR, marks=pytest.mark.slow),
    ],
)
def test_data_out_of_reach_are_unavailable(port: str, data: dict[str, str], nobody: dict[str, str]) -> None:
    with PORTS[port]() as number:
        finished = run_job(nobody | IMPATIENT | data | {"https_proxy": f"http://127.0.0.1:{number}"})
    assert_said(finished, 74, "gs://bucket/tfds", "could not be read", "try again later")


@pytest.mark.slow
@pytest.mark.parametrize("port", PORTS)
def test_data_out_of_reach_are_given_up_after_two_minutes(port: str, nobody: dict[str, str]) -> None:
    start = time.monotonic()
    with PORTS[port]() as number:
        finished = run_job(nobody | LOOKED_FOR | {"https_proxy": f"http://127.0.0.1:{number}"})
    assert_said(finished, 74, "gs://bucket/tfds")
    assert time.monotonic() - start < 240, "two minutes, and the start of a process on a busy machine"


@pytest.mark.parametrize(
    ("status", "data", "code", "said"),
    [
        (403, LOOKED_FOR, 78, "TRANSFER_DATA_DIR: no permission to read"),
        pytest.param(401, GIVEN, 78, "GOOGLE_APPLICATION_CREDENTIALS", marks=pytest.mark.slow),
        pytest.param(503, GIVEN, 74, "try again later", marks=pytest.mark.slow),
    ],
)
def test_data_that_storage_refuses(
    status: int, data: dict[str, str], code: int, said: str, nobody: dict[str, str], front: FaultyProxy
) -> None:
    front.status = status
    finished = run_job(nobody | IMPATIENT | front.tensorflow | data)
    assert_said(finished, code, "gs://bucket/tfds", f"HTTP {status}", said)


@pytest.mark.parametrize(
    ("fault", "said"),
    [("refuse", "HTTP 503"), pytest.param("stall_download", "could not be read", marks=pytest.mark.slow)],
)
def test_records_out_of_reach_are_unavailable(
    fault: str, said: str, nobody: dict[str, str], front: FaultyProxy
) -> None:
    front.only = "tfrecord"
    front.plan(fault)
    finished = run_job(nobody | IMPATIENT | front.tensorflow | GIVEN)
    assert_said(finished, 74, "train[:60%]", "gs://bucket/tfds/pets/1.0.0", said)
    assert front.happened[fault] > 1


@pytest.mark.parametrize(
    ("status", "asked", "code", "said"),
    [
        pytest.param(403, False, 78, "no permission to read 'train[:60%]' of gs://", marks=pytest.mark.slow),
        pytest.param(404, False, 78, "cannot be read: HTTP 404", marks=pytest.mark.slow),
        # the job's own client is not refused: TensorFlow asked without a token
        (401, True, 74, "try again later"),
    ],
)
def test_records_that_storage_refuses(
    status: int, asked: bool, code: int, said: str, nobody: dict[str, str], front: FaultyProxy
) -> None:
    front.only, front.status = "tfrecord", status
    ours = {"STORAGE_EMULATOR_HOST": front.url} if asked else {}
    finished = run_job(nobody | IMPATIENT | front.tensorflow | GIVEN | ours)
    assert_said(finished, code, said, f"HTTP {status}")


def test_a_key_that_is_none_is_refused_before_tensorflow_reads_it(
    nobody: dict[str, str], front: FaultyProxy, tmp_path: Path
) -> None:
    """Of some JSON it dies."""
    (tmp_path / "key.json").write_text("[]")
    key = {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "key.json")}
    finished = run_job(nobody | IMPATIENT | front.tensorflow | GIVEN | key)
    assert_said(finished, 78, "GOOGLE_APPLICATION_CREDENTIALS: no usable Google credentials")
    assert not front.received
