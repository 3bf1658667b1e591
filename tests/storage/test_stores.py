"""One contract over a local folder and over gs://, and what happens when storage misbehaves."""

from __future__ import annotations

import base64
import hashlib
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import google_crc32c
import pytest

from job.errors import ConfigError, UnavailableError
from job.storage.locations import fetch, open_store
from job.storage.store import Store, Stored, checksums
from job.uris import without_secrets
from tests.support.refusals import refused
from tests.support.servers import FaultyProxy

VARIABLE = "TRANSFER_OUTPUT_URI"
SHORT = 2.0
LONG = 30.0


def crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


@pytest.fixture
def gs(proxy: FaultyProxy, prefix: str) -> Store:
    assert proxy.url
    return open_store(f"gs://bucket/{prefix}", VARIABLE, LONG)


@pytest.fixture(params=["local", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "gs":
        return request.getfixturevalue("gs")
    return open_store(str(tmp_path / "store"), VARIABLE)


def test_what_is_put_is_read_listed_and_deleted(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source.json"
    source.write_bytes(b"{}")
    expected = Stored("a/b.json", 2, crc32c(b"{}"))
    assert store.put("a/b.json", source) == expected
    assert store.put_bytes("c", b"") == Stored("c", 0, crc32c(b""))
    assert store.read("a/b.json") == b"{}"
    assert store.read("c") == b""
    assert {name: stored.bytes for name, stored in store.list().items()} == {"a/b.json": 2, "c": 0}
    assert all(stored.crc32c in (None, crc32c(store.read(name) or b"")) for name, stored in store.list().items())
    store.delete("c")
    store.delete("c")
    assert list(store.list()) == ["a/b.json"]
    assert not store.is_empty()
    assert store.child("b").is_empty()


def test_what_is_not_there_is_none_in_reading_and_an_error_in_copying(store: Store, tmp_path: Path) -> None:
    store.put_bytes("file", b"x")
    for name in ("absent", "folder/absent", "file/below"):
        assert store.read(name) is None
        store.delete(name)
        with pytest.raises(FileNotFoundError):
            store.download(name, tmp_path / "target")
        with pytest.raises(FileNotFoundError):
            store.checksums(name)
    assert not (tmp_path / "target").exists()
    assert store.child("nothing").list() == {}


def test_put_replaces_and_names_may_hold_spaces_and_umlauts(store: Store) -> None:
    store.put_bytes("größe 100%/ä?#.txt", b"first")
    store.put_bytes("größe 100%/ä?#.txt", b"second")
    assert store.read("größe 100%/ä?#.txt") == b"second"
    assert list(store.list()) == ["größe 100%/ä?#.txt"]


def test_a_child_is_the_same_place_under_a_longer_name(store: Store) -> None:
    child = store.child("runs").child("one")
    child.put_bytes("x", b"x")
    assert store.read("runs/one/x") == b"x"
    assert list(child.list()) == ["x"]
    assert child.uri == f"{store.uri}/runs/one"
    store.put_bytes("runs/one-more/y", b"y")
    assert list(child.list()) == ["x"]


def test_checksums_and_downloads_give_the_whole_content(store: Store, tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000  # over 8 MiB: the client sends it in an upload session
    source = tmp_path / "source"
    source.write_bytes(data)
    measured = (len(data), hashlib.sha256(data).hexdigest(), crc32c(data))
    assert checksums(source) == measured
    assert store.put("big", source) == Stored("big", len(data), measured[2])
    assert store.checksums("big") == measured
    store.download("big", tmp_path / "new" / "target")
    assert (tmp_path / "new" / "target").read_bytes() == data


def test_create_keeps_what_is_there_and_knows_its_own(store: Store) -> None:
    assert store.create("manifest.json", b"ours")
    assert store.create("manifest.json", b"ours")
    assert not store.create("manifest.json", b"theirs")
    assert store.read("manifest.json") == b"ours"


def test_of_ten_that_create_at_once_one_wins(store: Store) -> None:
    contents = [f"run {number}".encode() for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        won = list(pool.map(lambda data: store.create("manifest.json", data), contents))
    assert sum(won) == 1
    assert store.read("manifest.json") == contents[won.index(True)]
    assert list(store.list()) == ["manifest.json"]


def test_the_probe_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    store.child("deep/er").probe()
    assert store.list() == {}
    assert not (tmp_path / "store").exists()


def test_the_probe_keeps_folders_that_were_there(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    open_store(str(tmp_path / "there" / "new" / "newer"), VARIABLE).probe()
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_probes_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(open_store(str(tmp_path / "a" / "b"), VARIABLE).probe) for _ in range(40)]:
            each.result()
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/absent"])
def test_a_folder_that_cannot_be_written_is_a_wrong_setting(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    store = open_store(str(tmp_path / place), VARIABLE)
    with refused(VARIABLE, "could not create"):
        store.probe()
    with refused(VARIABLE, "could not write"):
        store.put_bytes("x", b"x")
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


@contextmanager
def small_files() -> Iterator[None]:
    """Let this process write no file beyond a KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_is_worth_a_retry(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), VARIABLE)
    with small_files(), pytest.raises(UnavailableError, match=f"could not write {tmp_path}/x: File too large"):
        store.put_bytes("x", b"x" * 4096)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_download_is_named(gs: Store, tmp_path: Path) -> None:
    gs.put_bytes("x", b"x" * (1 << 20))
    said = rf"{gs.uri}/x into {tmp_path}/x: could not read .*File too large"
    with small_files(), pytest.raises(UnavailableError, match=said):
        gs.download("x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_half_written_has_no_name(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), VARIABLE)
    (tmp_path / ".part-killed").write_bytes(b"half")
    assert store.list() == {}


def test_a_missing_bucket_is_a_wrong_setting(proxy: FaultyProxy) -> None:
    store = open_store("gs://no-such-bucket/runs", VARIABLE, LONG)
    for attempt in (store.probe, store.list, lambda: store.put_bytes("x", b"x"), lambda: store.create("x", b"x")):
        with refused(VARIABLE, "no bucket no-such-bucket"):
            attempt()
    assert not proxy.happened


def test_no_permission_is_a_wrong_setting(gs: Store, proxy: FaultyProxy) -> None:
    proxy.status = 403
    for attempt in (gs.probe, gs.list, lambda: gs.read("x"), lambda: gs.put_bytes("x", b"x"), lambda: gs.delete("x")):
        with pytest.raises(ConfigError, match=r"no permission .* \(HTTP 403\).* on bucket bucket") as caught:
            attempt()
        assert caught.value.problems[0].variable == VARIABLE


def test_credentials_that_are_not_accepted_are_named(gs: Store, proxy: FaultyProxy) -> None:
    proxy.status = 401
    with refused("GOOGLE_APPLICATION_CREDENTIALS", "no usable Google credentials"):
        gs.probe()


def test_three_refusals_are_waited_out(gs: Store, proxy: FaultyProxy) -> None:
    proxy.plan("refuse", 3)
    gs.put_bytes("x", b"content")
    proxy.plan("refuse", 3)
    assert gs.read("x") == b"content"
    assert proxy.happened == {"refuse": 6}


def test_refusals_without_end_are_reported_as_unavailable(proxy: FaultyProxy, prefix: str, tmp_path: Path) -> None:
    store = open_store(f"gs://bucket/{prefix}", VARIABLE, SHORT)
    proxy.plan("refuse")
    for attempt in (
        store.probe,
        store.list,
        lambda: store.read("x"),
        lambda: store.put_bytes("x", b"x"),
        lambda: store.download("x", tmp_path / "x"),
    ):
        before = proxy.happened["refuse"]
        with pytest.raises(UnavailableError, match=rf"gs://bucket/{prefix}.*within 2 s \(HTTP 503\)"):
            attempt()
        assert proxy.happened["refuse"] > before + 1
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_gone_is_unavailable(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"within 2 s \(ConnectionError\)"):
        open_store(f"gs://bucket/{prefix}", VARIABLE, SHORT).read("x")


def test_an_emulator_address_without_scheme_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "localhost:4443")
    with pytest.raises(ConfigError, match="STORAGE_EMULATOR_HOST"):
        open_store("gs://bucket/x", VARIABLE, SHORT).read("x")


@pytest.mark.parametrize("fault", ["drop", "cut_answer"])
def test_a_create_whose_answer_was_lost_is_still_ours(gs: Store, proxy: FaultyProxy, fault: str) -> None:
    proxy.plan(fault, 1)
    assert gs.create("manifest.json", b"ours")
    assert proxy.happened == {fault: 1}
    assert not gs.create("manifest.json", b"theirs")
    assert gs.read("manifest.json") == b"ours"


@pytest.mark.parametrize("fault", ["drop", "cut_answer"])
@pytest.mark.parametrize("size", [10, 9 << 20])
def test_an_upload_whose_answer_was_lost_is_whole(
    gs: Store, proxy: FaultyProxy, fault: str, size: int, tmp_path: Path
) -> None:
    data = b"x" * size
    (tmp_path / "source").write_bytes(data)
    proxy.plan(fault, 1)
    gs.put("x", tmp_path / "source")
    assert proxy.happened == {fault: 1}
    assert gs.checksums("x") == checksums(tmp_path / "source")


def test_a_download_cut_in_the_middle_is_taken_up_again(gs: Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    gs.put_bytes("x", data)
    proxy.plan("cut_download", 1)
    gs.download("x", tmp_path / "x")
    assert proxy.happened == {"cut_download": 1}
    assert (tmp_path / "x").read_bytes() == data


def test_no_error_text_holds_an_upload_session(proxy: FaultyProxy, prefix: str, tmp_path: Path) -> None:
    store = open_store(f"gs://bucket/{prefix}", VARIABLE, SHORT)
    (tmp_path / "source").write_bytes(b"x" * (9 << 20))
    proxy.plan("drop")
    with pytest.raises(UnavailableError) as caught:
        store.put("x", tmp_path / "source")
    assert "upload" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("uri", ["", " ", "gs://", "gs:///runs", "gs://B/x", "s3://bucket/x", "https://me:key@host/x"])
def test_a_malformed_uri_is_a_wrong_setting(uri: str) -> None:
    with refused(VARIABLE) as caught:
        open_store(uri, VARIABLE)
    assert "key" not in str(caught.value)


def test_missing_credentials_say_which_variable_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    with refused("GOOGLE_APPLICATION_CREDENTIALS", "service account"):
        open_store("gs://bucket/x", VARIABLE, SHORT)


def test_public_uris_hold_no_secret() -> None:
    assert without_secrets("https://me:key@host:1/a/b?signature=s#f") == "https://host:1/a/b"
    assert without_secrets("gs://bucket/a?token=t") == "gs://bucket/a"
    assert without_secrets("output/a?b") == "output/a?b"


def test_fetch_downloads_objects_and_returns_files_as_they_are(gs: Store, prefix: str, tmp_path: Path) -> None:
    gs.put_bytes("weights/a.h5", b"weights")
    fetched = fetch(f"gs://bucket/{prefix}/weights/a.h5", tmp_path, "TRANSFER_WEIGHTS", LONG)
    assert fetched == tmp_path / "a.h5"
    assert fetched.read_bytes() == b"weights"
    assert fetch(str(fetched), tmp_path / "elsewhere", "TRANSFER_WEIGHTS") == fetched


@pytest.mark.parametrize("uri", ["absent.h5", "gs://bucket/absent.h5", "gs://no-such-bucket/a.h5", "gs://bucket"])
def test_fetching_what_is_not_there_is_a_wrong_setting(uri: str, gs: Store, tmp_path: Path) -> None:
    assert gs.list() == {}
    with refused("TRANSFER_WEIGHTS"):
        fetch(uri if "://" in uri else str(tmp_path / uri), tmp_path, "TRANSFER_WEIGHTS", LONG)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_is_the_same_object_under_another_name(store: Store) -> None:
    original = store.child("from").put_bytes("größe/a.json", b"{}")
    copied = store.child("to").copy("b.json", store.child("from"), "größe/a.json")
    assert copied == Stored("b.json", 2, original.crc32c)
    store.child("from").put_bytes("c", b"other")
    store.child("to").copy("b.json", store.child("from"), "c")
    assert store.child("to").read("b.json") == b"other"
    assert set(store.list()) == {"from/größe/a.json", "from/c", "to/b.json"}


@pytest.mark.parametrize("local_first", [True, False])
def test_copies_cross_from_one_kind_of_store_to_the_other(gs: Store, local_first: bool, tmp_path: Path) -> None:
    local = open_store(str(tmp_path / "store"), VARIABLE)
    source, target = (local, gs) if local_first else (gs, local)
    source.put_bytes("a", b"content")
    assert target.copy("b", source, "a") == Stored("b", 7, crc32c(b"content"))
    assert target.read("b") == b"content"


def test_a_copy_between_two_clients_is_made_by_the_server(gs: Store, prefix: str) -> None:
    gs.put_bytes("a", b"content")
    other = open_store(f"gs://bucket/{prefix}/other", VARIABLE, LONG)
    other.copy("b", gs, "a")
    assert other.read("b") == b"content"


def test_copying_what_is_not_there_is_an_error(store: Store) -> None:
    store.put_bytes("there", b"before")
    with pytest.raises(FileNotFoundError):
        store.copy("there", store, "absent")
    assert store.read("there") == b"before"


def test_copying_to_a_missing_bucket_is_a_wrong_setting(gs: Store) -> None:
    gs.put_bytes("a", b"content")
    with pytest.raises(ConfigError, match="no bucket no-such-bucket"):
        open_store("gs://no-such-bucket/x", "TRANSFER_CHECKPOINT_URI", LONG).copy("a", gs, "a")


def test_deleting_all_takes_this_place_and_no_other(store: Store, tmp_path: Path) -> None:
    for name in ("one/a", "one/b/c", "one/b/d/e", "one-more/a"):
        store.put_bytes(name, b"x")
    store.child("one").delete_all()
    store.child("one").delete_all()
    store.child("one-more/a").delete_all()
    assert list(store.list()) == ["one-more/a"]
    assert not (tmp_path / "store" / "one").exists()


def test_deleting_all_takes_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".part-killed").write_bytes(b"half")
    open_store(str(tmp_path / "store"), VARIABLE).delete_all()
    assert list(tmp_path.iterdir()) == []


def test_several_may_delete_all_at_once(store: Store, tmp_path: Path) -> None:
    for number in range(60):
        store.put_bytes(f"{number % 7}/{number}", b"x")
    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(store.delete_all) for _ in range(4)]:
            each.result()
    assert store.list() == {}
    assert not (tmp_path / "store").exists()
