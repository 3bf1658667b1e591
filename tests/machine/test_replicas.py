"""Several devices and several workers, by the real command, held against one process with the same batches."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.group import group, start, tf_config
from tests.support.kills import SAVED_OFTEN, variables_of
from tests.support.photos import write_dataset
from tests.support.running import CLASSES, Finished, run_job
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


def manifest_of(output: Path) -> tuple[Path, dict[str, Any]]:
    (folder,) = output.iterdir()
    return folder, json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def settings(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The small experiment on photos in five files, which TFDS reads in turns."""
    folder = tmp_path_factory.mktemp("tfds")
    photos = write_dataset(folder, "pets", {"train": 150}, CLASSES, size=40, bad=(50,), shards=5)
    return tiny | SAVED_OFTEN | EXACT | {"TRANSFER_DATASET": str(photos)}


@pytest.fixture(scope="module")
def alone(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("alone")
    run = run_job(settings | {"TRANSFER_OUTPUT_URI": str(output)})
    assert run.code == 0, run.errors
    found = manifest_of(output)
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


def verified(folder: Path) -> None:
    verify = run_job({}, "verify", str(folder))
    assert verify.code == 0, verify.errors


@pytest.mark.slow
def test_two_devices_train_as_one(settings: dict[str, str], alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run = start(settings | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output")}, devices=2).finished()
    assert run.code == 0, run.errors
    found = manifest_of(tmp_path / "output")
    assert len(found[1]["environment"]["devices"]) == 2
    assert found[1]["run_id"] == alone[1]["run_id"]
    assert same(found, alone) <= 1e-5
    verified(found[0])


@pytest.mark.parametrize("chief", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_workers_train_as_one(
    settings: dict[str, str], alone: tuple[Path, dict[str, Any]], tmp_path: Path, chief: bool
) -> None:
    environment = settings | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    with group(environment, environment, chief=chief) as workers:
        runs: list[Finished] = [worker.finished() for worker in workers]
    assert [run.code for run in runs] == [0, 0], "".join(run.errors for run in runs)
    found = manifest_of(tmp_path / "output")
    assert found[1]["environment"]["workers"] == 2
    assert found[1]["run_id"] == alone[1]["run_id"]
    assert same(found, alone) <= 1e-5
    verified(found[0])


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_that_is_killed_ends_the_other_which_goes_on_when_both_start_again(
    settings: dict[str, str], alone: tuple[Path, dict[str, Any]], tmp_path: Path, lost: int
) -> None:
    environment = settings | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output"), "TRANSFER_CACHE_DIR": str(tmp_path)}
    with group(environment, environment) as workers:
        workers[0].wait_for("saved step")
        workers[lost].process.kill()
        left = workers[1 - lost].finished(LONGEST)
    assert left.code in (74, 143), left.errors
    assert "has gone" in left.text
    assert not list((tmp_path / "output").glob("*/manifest.json"))
    with group(environment, environment) as workers:
        runs = [worker.finished() for worker in workers]
    assert [run.code for run in runs] == [0, 0], "".join(run.errors for run in runs)
    assert "goes on after step" in runs[0].text
    found = manifest_of(tmp_path / "output")
    assert any(result["resumed"] for result in found[1]["results"])
    assert same(found, alone) <= 1e-5
    verified(found[0])


@pytest.mark.slow
def test_a_worker_that_is_asked_to_stop_stops_all_after_the_same_step(
    settings: dict[str, str], alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    # with checkpoints so rare, what is found is what the stop has saved
    environment = settings | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output"), "TRANSFER_CHECKPOINT_SECONDS": "600"}
    environment |= {"TRANSFER_ARMS": "scratch"}
    with group(environment, environment) as workers:
        workers[0].wait_for("epoch 1/4")
        workers[1].process.terminate()
        runs = [worker.finished(LONGEST) for worker in workers]
    assert [run.code for run in runs] == [143, 143], "".join(run.errors for run in runs)
    (saved,) = [line["saved_step"] for line in runs[0].lines if "saved_step" in line]
    with group(environment, environment) as workers:
        runs = [worker.finished() for worker in workers]
    assert [run.code for run in runs] == [0, 0], "".join(run.errors for run in runs)
    resumed = [[line["resumed_at"] for line in run.lines if "resumed_at" in line] for run in runs]
    assert resumed == [[saved], [saved]]
    scratch = [result for result in alone[1]["results"] if result["arm"] == "scratch"]
    assert same(manifest_of(tmp_path / "output"), (alone[0], alone[1] | {"results": scratch})) <= 1e-5


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_worker_waits_for_the_others_aloud_and_can_be_stopped(
    settings: dict[str, str], tmp_path: Path, index: int
) -> None:
    told = tf_config([free_port(), free_port()], index)
    worker = start(settings | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output"), "TF_CONFIG": told})
    worker.wait_for("waiting for 1 other workers: 127.0.0.1:")
    worker.process.terminate()
    assert worker.finished(LONGEST).code == 143


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
    with group(environment, environment | {"TRANSFER_EPOCHS": "5"}) as workers:
        runs = [worker.finished(LONGEST + 60) for worker in workers]
    assert [run.code for run in runs] == [78, 78], "".join(run.errors for run in runs)
    assert "fingerprint" in runs[0].text
    assert "worker 1: " in runs[0].text


@pytest.mark.slow
def test_a_published_run_is_verified_by_the_chief_and_ends_all(
    settings: dict[str, str], alone: tuple[Path, dict[str, Any]]
) -> None:
    environment = settings | {"TRANSFER_OUTPUT_URI": str(alone[0].parent)}
    with group(environment, environment) as workers:
        runs = [worker.finished() for worker in workers]
    assert [run.code for run in runs] == [0, 0], "".join(run.errors for run in runs)
    assert "already published and verified" in runs[0].text
    assert not [line for run in runs for line in run.lines if "epoch" in line]


_WATCHED = """
import socket, time
from job.machine import replicas
from job import stopping
stopping.heed()
try:
    with socket.create_server(("127.0.0.1", 0)) as peer:
        watch = replicas._Watch([peer.getsockname()])
        watch.start()
        print("watching", flush=True)
        {until}
    while True:
        time.sleep(1) if {python} else __import__("ctypes").CDLL(None).sleep(1000)
except stopping.Stopped:
    stopping.leave(143)
"""


@pytest.mark.slow
@pytest.mark.parametrize("python", [True, False])
def test_a_lost_worker_is_noticed_where_nothing_is_exchanged_even_in_native_code(python: bool) -> None:
    code = _WATCHED.format(until="time.sleep(5)", python=python)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LONGEST + 20, check=False
    )
    assert done.returncode == 143, done.stderr
    assert "has gone" in done.stderr


@pytest.mark.slow
def test_plan_looks_at_one_worker_without_waiting_for_the_others(settings: dict[str, str], tmp_path: Path) -> None:
    found = []
    for told in ({}, {"TF_CONFIG": tf_config([free_port(), free_port(), free_port()], 1)}):
        run = run_job(settings | told | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output")}, "plan")
        assert run.code == 0, run.errors
        found.append(run.lines[-1])
    one, three = found
    assert (one["workers"], three["workers"]) == (1, 3)
    assert one["run_id"] == three["run_id"]
    assert three["disk"]["needed"] < one["disk"]["needed"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_two_devices_train_in_half_precision(settings: dict[str, str], tmp_path: Path, precision: str) -> None:
    changes = {"TRANSFER_PRECISION": precision, "TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    run = start(settings | changes, devices=2).finished()
    assert run.code == 0, run.errors
    _, manifest = manifest_of(tmp_path / "output")
    assert manifest["environment"]["precision"] == precision
    for result in manifest["results"]:
        losses = [epoch["train_loss"] for epoch in result["history"]]
        assert losses[-1] < losses[0], result["arm"]
