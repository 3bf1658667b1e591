"""Disks that run full, folders that go away, data that is cut short: a clear exit code, the path, nothing published."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.kills import SAVED_OFTEN, Running, run_folder, started
from tests.support.running import Finished, completed, places, run_job

_MOUNTS = subprocess.run(
    ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"],  # noqa: S607  (util-linux, wherever it is)
    capture_output=True,
    check=False,
)
mounting = pytest.mark.skipif(
    _MOUNTS.returncode != 0, reason=f"this account cannot mount: {_MOUNTS.stderr.decode(errors='replace').strip()}"
)


@pytest.fixture
def frozen(tiny: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of the shortest run that has every stage."""
    return tiny | SAVED_OFTEN | places(tmp_path) | {"TRANSFER_ARMS": "frozen", "TRANSFER_EPOCHS": "3"}


def assert_failed(process: Finished, path: Path, codes: Sequence[int] = (74, 78)) -> None:
    """Check that the job ended with one of ``codes`` and named the path in an error, without a traceback."""
    assert process.code in codes, (process.code, process.errors)
    errors = [line["message"] for line in process.lines if line["severity"] == "ERROR"]
    assert any(str(path) in message for message in errors), (errors, process.errors)
    assert not any("Traceback" in message for message in errors), errors


def assert_completes(environment: dict[str, str]) -> None:
    """Check that the same settings are published, and verify, in a healthy place."""
    completed(environment)
    completed({}, "verify", str(run_folder(Path(environment["TRANSFER_OUTPUT_URI"]))))


def manifests(folder: Path) -> list[Path]:
    return list(folder.rglob("manifest.json"))


def on_a_disk_of(size: str, folder: Path) -> list[str]:
    """Return the command before ``python`` that mounts an empty disk at ``folder``, for that process alone."""
    folder.mkdir(exist_ok=True)
    mount = 'mount -t tmpfs -o size="$0" none "$1" && shift && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, size, str(folder)]


@contextmanager
def standing_still(running: Running, marker: str) -> Iterator[None]:
    """Let a process stand still from a message of its log that ``marker`` matches to the end of the block."""
    assert running.until(marker)
    running.send(signal.SIGSTOP)
    yield
    running.send(signal.SIGCONT)


def fill(running: Running, folder: Path, marker: str) -> Finished:
    """Fill the disk that a process has at ``folder``, once its log has the message; return how it ends."""
    with standing_still(running, marker):
        own_view = Path(f"/proc/{running.pid}/root") / folder.relative_to("/")
        with (own_view / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            file.writelines(itertools.repeat(b"\0" * 65536))
    return running.end()


@mounting
@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "arms"),
    [(r"^run ", "frozen"), (r"^frozen: epoch 1", "frozen"), (r"^scratch: epoch 1", "scratch,frozen")],
    ids=["decoding", "export", "between"],
)
def test_a_cache_folder_that_runs_full_is_named(frozen: dict[str, str], tmp_path: Path, moment: str, arms: str) -> None:
    cache = tmp_path / "cache"
    environment = frozen | {"TRANSFER_ARMS": arms}
    with started(environment, before=on_a_disk_of("256m", cache)) as running:
        process = fill(running, cache, moment)
    assert_failed(process, cache)
    assert not manifests(tmp_path)
    if moment == r"^run ":
        assert_completes(environment)


@mounting
@pytest.mark.slow
def test_a_cache_folder_that_is_too_small_from_the_start_is_refused(frozen: dict[str, str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with started(frozen, before=on_a_disk_of("256k", cache)) as running:
        process = running.end()
    assert_failed(process, cache, [78])
    assert "TRANSFER_CACHE_DIR" in process.text
    assert not manifests(tmp_path)


@mounting
@pytest.mark.slow
@pytest.mark.parametrize("moment", [r"^run ", r"^frozen: exporting"], ids=["early", "late"])
def test_an_output_folder_that_runs_full_is_named(frozen: dict[str, str], tmp_path: Path, moment: str) -> None:
    output = tmp_path / "output"
    with started(frozen, before=on_a_disk_of("256m", output)) as running:
        process = fill(running, output, moment)
    assert_failed(process, output)
    assert not running.until("^published")


@mounting
@pytest.mark.slow
def test_an_output_folder_that_becomes_read_only_is_named(frozen: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "output"
    with started(frozen, before=on_a_disk_of("256m", output)) as running:
        assert running.until(r"^decoded")
        remount = ["nsenter", "--mount", "--target", str(running.pid), "mount", "-o", "remount,ro", str(output)]
        subprocess.run(remount, check=True)
        process = running.end()
    assert_failed(process, output)
    assert_completes(frozen)


@pytest.mark.slow
def test_an_output_folder_that_is_replaced_by_a_file_is_named(frozen: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "output"
    with started(frozen) as running:
        with standing_still(running, r"^frozen: fraction"):
            if output.exists():
                output.rename(tmp_path / "aside")
            output.write_text("in the way")
        process = running.end()
    assert_failed(process, output, [78])
    assert not manifests(tmp_path)
    output.unlink()
    if (tmp_path / "aside").exists():
        (tmp_path / "aside").rename(output)
    assert_completes(frozen)


@pytest.fixture
def copied(photos: Path, tmp_path: Path) -> Path:
    """A copy of the data set, which may be damaged."""
    folder = tmp_path / "pets" / "1.0.0"
    shutil.copytree(photos, folder)
    return folder


@pytest.mark.slow
def test_a_record_file_that_is_cut_short_in_mid_stream_is_named(
    frozen: dict[str, str], copied: Path, tmp_path: Path
) -> None:
    environment = frozen | {"TRANSFER_DATASET": str(copied)}
    shard = max(copied.glob("*.tfrecord-*"))
    whole = shard.read_bytes()
    with started(environment) as running:
        with standing_still(running, r"^run "):
            os.truncate(shard, len(whole) * 2 // 3)
        process = running.end()
    assert_failed(process, copied)
    assert any(path.is_file() for path in tmp_path.rglob("*.npy")) is False, "decoded photos were left"
    assert not manifests(tmp_path)
    shard.write_bytes(whole)
    assert_completes(environment)


@pytest.mark.slow
def test_a_record_file_with_a_flipped_bit_is_named(frozen: dict[str, str], copied: Path, tmp_path: Path) -> None:
    shard = min(copied.glob("*.tfrecord-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)
    process = run_job(frozen | {"TRANSFER_DATASET": str(copied)})
    assert_failed(process, copied)
    assert not manifests(tmp_path)


@pytest.mark.slow
def test_a_record_file_that_has_gone_is_named(frozen: dict[str, str], copied: Path, tmp_path: Path) -> None:
    with started(frozen | {"TRANSFER_DATASET": str(copied)}) as running:
        with standing_still(running, r"^run "):
            max(copied.glob("*.tfrecord-*")).unlink()
        process = running.end()
    assert_failed(process, copied)
    assert not manifests(tmp_path)
