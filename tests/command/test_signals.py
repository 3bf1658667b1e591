"""Asked to stop at any stage, the job saves what it has, says so, ends with 143, and goes on from there."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.kills import (
    ARMS,
    PID_1,
    End,
    Moment,
    Undisturbed,
    assert_only_the_run_is_left,
    assert_same,
    ended,
    field,
    moments,
    run_folder,
    started,
    with_pid_1,
)
from tests.support.running import Finished, completed, places, run_job

# The contract's bound; the platform's own SIGKILL comes 5 s later.
GRACE_SECONDS = 25.0
STEPS_PER_EPOCH = 5  # 71 examples in batches of 16

TERM, INT = signal.SIGTERM, signal.SIGINT
# Each stop goes on from where the one before it ended: so one run passes them all.
STOPS: list[tuple[Moment, float, signal.Signals]] = [
    (Moment("start-up"), 0.0, TERM),
    (Moment("start-up"), 1.5, INT),
    (Moment("decoding"), 0.3, TERM),
    (Moment("begins", "scratch 1"), 0.7, TERM),
    (Moment("training", "scratch 1"), 1.0, TERM),
    (Moment("evaluating", "scratch 1"), 0.0, INT),
    (Moment("features", "frozen 1"), 0.0, TERM),
    (Moment("exporting", "frozen 1"), 0.0, TERM),
    (Moment("storing", "fine_tune 1"), 0.0, TERM),
    (Moment("committing"), 0.0, TERM),
]


def stop_at_each(
    environment: dict[str, str], stops: Sequence[tuple[Moment, float, signal.Signals]], order: Sequence[Moment]
) -> list[End]:
    """Stop the run at each moment in turn, and check what every stop owes; return how each ended."""
    found: list[End] = []
    output = Path(environment["TRANSFER_OUTPUT_URI"])
    for moment, delay, number in stops:
        stop = ended(environment, moment, order, number, delay)
        if moment.stage == "committing" and (stop is None or stop.process.code == 0):
            # the run was published before the signal came: a commit takes a tenth of a second
            assert run_job({}, "verify", str(run_folder(output))).code == 0
            continue
        assert stop is not None, f"the run was over before it reached {moment}"
        process = stop.process
        assert process.code == 143, (str(moment), process.code, process.errors)
        assert stop.seconds < GRACE_SECONDS, str(moment)
        last = process.errors.strip().splitlines()[-1]
        assert "asked to stop" in last, (str(moment), last)
        if stop.at.stage not in ("committing", "published"):
            assert not list(output.rglob("manifest.json")), str(moment)
        for run in output.rglob("manifest.json"):
            assert run_job({}, "verify", str(run.parent)).code == 0, "half a run was published"
        assert not [path.name for path in Path(environment["TRANSFER_CACHE_DIR"]).iterdir() if path.name != "features"]
        found.append(stop)
    return found


def assert_nothing_was_lost(processes: Sequence[Finished]) -> None:
    """Check that every process of a run went on where the one before it ended."""
    saved: dict[str, int] = {}
    for process in processes:
        for line in process.lines:
            arm = next((arm for arm in ARMS if line["message"].startswith(arm)), "")
            if "resumed_at" in line:
                assert line["resumed_at"] == saved[arm], line
            if "saved_step" in line:
                assert line["saved_step"] >= saved.get(arm, 0), line
                saved[arm] = line["saved_step"]
    assert saved, "nothing was ever saved"


@pytest.mark.slow
def test_a_run_stopped_at_every_stage_loses_nothing_and_publishes_the_same(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    # so that nothing but the stop itself saves
    environment = undisturbed.environment | places(tmp_path) | {"TRANSFER_CHECKPOINT_SECONDS": "3600"}
    (tmp_path / "cache").mkdir()
    stops = stop_at_each(environment, STOPS, moments())
    last = completed(environment)
    processes = [*(stop.process for stop in stops), last]
    assert_nothing_was_lost(processes)
    in_training = next(stop.process for stop in stops if stop.at == Moment("training", "scratch 1"))
    assert field(in_training, "saved_step")[-1] >= STEPS_PER_EPOCH * field(in_training, "epoch")[-1]
    epochs = [
        (line["arm"], line["epoch"]) for process in processes for line in process.lines if {"arm", "epoch"} <= set(line)
    ]
    assert sorted(epochs) == sorted({(arm, epoch) for arm in ARMS for epoch in range(1, 17)}), "an epoch was repeated"
    run = run_folder(tmp_path / "output")
    assert_same(run, undisturbed.folder)
    assert_only_the_run_is_left(run, tmp_path / "cache")
    assert run_job({}, "verify", str(run)).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [TERM, INT], ids=lambda number: number.name)
def test_a_run_stopped_at_every_stage_of_every_arm_publishes_the_same(
    undisturbed: Undisturbed, tmp_path: Path, number: signal.Signals
) -> None:
    kept = {"TRANSFER_CHECKPOINT_URI": str(tmp_path / "checkpoints")}
    environment = undisturbed.environment | places(tmp_path) | kept
    (tmp_path / "cache").mkdir()
    order = moments()
    stops = stop_at_each(environment, [(moment, 0.0, number) for moment in order[:-1]], order)
    last = completed(environment)
    assert_nothing_was_lost([*(stop.process for stop in stops), last])
    assert_same(run_folder(tmp_path / "output"), undisturbed.folder)
    assert not [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]


@with_pid_1
@pytest.mark.slow
def test_a_job_with_pid_1_stops_too(undisturbed: Undisturbed, tmp_path: Path) -> None:
    environment = undisturbed.environment | {"TRANSFER_OUTPUT_URI": str(tmp_path), "TRANSFER_ARMS": "scratch"}
    stop = ended(environment, Moment("begins", "scratch 1"), moments(["scratch 1"]), TERM, before=PID_1)
    assert stop is not None
    assert stop.process.code == 143, stop.process.errors
    assert stop.seconds < GRACE_SECONDS
    assert not list(tmp_path.rglob("manifest.json"))


def test_two_signals_while_tensorflow_is_imported_end_the_job(undisturbed: Undisturbed, tmp_path: Path) -> None:
    environment = undisturbed.environment | {"TRANSFER_OUTPUT_URI": str(tmp_path), "TRANSFER_ARMS": "scratch"}
    with started(environment) as running:
        running.until_signals_are_heeded()
        time.sleep(1.0)
        running.send(TERM)
        running.send(INT)
        process = running.end()
    assert process.code == 143, process.errors
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("verb", ["plan", "verify"])
def test_the_other_verbs_stop_too(undisturbed: Undisturbed, tmp_path: Path, verb: str) -> None:
    arguments = ["plan"] if verb == "plan" else ["verify", str(undisturbed.folder)]
    environment = undisturbed.environment | {"TRANSFER_OUTPUT_URI": str(tmp_path)}
    with started(environment, *arguments) as running:
        running.until_signals_are_heeded()
        running.send(TERM)
        process = running.end()
    assert process.code == 143, process.errors
    assert "asked to stop" in process.errors
    assert not list(tmp_path.rglob("*"))
