"""Killed anywhere and started again until it ends, the job publishes what it would have published undisturbed."""

from __future__ import annotations

import json
import os
import random
import secrets
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.kills import (
    ARMS,
    Moment,
    Undisturbed,
    assert_only_the_run_is_left,
    assert_same,
    checkpoints_in,
    field,
    kill_until_it_ends,
    moments,
    run_folder,
)
from tests.support.running import completed, places, run_job

EARLY = [Moment(stage) for stage in ("start-up", "plan", "decoding")]


def seeded() -> random.Random:
    """Return a generator whose seed is printed; KILL_SEED repeats a run that failed."""
    seed = int(os.environ.get("KILL_SEED", secrets.randbits(32)))
    print(f"KILL_SEED={seed}")  # noqa: T201  (pytest shows it on failure)
    return random.Random(seed)  # noqa: S311


def sprinkled(later: Sequence[Moment], early: Sequence[Moment], random: random.Random) -> list[Moment]:
    """Put the moments that every process passes at random places among those that come only once."""
    wanted = list(later)
    for moment in early:
        wanted.insert(random.randint(0, len(wanted)), moment)
    return wanted


def test_a_run_killed_at_random_moments_publishes_what_an_undisturbed_one_does(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    random = seeded()
    output, cache = tmp_path / "output", tmp_path / "cache"
    order = moments()
    in_training = Moment("training", "scratch 1")
    later = [moment for moment in order if moment.result and moment != in_training]
    chosen = sorted([in_training, *random.sample(later, 3)], key=order.index)
    wanted = sprinkled(chosen, [random.choice(EARLY)], random)
    environment = undisturbed.environment | places(tmp_path)
    kills, last = kill_until_it_ends(environment, wanted, order, random)
    assert len(kills) >= 5
    assert all(kill.process.code == -9 for kill in kills)
    manifest = assert_same(run_folder(output), undisturbed.folder)
    assert any(result["resumed"] for result in manifest["results"])
    processes = [*(kill.process for kill in kills), last]
    assert any(step > 0 for process in processes for step in field(process, "resumed_at"))
    assert run_job({}, "verify", str(run_folder(output))).code == 0
    assert_only_the_run_is_left(run_folder(output), cache)


@pytest.mark.slow
def test_a_hundred_kills_over_all_stages_and_arms_change_nothing(undisturbed: Undisturbed, tmp_path: Path) -> None:
    random = seeded()
    more = undisturbed.environment | {"TRANSFER_TRAIN_FRACTIONS": "0.25,0.5,0.75,1.0"}
    completed(more | {"TRANSFER_OUTPUT_URI": str(tmp_path / "undisturbed")})
    output, cache, checkpoints = tmp_path / "output", tmp_path / "cache", tmp_path / "checkpoints"
    order = moments([f"{arm} {fraction}" for arm in ARMS for fraction in ("0.25", "0.5", "0.75", "1")])
    later = [moment for moment in order if moment.result or moment.stage == "committing"]
    environment = more | places(tmp_path) | {"TRANSFER_CHECKPOINT_URI": str(checkpoints)}
    kills, _ = kill_until_it_ends(environment, sprinkled(later, EARLY * 14, random), order, random)
    assert len(kills) >= 100
    hit = {(kill.at.stage, kill.at.result.partition(" ")[0]) for kill in kills}
    assert hit >= {(moment.stage, "") for moment in [*EARLY, Moment("committing")]}
    # where a stage takes milliseconds, as storing does and a tiny head's training, a fast machine has left it when the
    # signal comes: each stage is hit in one arm at least, and each arm at more than half of them
    stages = ("begins", "features", "training", "evaluating", "exporting", "storing")
    assert {stage for stage, arm in hit if arm} == set(stages)
    assert all(len({stage for stage, of in hit if of == arm}) > len(stages) // 2 for arm in ARMS)
    run = run_folder(output)
    manifest = assert_same(run, run_folder(tmp_path / "undisturbed"))
    assert sum(result["resumed"] for result in manifest["results"]) >= 10
    assert run_job({}, "verify", str(run)).code == 0
    assert_only_the_run_is_left(run, cache)
    assert not checkpoints_in(checkpoints)


@pytest.mark.slow
def test_a_run_killed_after_its_manifest_was_written_is_cleaned_up_by_the_next(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    # as a kill between the manifest and the removal of what was kept on the way leaves it
    output, cache = tmp_path / "output", tmp_path / "cache"
    environment = undisturbed.environment | places(tmp_path) | {"TRANSFER_ARMS": "frozen", "TRANSFER_EPOCHS": "2"}
    completed(environment)
    run = run_folder(output)
    manifest = (run / "manifest.json").read_bytes()
    left = run / "checkpoints" / "left.ckpt"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"left")
    again = completed(environment)
    assert not field(again, "epoch")
    assert (run / "manifest.json").read_bytes() == manifest
    assert_only_the_run_is_left(run, cache)
    assert run_job({}, "verify", str(run)).code == 0
    assert json.loads(manifest)["results"][0]["resumed"] == 0
