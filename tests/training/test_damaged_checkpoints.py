"""A checkpoint that cannot be used is recognised, named in the log, and survived: the result is always the same."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.kills import (
    Moment,
    Undisturbed,
    assert_only_the_run_is_left,
    assert_same,
    checkpoints_in,
    ended,
    field,
    moments,
    run_folder,
    started,
)
from tests.support.running import Finished, completed, places, run_job

RUN_ID = "damaged"


@dataclass(frozen=True)
class Interrupted:
    """What a killed run of the scratch arm left: its output folder, and its two checkpoints, the older one first."""

    environment: dict[str, str]
    output: Path
    names: tuple[str, str]

    def copy(self, folder: Path) -> tuple[dict[str, str], Path]:
        """Return the environment to go on with a copy, and the copy's checkpoints."""
        shutil.copytree(self.output, folder / "output")
        return self.environment | places(folder), folder / "output" / RUN_ID / "checkpoints"


@pytest.fixture(scope="module")
def interrupted(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    output = tmp_path_factory.mktemp("interrupted")
    environment = undisturbed.environment | {"TRANSFER_ARMS": "scratch", "TRANSFER_RUN_ID": RUN_ID}
    with started(environment | {"TRANSFER_OUTPUT_URI": str(output)}) as running:
        assert running.wait(lambda: sum("saved step" in message for message in running.messages) >= 3)
        running.send(signal.SIGKILL)
        running.end()
    older, newest = checkpoints_in(output)[-2:]
    assert step_of(older.name) < step_of(newest.name)
    return Interrupted(environment, output, (older.name, newest.name))


def step_of(name: str) -> int:
    found = re.search(r"step-(\d+)", name)
    assert found
    return int(found[1])


def finish(environment: dict[str, str], undisturbed: Undisturbed) -> tuple[Finished, dict[str, Any]]:
    """Let the run end, and hold it against the undisturbed one; return the process and the scratch arm's result."""
    done = completed(environment)
    run = run_folder(Path(environment["TRANSFER_OUTPUT_URI"]))
    manifest = assert_same(run, undisturbed.folder, ["scratch"])
    assert_only_the_run_is_left(run, Path(environment["TRANSFER_CACHE_DIR"]))
    assert run_job({}, "verify", str(run)).code == 0
    return done, manifest["results"][0]


def refused(process: Finished) -> dict[str, str]:
    """Return the reasons given for each checkpoint that was not used."""
    found = [re.fullmatch(r"checkpoint (\S+) is not used: (.+)", line["message"]) for line in process.lines]
    severities = {line["severity"] for line in process.lines if "is not used" in line["message"]}
    assert severities <= {"WARNING"}
    return {match[1]: match[2] for match in found if match}


def flipped(content: bytes, bit: int) -> bytes:
    byte, shift = divmod(bit, 8)
    return content[:byte] + bytes([content[byte] ^ 1 << shift]) + content[byte + 1 :]


@pytest.mark.slow
def test_a_whole_checkpoint_is_gone_on_from(interrupted: Interrupted, undisturbed: Undisturbed, tmp_path: Path) -> None:
    environment, _ = interrupted.copy(tmp_path)
    done, result = finish(environment, undisturbed)
    assert refused(done) == {}
    assert field(done, "resumed_at") == [step_of(interrupted.names[1])]
    assert result["resumed"] == 1


def test_newer_ones_with_any_bit_flipped_or_cut_short_are_passed_over_for_the_one_before(
    interrupted: Interrupted, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    environment, folder = interrupted.copy(tmp_path)
    older, newest = interrupted.names
    content = (folder / newest).read_bytes()
    generator = random.Random(4)  # noqa: S311
    bits = [0, 5, 8 * 30, 8 * len(content) - 1, *(generator.randrange(8 * len(content)) for _ in range(8))]
    damages = [flipped(content, bit) for bit in bits]
    damages += [content[:length] for length in (0, 1, 100, len(content) // 2, len(content) - 1)]
    damages += [content + b"\0", b"junk", b"\0" * len(content)]
    names = []
    for number, damage in enumerate(damages):
        # each keeps the digest of what it was, and looks newer than the last
        names.append(newest.replace(f"{step_of(newest):09d}", f"{step_of(newest) + number:09d}"))
        (folder / names[-1]).write_bytes(damage)
    assert newest in names
    done, result = finish(environment, undisturbed)
    reasons = refused(done)
    assert set(reasons) == set(names)
    assert all("damaged" in reason for reason in reasons.values()), reasons
    assert field(done, "resumed_at") == [step_of(older)]
    assert result["resumed"] == 1


@pytest.mark.slow
def test_when_none_can_be_used_the_result_is_trained_anew(
    interrupted: Interrupted, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    environment, folder = interrupted.copy(tmp_path)
    older, newest = interrupted.names
    (folder / older).write_bytes(b"")
    content = (folder / newest).read_bytes()
    (folder / newest).write_bytes(content[: len(content) // 3])
    # files whose names are right for what they hold, which is no checkpoint
    strays = [b"", b"junk", b"PK\x03\x04junk", b"\x93NUMPY junk", content[:200]]
    names = [renamed(older, 900 + i, junk) for i, junk in enumerate(strays)]
    for name, junk in zip(names, strays, strict=True):
        (folder / name).write_bytes(junk)
    (folder / "notes.txt").write_text("no checkpoint at all")
    done = completed(environment)
    assert set(refused(done)) == {older, newest, *names}
    assert field(done, "resumed_at") == []
    manifest = assert_same(run_folder(tmp_path / "output"), undisturbed.folder, ["scratch"])
    assert manifest["results"][0]["resumed"] == 0
    assert not checkpoints_in(tmp_path / "output")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def renamed(name: str, step: int, content: bytes) -> str:
    """Return a checkpoint's name for another step and other content."""
    changed, count = re.subn(r"step-\d+-[0-9a-f]+", f"step-{step:09d}-{digest(content)}", name)
    assert count == 1
    return changed


@pytest.mark.slow
def test_a_checkpoint_of_other_settings_is_not_used(
    interrupted: Interrupted, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    environment, _ = interrupted.copy(tmp_path)
    output = tmp_path / "output"
    other = ended(
        environment | {"TRANSFER_LEARNING_RATE": "0.002"},
        Moment("training", "scratch 1"), moments(["scratch 1"]), signal.SIGTERM, delay=0.5,
    )  # fmt: skip
    assert other is not None
    assert other.process.code == 143, other.process.errors
    # the other run, too, met checkpoints that are not its own
    assert set(refused(other.process)) == set(interrupted.names)
    left = {path.name for path in checkpoints_in(output)}
    theirs = left - set(interrupted.names)
    assert theirs
    done, result = finish(environment, undisturbed)
    reasons = refused(done)
    # those of its own that are still there are used
    assert {name for name, reason in reasons.items() if "settings" in reason} <= theirs
    if left & set(interrupted.names):
        assert field(done, "resumed_at") == [max(step_of(name) for name in left & set(interrupted.names))]
    else:
        assert set(reasons) == theirs
        assert field(done, "resumed_at") == []
        assert result["resumed"] == 0


@pytest.mark.parametrize("place", ["empty", pytest.param("absent", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_folder_without_checkpoints_is_a_beginning(
    interrupted: Interrupted, undisturbed: Undisturbed, tmp_path: Path, place: str
) -> None:
    environment, folder = interrupted.copy(tmp_path)
    shutil.rmtree(folder)
    if place == "empty":
        folder.mkdir()
    done, result = finish(environment, undisturbed)
    assert refused(done) == {}
    assert field(done, "resumed_at") == []
    assert result["resumed"] == 0


Damage = Callable[[Path], None]


def _cut_short(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(flipped(content, 4 * len(content)))


@pytest.fixture(scope="module")
def two_finished(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    """A run that was killed when frozen and scratch were finished and fine_tune had begun."""
    output = tmp_path_factory.mktemp("two-finished")
    environment = undisturbed.environment | {"TRANSFER_OUTPUT_URI": str(output), "TRANSFER_RUN_ID": RUN_ID}
    kill = ended(environment, Moment("begins", "fine_tune 1"), moments(), signal.SIGKILL)
    assert kill is not None
    return environment, output


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("**/*scratch*/**/variables.data*", _flip),
        ("**/*scratch*/**/predictions.csv", _cut_short),
        ("**/*scratch*/**/saved_model.pb", Path.unlink),
        ("**/*scratch*.json", _cut_short),
        ("**/*scratch*.json", _flip),
    ],
    ids=["variables flipped", "predictions cut short", "model missing", "record cut short", "record flipped"],
)
@pytest.mark.slow
def test_a_finished_result_that_was_damaged_is_trained_again(
    two_finished: tuple[dict[str, str], Path], undisturbed: Undisturbed, tmp_path: Path, pattern: str, damage: Damage
) -> None:
    environment, output = two_finished
    shutil.copytree(output, tmp_path / "output")
    found = [path for path in (tmp_path / "output").glob(pattern) if path.is_file()]
    assert found, sorted((tmp_path / "output").rglob("*"))
    damage(found[0])
    done = completed(environment | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output")})
    messages = [line["message"] for line in done.lines]
    assert not any(message.startswith("scratch:") and "finished before" in message for message in messages)
    assert any(message.startswith("frozen:") and "finished before" in message for message in messages)
    warnings = [line["message"] for line in done.lines if line["severity"] == "WARNING"]
    assert any("scratch-fraction-1-seed-0 is trained again" in message for message in warnings), warnings
    run = run_folder(tmp_path / "output")
    assert_same(run, undisturbed.folder)
    assert run_job({}, "verify", str(run)).code == 0
