"""Several devices and several workers, by the real command, held against one process with the same batches."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.group import group, start, tf_config
from tests.support.kills import SAVED_OFTEN, Running, field, variables_of
from tests.support.photos import write_dataset
from tests.support.running import CLASSES, Finished, completed, published_in, run_job
from tests.support.servers import free_port

# Adam divides by the root of a mean square: where a gradient is all rounding, its sign decides a whole step. Momentum
# passes differences on as they are.
# A lost worker ends the others within so many seconds, whatever they are doing.
LONGEST = 30
EXACT = {
    "TRANSFER_OPTIMIZER": "sgd",
    "TRANSFER_EPOCHS": "4",
    "TRANSFER_TRAIN_FRACTIONS": "0.5",
    "TRANSFER_BATCH_SIZE": "11",
}


@pytest.fixture(scope="module")
def settings(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The small experiment on photos in five files, which TFDS reads in turns."""
    folder = tmp_path_factory.mktemp("tfds")
    photos = write_dataset(folder, "pets", {"train": 150}, CLASSES, size=40, bad=(50,), shards=5)
    return tiny | SAVED_OFTEN | EXACT | {"TRANSFER_DATASET": str(photos)}


@pytest.fixture(scope="module")
def alone(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("alone")
    completed(settings | {"TRANSFER_OUTPUT_URI": str(output)})
    found = published_in(output)
    # the last batch is a single photo, in which one of two replicas has no part
    assert {result["train_examples"] % int(EXACT["TRANSFER_BATCH_SIZE"]) for result in found[1]["results"]} == {1}
    return found


def same(found: tuple[Path, dict[str, Any]], expected: tuple[Path, dict[str, Any]]) -> float:
    """Hold one run against another, and return by how much their variables differ."""
    (folder, manifest), (other, wanted) = found, expected
    worst = 0.0
    for result, sought in zip(manifest["results"], wanted["results"], strict=True):
        assert [result[key] for key in ("arm", "train_examples")] == [sought[key] for key in ("arm", "train_examples")]
        values, others = (variables_of(at / result["saved_model"]) for at in (folder, other))
        for name, value in others.items():
            worst = max(worst, float(np.abs(values[name] - value).max()))
        for split, metrics in result["metrics"].items():
            for name in ("examples", "accuracy", "confusion", "per_class"):
                assert metrics[name] == sought["metrics"][split][name], (result["arm"], split, name)
            assert metrics["loss"] == pytest.approx(sought["metrics"][split]["loss"], abs=1e-4)
    return worst


def verified_as(expected: tuple[Path, dict[str, Any]], output: Path) -> dict[str, Any]:
    """Check that the run in ``output`` verifies and is as another; return its manifest."""
    folder, manifest = found = published_in(output)
    assert same(found, expected) <= 1e-5
    completed({}, "verify", str(folder))
    return manifest


def train(*environments: dict[str, str], ends: int = 0, seconds: float = 400, chief: bool = False) -> list[Finished]:
    """Run one worker for each environment; each must end with the code ``ends``."""
    with group(*environments, chief=chief) as workers:
        return all_end(workers, ends, seconds)


def all_end(workers: list[Running], ends: int = 0, seconds: float = 400) -> list[Finished]:
    runs = [worker.end(seconds) for worker in workers]
    assert [run.code for run in runs] == [ends] * len(runs), "".join(run.errors for run in runs)
    return runs


@pytest.mark.slow
def test_two_devices_train_as_one(settings: dict[str, str], alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    all_end([start(settings | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output")}, devices=2)])
    manifest = verified_as(alone, tmp_path / "output")
    assert len(manifest["environment"]["devices"]) == 2
    assert manifest["run_id"] == alone[1]["run_id"]


@pytest.mark.parametrize("chief", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_workers_train_as_one(
    settings: dict[str, str], alone: tuple[Path, dict[str, Any]], tmp_path: Path, chief: bool
) -> None:
    environment = settings | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    train(environment, environment, chief=chief)
    manifest = verified_as(alone, tmp_path / "output")
    assert manifest["environment"]["workers"] == 2
    assert manifest["run_id"] == alone[1]["run_id"]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_that_is_killed_ends_the_other_which_goes_on_when_both_start_again(
    settings: dict[str, str], alone: tuple[Path, dict[str, Any]], tmp_path: Path, lost: int
) -> None:
    environment = settings | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output"), "TRANSFER_CACHE_DIR": str(tmp_path)}
    with group(environment, environment) as workers:
        assert workers[0].until("saved step")
        workers[lost].process.kill()
        left = workers[1 - lost].end(LONGEST)
    assert left.code == 74, left.errors
    assert "gone" in left.text
    assert not list((tmp_path / "output").glob("*/manifest.json"))
    assert "goes on after step" in train(environment, environment)[0].text
    assert any(result["resumed"] for result in verified_as(alone, tmp_path / "output")["results"])


@pytest.mark.slow
def test_a_worker_that_is_asked_to_stop_stops_all_after_the_same_step(
    settings: dict[str, str], alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    # with checkpoints so rare, what is found is what the stop has saved
    environment = settings | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output"), "TRANSFER_CHECKPOINT_SECONDS": "600"}
    environment |= {"TRANSFER_ARMS": "scratch"}
    with group(environment, environment) as workers:
        assert workers[0].until("epoch 1/4")
        workers[1].process.terminate()
        stopped = all_end(workers, 143, LONGEST)
    (saved,) = field(stopped[0], "saved_step")
    assert [field(run, "resumed_at") for run in train(environment, environment)] == [[saved], [saved]]
    scratch = [result for result in alone[1]["results"] if result["arm"] == "scratch"]
    assert same(published_in(tmp_path / "output"), (alone[0], alone[1] | {"results": scratch})) <= 1e-5


@pytest.mark.parametrize(
    "missing", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.slow)]
)
def test_workers_wait_for_all_others_aloud_and_can_be_stopped(
    settings: dict[str, str], tmp_path: Path, missing: int
) -> None:
    environment = settings | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    with group(environment, environment, environment, missing=[missing]) as workers:
        for worker in workers:
            assert worker.until("waiting for 1 of 2 other workers: 127.0.0.1:")
            worker.process.terminate()
        all_end(workers, 143, LONGEST)


def test_a_port_that_is_taken_is_refused(settings: dict[str, str], tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        told = tf_config([taken.getsockname()[1], free_port()], 0)
        run = run_job(settings | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output"), "TF_CONFIG": told})
    assert run.code == 78, run.errors
    assert "TF_CONFIG" in run.text
    assert "in use" in run.text


@pytest.mark.slow
def test_workers_of_different_experiments_are_refused(settings: dict[str, str], tmp_path: Path) -> None:
    environment = settings | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    runs = train(environment, environment | {"TRANSFER_EPOCHS": "5"}, ends=78, seconds=LONGEST + 60)
    assert "fingerprint" in runs[0].text
    assert "worker 1: " in runs[0].text


@pytest.mark.slow
def test_a_published_run_is_verified_by_the_chief_and_ends_all(
    settings: dict[str, str], alone: tuple[Path, dict[str, Any]]
) -> None:
    environment = settings | {"TRANSFER_OUTPUT_URI": str(alone[0].parent)}
    runs = train(environment, environment)
    assert "already published and verified" in runs[0].text
    assert not [line for run in runs for line in run.lines if "epoch" in line]


@pytest.mark.slow
def test_plan_looks_at_one_worker_without_waiting_for_the_others(settings: dict[str, str], tmp_path: Path) -> None:
    found = []
    for told in ({}, {"TF_CONFIG": tf_config([free_port(), free_port(), free_port()], 1)}):
        changes = told | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
        found.append(completed(settings | changes, "plan").lines[-1])
    one, three = found
    assert (one["workers"], three["workers"]) == (1, 3)
    assert one["run_id"] == three["run_id"]
    assert three["disk"]["needed"] < one["disk"]["needed"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_two_devices_train_in_half_precision(settings: dict[str, str], tmp_path: Path, precision: str) -> None:
    changes = {"TRANSFER_PRECISION": precision, "TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    all_end([start(settings | changes, devices=2)])
    _, manifest = published_in(tmp_path / "output")
    assert manifest["environment"]["precision"] == precision
    for result in manifest["results"]:
        losses = [epoch["train_loss"] for epoch in result["history"]]
        assert losses[-1] < losses[0], result["arm"]
