"""A cap on a run's time or cost: over all of its lives, with what is done saved, and no life in vain."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.group import group
from tests.support.kills import assert_only_the_run_is_left, assert_same, field, run_folder, started
from tests.support.running import Finished, Published, completed, places, run_job

STEPS_PER_EPOCH = 5  # 71 examples in batches of 16
LONG = {"TRANSFER_ARMS": "scratch", "TRANSFER_EPOCHS": "200", "TRANSFER_DROPOUT": "0.2"}


def told(output: Path) -> list[dict[str, Any]]:
    """Return what each life of the only run in ``output`` told of itself."""
    return [json.loads(path.read_text()) for path in sorted(output.glob("*/checkpoints/spent/*.json"))]


def spent(output: Path) -> float:
    return float(sum(life["seconds"] for life in told(output)))


def went_on(done: Finished, saved: int) -> int:
    """Return the step that a life has saved at last, or ``saved`` before it; check that it saved what it had told."""
    last = int([saved, *field(done, "saved_step")][-1])
    assert last >= STEPS_PER_EPOCH * max(field(done, "epoch"), default=0)
    return last


def refusal(done: Finished, variable: str) -> str:
    """Return the message of a run that a cap has ended."""
    assert done.code == 78, done.errors
    (problem,) = (line for line in done.lines if line.get("severity") == "ERROR")
    assert problem["variable"] == variable
    return str(problem["message"])


def test_a_cap_below_the_start_ends_the_first_life_and_the_next_before_it_decodes(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    environment = tiny | places(tmp_path) | {"TRANSFER_MAX_SECONDS": "0.5"}
    output = tmp_path / "output"
    first = run_job(environment)
    assert "cannot be told" in refusal(first, "TRANSFER_MAX_SECONDS")
    assert not field(first, "epoch")
    before = told(output)
    assert [life["seconds"] > 0.5 for life in before] == [True]
    second = run_job(environment)
    assert f"received 0.5: {before[0]['seconds']:.0f} s spent" in refusal(second, "TRANSFER_MAX_SECONDS")
    assert told(output) == before
    assert not list(output.rglob("manifest.json"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_run_that_is_published_ends_well_whatever_the_cap(small: dict[str, str], published: Published) -> None:
    capped = {"TRANSFER_OUTPUT_URI": str(published.folder.parent), "TRANSFER_MAX_SECONDS": "0.5"}
    assert "already published and verified" in completed(small | capped).text


@pytest.mark.slow
def test_a_run_goes_on_from_its_cap_once_that_is_raised_and_publishes_the_same(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    environment = tiny | LONG | {"TRANSFER_CHECKPOINT_SECONDS": "2"}
    completed(environment | {"TRANSFER_OUTPUT_URI": str(tmp_path / "expected")})
    environment |= places(tmp_path)
    output = tmp_path / "output"
    with started(environment) as running:
        assert running.until("epoch 40/")
        running.send(signal.SIGKILL)
        running.end()
    (killed,) = told(output)
    assert killed["seconds"] > killed["opening"] > 0
    assert killed["share"] > 0
    # in money, of which a second takes one
    environment |= {"TRANSFER_COST_PER_HOUR": "3600"}
    limit = 2 * killed["seconds"] + 3
    stops = []
    for _ in range(20):
        before = spent(output)
        done = run_job(environment | {"TRANSFER_MAX_COST": f"{limit:.1f}"})
        if done.code == 0:
            break
        message = refusal(done, "TRANSFER_MAX_COST")
        stops.append(done)
        assert len(told(output)) == 1 + len(stops)
        assert spent(output) >= limit > before
        found = re.search(r"the rest is estimated at ([\d.]+) \(\d+ s\); give ([\d.]+) or more", message)
        assert found, message
        assert float(found[2]) >= spent(output) + float(found[1]) - 5
        limit = float(found[2])
    assert done.code == 0, done.errors
    assert stops
    saved = 0
    for stop in stops:
        assert saved in (0, *field(stop, "resumed_at")) or not field(stop, "epoch")
        saved = went_on(stop, saved)
    assert saved
    assert field(done, "resumed_at") == [saved]
    assert_same(run_folder(output), run_folder(tmp_path / "expected"), ["scratch"])
    assert_only_the_run_is_left(run_folder(output), tmp_path / "cache")


@pytest.mark.slow
def test_workers_reach_the_cap_after_the_same_step(tiny: dict[str, str], tmp_path: Path) -> None:
    # so long that no cap here is above it
    environment = tiny | LONG | {"TRANSFER_EPOCHS": "100000", "TRANSFER_CHECKPOINT_SECONDS": "2"}
    output = tmp_path / "output"
    environment |= {"TRANSFER_OUTPUT_URI": str(output)}
    with group(environment, environment) as workers:
        assert workers[0].until("epoch 20/")
        for worker in workers:
            worker.process.kill()
    (killed,) = told(output)
    saved = resumed = 0
    for lives in range(1, 20):
        capped = environment | {"TRANSFER_MAX_SECONDS": str(spent(output) + killed["seconds"] + 5)}
        with group(capped, capped) as workers:
            chief, helper = (worker.end(300) for worker in workers)
        assert "spent over all restarts" in refusal(chief, "TRANSFER_MAX_SECONDS")
        assert "the first worker tells" in refusal(helper, "TRANSFER_MAX_SECONDS")
        assert len(told(output)) == 1 + lives
        if found := field(chief, "resumed_at"):
            assert saved in (0, *found)
            assert field(helper, "resumed_at") == found
            resumed += saved > 0
        saved = went_on(chief, saved)
        if resumed:
            return
    pytest.fail("no life went on from where a cap had ended another")
