"""Every operation on gs:// against every fault that it can meet: survived, or reported as unavailable in time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.errors import UnavailableError
from job.storage.locations import open_store
from job.storage.store import Store, checksums
from tests.support.servers import FAULTS, LOST_SESSIONS, REFUSALS, FaultyProxy

VARIABLE = "TRANSFER_OUTPUT_URI"
SHORT = 1.0
STALLED = 6.0  # a request waits for half of it
LONG = 8.0
CONTENT = bytes(range(256)) * 16
MIB = 1 << 20

Operation = Callable[[Store, Path], object]
# What each does and gives, with CONTENT stored under "there" beforehand.
OPERATIONS: dict[str, tuple[Operation, Callable[[Store], object]]] = {
    "put": (lambda store, folder: store.put("new", folder / "source").bytes, lambda _: len(CONTENT)),
    "put_bytes": (lambda store, _: store.put_bytes("new", CONTENT).bytes, lambda _: len(CONTENT)),
    "create": (lambda store, _: (store.create("new", CONTENT), store.create("new", b"other")), lambda _: (True, False)),
    "read": (lambda store, _: store.read("there"), lambda _: CONTENT),
    "checksums": (lambda store, _: store.checksums("there")[1], lambda _: hashlib.sha256(CONTENT).hexdigest()),
    "download": (lambda store, folder: downloaded(store, folder), lambda _: CONTENT),
    "list": (lambda store, _: sorted(store.list()), lambda _: ["there"]),
    "copy": (lambda store, _: store.copy("new", store, "there").bytes, lambda _: len(CONTENT)),
    "delete": (lambda store, _: store.delete("there"), lambda _: None),
    "delete_all": (lambda store, _: store.delete_all(), lambda _: None),
}
UPLOADS = ("put", "put_bytes", "create")
DOWNLOADS = ("read", "checksums", "download")
CHANGES = (*UPLOADS, "copy", "delete", "delete_all")
MEET = {
    **dict.fromkeys((*REFUSALS, "drop_before", "stall"), tuple(OPERATIONS)),
    "spoil_upload": UPLOADS,
    "refuse_damaged": UPLOADS,
    "drop": CHANGES,
    "cut_answer": (*UPLOADS, "list", "copy", "delete_all"),
    **dict.fromkeys(("cut_download", "short_download", "stall_download", "spoil_download"), DOWNLOADS),
}
# The repetition finds the work done, and meets no fault any more.
SETTLED = {("drop", "create"), ("cut_answer", "create"), ("drop", "delete"), ("drop", "delete_all")}
SLOW = ("stall", "stall_download")


def downloaded(store: Store, folder: Path) -> bytes:
    store.download("there", folder / "target")
    return (folder / "target").read_bytes()


@pytest.fixture
def place(prefix: str) -> str:
    return f"gs://bucket/{prefix}"


def filled(uri: str, folder: Path, limit: float) -> Store:
    store = open_store(uri, VARIABLE, limit)
    store.put_bytes("there", CONTENT)
    folder.mkdir(exist_ok=True)
    (folder / "source").write_bytes(CONTENT)
    return store


def test_every_fault_is_met_by_an_operation() -> None:
    assert set(MEET) == set(FAULTS)


@pytest.mark.parametrize(
    ("fault", "name"), [(fault, name) for fault, names in MEET.items() if fault not in SLOW for name in names]
)
def test_an_operation_survives_a_fault_that_passes(
    fault: str, name: str, proxy: FaultyProxy, place: str, tmp_path: Path
) -> None:
    store = filled(place, tmp_path, LONG)
    operation, expected = OPERATIONS[name]
    times = 1 if (fault, name) in SETTLED else 2
    proxy.plan(fault, times)
    assert operation(store, tmp_path) == expected(store)
    assert proxy.happened == {fault: times}
    proxy.heal()
    if name in CHANGES:
        left = {"delete": [], "delete_all": []}.get(name, ["new", "there"])
        assert sorted(store.list()) == left
        assert all(store.read(each) == CONTENT for each in left)


@pytest.mark.parametrize("fault", SLOW)
def test_operations_survive_a_server_that_falls_silent(
    fault: str, proxy: FaultyProxy, place: str, tmp_path: Path
) -> None:
    stores = {name: filled(f"{place}/{name}", tmp_path / name, STALLED) for name in MEET[fault]}
    proxy.plan(fault, len(stores))
    with ThreadPoolExecutor(len(stores)) as pool:
        given = {name: pool.submit(OPERATIONS[name][0], store, tmp_path / name) for name, store in stores.items()}
    assert {name: each.result() for name, each in given.items()} == {
        name: OPERATIONS[name][1](store) for name, store in stores.items()
    }
    assert proxy.happened == {fault: len(stores)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_without_end_is_reported_as_unavailable(
    fault: str, proxy: FaultyProxy, place: str, tmp_path: Path
) -> None:
    names = [name for name in MEET[fault] if (fault, name) not in SETTLED]
    stores = {name: filled(f"{place}/{name}", tmp_path / name, SHORT) for name in names}
    proxy.plan(fault)

    def attempt(name: str) -> str:
        with pytest.raises(UnavailableError) as caught:
            OPERATIONS[name][0](stores[name], tmp_path / name)
        return str(caught.value)

    with ThreadPoolExecutor(len(stores)) as pool:
        said = list(pool.map(attempt, stores))
    assert all(f"{place}/{name}" in each and "within 1 s" in each for name, each in zip(stores, said, strict=True))
    assert proxy.happened[fault] > len(stores)
    assert not list(tmp_path.rglob("target"))


def test_what_arrived_damaged_is_not_left_there(proxy: FaultyProxy, place: str) -> None:
    store = open_store(place, VARIABLE, SHORT)
    proxy.plan("spoil_upload")
    with pytest.raises(UnavailableError, match=r"could not write within 1 s \(it arrived damaged\)"):
        store.put_bytes("x", CONTENT)
    assert store.list() == {}


def put_large(size: int, place: str, folder: Path, proxy: FaultyProxy, fault: str, after: int = 0) -> None:
    """Store so many MiB under a fault that happens once; check that it did, and what is there in the end."""
    (folder / "large").write_bytes(CONTENT * (size * MIB // len(CONTENT)))
    store = open_store(place, VARIABLE, LONG)
    proxy.plan(fault, 1, after)
    store.put("large", folder / "large")
    assert proxy.happened == {fault: 1}
    assert store.checksums("large") == checksums(folder / "large")


@pytest.mark.parametrize("fault", ["refuse", "drop_before"])
def test_a_large_upload_goes_on_where_it_was_interrupted(
    fault: str, proxy: FaultyProxy, place: str, tmp_path: Path
) -> None:
    put_large(36, place, tmp_path, proxy, fault, after=2)  # of a session's beginning and its first chunk
    sent = [request.range for request in proxy.received if request.method == "PUT"]
    first, second, third = (f"bytes {a * MIB}-{b * MIB - 1}/{36 * MIB}" for a, b in ((0, 16), (16, 32), (32, 36)))
    assert sent == [first, second, second, third]


@pytest.mark.parametrize("fault", ["spoil_upload", "refuse_damaged"])
def test_a_large_upload_that_arrives_damaged_is_sent_again(
    fault: str, proxy: FaultyProxy, place: str, tmp_path: Path
) -> None:
    put_large(9, place, tmp_path, proxy, fault)


@pytest.mark.parametrize("fault", LOST_SESSIONS)
def test_a_large_upload_whose_session_is_lost_begins_a_new_one(
    fault: str, proxy: FaultyProxy, place: str, tmp_path: Path
) -> None:
    put_large(20, place, tmp_path, proxy, fault, after=1)  # of the first chunk
    sent = [(request.method, request.range) for request in proxy.received if "/upload/" in request.path]
    first, second = (("PUT", f"bytes {a * MIB}-{b * MIB - 1}/{20 * MIB}") for a, b in ((0, 16), (16, 20)))
    assert sent == [("POST", ""), first, second] * 2


@pytest.mark.parametrize("fault", LOST_SESSIONS)
def test_a_session_lost_again_and_again_is_reported_as_unavailable(
    fault: str, proxy: FaultyProxy, place: str, tmp_path: Path
) -> None:
    (tmp_path / "large").write_bytes(bytes(9 * MIB))
    store = open_store(place, VARIABLE, SHORT)
    proxy.plan(fault)
    with pytest.raises(UnavailableError, match=rf"could not write within 1 s \(HTTP {LOST_SESSIONS[fault]}\)"):
        store.put("large", tmp_path / "large")
    assert 3 < proxy.happened[fault] < 100
    assert store.list() == {}


@pytest.mark.slow
def test_a_session_that_is_lost_after_the_limit_is_followed_by_another(
    proxy: FaultyProxy, place: str, tmp_path: Path
) -> None:
    proxy.delay = LONG / 3  # a request may take half of it
    put_large(36, place, tmp_path, proxy, "end_session", after=2)  # of three chunks


def test_a_new_session_too_creates_only_what_is_not_there(proxy: FaultyProxy, place: str) -> None:
    store, data = open_store(place, VARIABLE, LONG), bytes(9 * MIB)
    proxy.plan("end_session", 1)
    assert store.create("large", data)
    begun = [request.path for request in proxy.received if request.method == "POST"]
    assert len(begun) == 2
    assert all("ifGenerationMatch=0" in path for path in begun)  # the server itself does not look at it in sessions


def test_many_threads_get_through_a_mixture_of_faults(proxy: FaultyProxy, place: str) -> None:
    store = open_store(place, VARIABLE, 4 * LONG)
    faults = tuple(fault for fault in FAULTS if fault not in SLOW)
    for fault in faults:  # by the luck of the draw one could be missing
        proxy.plan(fault, 1)
    proxy.mix(7, 0.3, faults)
    contents = {f"{number}": hashlib.sha256(bytes([number])).digest() * 1000 for number in range(60)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put_bytes(name, contents[name]), contents))
        assert dict(zip(contents, pool.map(store.read, contents), strict=True)) == contents
    assert set(store.list()) == set(contents)
    store.delete_all()
    assert store.list() == {}
    assert set(proxy.happened) == set(faults)
    assert proxy.happened.total() > 2 * len(faults)
