"""Groups of workers of which each is stopped and killed at every stage, by the real command; slow but for one case."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.group import group
from tests.support.kills import SAVED_OFTEN, Moment, Running, moments, run_folder, variables_of
from tests.support.running import Finished, completed

# A lost worker ends the others within so many seconds, whatever they are doing; where TensorFlow is joining them, it is
# given a minute first.
LONGEST = 30
LONGEST_TO_JOIN = 100
# One for each worker to be disturbed in; the last is left alone, so that no chief publishes before it learns of a loss.
FRACTIONS = ("0.4", "0.5", "0.6", "0.8", "1")
# Momentum passes differences of rounding on as they are, where Adam makes whole steps of them.
EXACT = {"TRANSFER_OPTIMIZER": "sgd", "TRANSFER_EPOCHS": "4", "TRANSFER_ARMS": "scratch,frozen"}
WAITING, JOINING = Moment("waiting"), Moment("joining")
EARLY = [WAITING, JOINING, Moment("plan"), Moment("decoding")]
KILL, TERM = signal.SIGKILL, signal.SIGTERM


def environment_of(tiny: Mapping[str, str], workers: int) -> dict[str, str]:
    """Return the settings of a run that has results for each of ``workers`` to be disturbed in."""
    return {**tiny, **SAVED_OFTEN, **EXACT, "TRANSFER_TRAIN_FRACTIONS": ",".join(FRACTIONS[-workers - 1 :])}


def order_of(workers: int) -> list[Moment]:
    results = [f"{arm} {fraction}" for arm in ("scratch", "frozen") for fraction in FRACTIONS[-workers - 1 :]]
    return [WAITING, JOINING, *moments(results)]


def disturb(
    environments: Sequence[Mapping[str, str]], moment: Moment, index: int, number: signal.Signals
) -> list[Finished] | None:
    """Start a group, send one of it a signal at a moment of the chief, and see that all end as they should.

    Returns:
        How each ended; None where the moment was missed, as all had ended well.
    """
    missing = [(index + 1) % len(environments)] if moment == WAITING else []
    with group(*environments, missing=missing) as workers:
        place = dict(zip(_started(environments, missing), workers, strict=True))
        chief = bool(moment.result) or moment.stage == "committing"
        if not _reached(moment, workers[0] if chief else place[index], len(environments)):
            assert [worker.end().code for worker in workers] == [0] * len(workers)
            return None
        place[index].process.send_signal(number)
        others = [worker for worker in workers if worker is not place[index]]
        if moment == WAITING:  # nobody has met anybody
            place[index].process.wait(LONGEST)
            _end_waiting(others)
        elif moment == JOINING:
            with suppress(subprocess.TimeoutExpired):
                for worker in others:
                    worker.process.wait(LONGEST_TO_JOIN)
            _end_waiting(others)
        ended = {number: worker.end(LONGEST) for number, worker in place.items()}
    codes = {number: run.code for number, run in ended.items()}
    accepted = {143} if number is TERM or moment == WAITING else {74}
    if moment == JOINING:  # who has not joined hears of no stop, and may have to be ended
        accepted = {74, 143}
    print(f"{moment}, worker {index}, {number.name}: {codes}", flush=True)  # noqa: T201  (pytest shows it on failure)
    text = "".join(run.errors for run in ended.values())
    assert codes.pop(index) == (143 if number is TERM else -number), text
    assert set(codes.values()) <= accepted, text
    return list(ended.values())


def _end_waiting(workers: Sequence[Running]) -> None:
    """End those that wait for others to come."""
    for worker in workers:
        if worker.process.poll() is None:
            assert not [message for message in worker.messages if message.endswith("workers are there")]
            worker.process.terminate()


def _started(environments: Sequence[object], missing: Sequence[int]) -> list[int]:
    return [number for number in range(len(environments)) if number not in missing]


def _reached(moment: Moment, worker: Running, workers: int) -> bool:
    if moment == WAITING:
        return worker.until("waiting for 1 of")
    if moment == JOINING:
        return worker.until("all .* workers are there")
    return worker.until_moment(moment, order_of(workers)[2:])


def held_against(output: Path, expected: Path) -> dict[str, Any]:
    """Check that the run in ``output`` is that in ``expected`` to 1e-5, and verifies; return its manifest."""
    # a folder that was just being tried for writing may keep what it was tried with
    folder, other = run_folder(output), run_folder(expected)
    manifest, wanted = (json.loads((each / "manifest.json").read_text(encoding="utf-8")) for each in (folder, other))
    completed({}, "verify", str(folder))
    assert manifest["run_id"] == wanted["run_id"]
    for result, sought in zip(manifest["results"], wanted["results"], strict=True):
        values, others = (variables_of(at / result["saved_model"]) for at in (folder, other))
        assert values.keys() == others.keys()
        assert max(float(np.abs(values[name] - value).max()) for name, value in others.items()) <= 1e-5, result["arm"]
        for split, metrics in result["metrics"].items():
            assert metrics["confusion"] == sought["metrics"][split]["confusion"]
    return manifest


def test_a_stop_of_one_of_three_stops_all(tiny: dict[str, str], tmp_path: Path) -> None:
    environment = environment_of(tiny, 3) | {"TRANSFER_OUTPUT_URI": str(tmp_path)}
    assert disturb([environment] * 3, Moment("decoding"), 2, TERM)


@pytest.mark.slow
@pytest.mark.parametrize("number", [TERM, KILL], ids=lambda number: number.name)
@pytest.mark.parametrize("workers", [3, 4])
def test_each_worker_at_every_stage(tiny: dict[str, str], tmp_path: Path, workers: int, number: signal.Signals) -> None:
    settings = environment_of(tiny, workers)
    completed(settings | {"TRANSFER_OUTPUT_URI": str(tmp_path / "alone")})
    output = tmp_path / "output"
    environments = [settings | {"TRANSFER_OUTPUT_URI": str(output)}] * workers
    indices = range(workers)
    wanted = [(moment, index) for moment in EARLY for index in indices]
    for arm, stages in (
        ("scratch", ("training", "evaluating", "exporting")),
        ("frozen", ("features", "training", "evaluating", "exporting")),
    ):
        # a result is worked on once, so each worker is disturbed in one of its own
        for index in indices:
            wanted += [(Moment(stage, f"{arm} {FRACTIONS[-workers - 1 :][index]}"), index) for stage in stages]
    last = list(indices)
    if workers > 3:  # of more than three, one at each stage: another at the next, and by the other signal
        stages = sorted({(moment.result.partition(" ")[0], moment.stage) for moment, _ in wanted})
        turn = {stage: (place + (number is KILL)) % workers for place, stage in enumerate(stages)}
        wanted = [each for each in wanted if turn[each[0].result.partition(" ")[0], each[0].stage] == each[1]]
        last = [workers - 1 - (number is KILL)]
    hit = [(moment, index) for moment, index in wanted if disturb(environments, moment, index, number)]
    # a run is committed once, so each worker is disturbed in a copy
    for index in last:
        copy = tmp_path / f"output {index}"
        shutil.copytree(output, copy)
        environment = settings | {"TRANSFER_OUTPUT_URI": str(copy)}
        if disturb([environment] * workers, Moment("committing"), index, number):
            hit.append((Moment("committing"), index))
        with group(*[environment] * workers) as again:
            assert [worker.end().code for worker in again] == [0] * workers
        manifest = held_against(copy, tmp_path / "alone")
        assert any(result["resumed"] for result in manifest["results"])
    every = len(wanted) + len(last)
    print(f"{len(hit)} of {every} moments were hit")  # noqa: T201
    assert len(hit) >= 0.8 * every
