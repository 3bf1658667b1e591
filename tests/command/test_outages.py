"""The real command against a storage server that fails: a run that verifies, or exit 74 and no manifest."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from job.storage.locations import open_store
from job.storage.store import Store
from tests.support.running import completed, run_job
from tests.support.servers import FAULTS, FaultyProxy

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
