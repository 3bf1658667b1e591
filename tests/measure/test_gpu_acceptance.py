"""The GPU acceptance run: what it says of canned results, how it bears parts that fail, and its logic on the CPU."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.measure import gpu_acceptance
from tests.measure.gpu_acceptance import ALWAYS, LINES, PARTS, Acceptance, Task
from tests.measure.gpu_data import Place
from tests.measure.gpu_goals import JSON, exit_code, judge, seconds_of_arm, shortfalls_of, times_keras
from tests.measure.gpu_page import ON_CPU, PAGE, page
from tests.measure.gpu_turns import medians
from tests.support.running import ROOT

ARMS = ("scratch", "frozen", "fine_tune")


def arm(accuracy: float = 0.9, resumed: int = 0, rate: float = 1000.0) -> dict[str, Any]:
    names = ("data", "features", "training", "evaluation", "export", "total")
    return {
        "accuracy": accuracy,
        "interval": [accuracy - 0.03, accuracy + 0.03],
        "seconds": dict.fromkeys(names, 1.0),
        "examples_per_second": rate,
        "energy_joules": None,
        "resumed": resumed,
    }


def run(code: int = 0, precision: str = "float32", xla: bool = False, **arms: Any) -> dict[str, Any]:
    """Return what is kept of a job."""
    told = {"devices": ["GPU"], "precision": precision, "tf32": False, "xla": xla, "deterministic": False}
    return {"code": code, "seconds": 9.0, **told, "arms": dict.fromkeys(ARMS, arm()) | arms, "output": []}


def worker(features: float | None = None, **rates: float) -> dict[str, Any]:
    ready = {"precision": "float32", "compile_seconds": dict.fromkeys(ARMS, 1.0), "features": features}
    arms = {name: {"training": rate, "bare": rate / 0.97, "share": 0.97} for name, rate in rates.items()}
    return {"ready": ready, "fault": None, "arms": arms}


WORKERS = {
    "job, XLA off": worker(features=4000.0, scratch=100.0, frozen=80_000.0, fine_tune=1000.0),
    "job, XLA on": worker(features=5000.0, scratch=300.0, frozen=50_000.0, fine_tune=2000.0),
    "Keras, XLA off": worker(scratch=80.0, frozen=400.0, fine_tune=300.0),
    "Keras, XLA on": worker(scratch=200.0, frozen=1000.0, fine_tune=700.0),
}
KILLED = {
    "killed": True,
    "at": "scratch 1 training",
    "code": -9,
    "undisturbed": run(),
    "run": run(scratch=arm(resumed=1)),
}
SERVED = {
    "examples": 200,
    "largest_difference": 0.01,
    "largest_logit_difference": 0.05,
    "agreement": 1.0,
    "proof": {"tolerance": 0.06},
}
REFUSED = {"variable": "TRANSFER_BATCH_SIZE", "message": "Give at most 96", "number": 96, "batch": 96}
# What the parts of a run find that falls short of nothing.
SOUND: dict[str, dict[str, Any]] = {
    "machine": {
        "gpus": [{"name": "NVIDIA H100", "compute_capability": "9.0"}], "driver": "570.1", "driver_cuda": 12080,
        "nvml": [{"name": "NVIDIA H100", "memory": 80e9, "used": 0}], "tensorflow": "2.21.0", "cuda": "12.5.1",
        "cudnn": "9", "cores": 16, "memory": 128e9, "python": "3.11.7",
    },
    "data": {"photos": "solar_cells 1.0.0", "weights": "random", "generated": {"photos": 3072}},
    "run": run() | {"verify": 0, "log": []},
    "serve": {"arms": dict.fromkeys(ARMS, SERVED)},
    "deterministic": {"runs": {"once": run(), "again": run()}, "compared": 9, "differing": [], "further": []},
    "kill": KILLED | {"compared": 9, "differing": [], "further": ["/results/0/resumed: 0 and 1"]},
    "memory": REFUSED | {"refused": run(78), "fitting": run()},
    "rates": {"sizes": [32], "examples": 2048, "batches": {"32": {n: w for n, w in WORKERS.items() if n[0] == "j"}}},
    "keras": {"sizes": [32], "examples": 2048, "batches": {"32": WORKERS}},
    "precision": {
        "runs": {
            "float32": run(), "float32-without-tf32": run(), "mixed_float16": run(precision="mixed_float16"),
            "mixed_bfloat16": run(precision="mixed_bfloat16"),
        }
    },
    "xla": {"runs": {"off": run(), "on": run(xla=True)}},
    "decode": {"photos": 3072, "cores": 16, "job": 9500.0, "alone": 10_000.0, "share": 0.95},
    "devices": {"count": 1},
}  # fmt: skip


def texts(part: str, *, cpu: bool = False, **changes: Any) -> list[str]:
    """Return what is said of a part that found something else in some places."""
    return [each.text for each in judge(part, SOUND[part] | changes, cpu=cpu)]


def report(cpu: bool = False, finished: bool = True, **parts: dict[str, Any]) -> dict[str, Any]:
    """Return a whole report of sound parts, with other entries for some."""
    entries = {
        name: {"state": "ended", "seconds": 9.0, "shortfalls": [], "found": found, "output": []}
        for name, found in SOUND.items()
    }
    title = f"GPU acceptance run: {ON_CPU}" if cpu else "GPU acceptance run: 1 x NVIDIA H100"
    head = {"title": title, "cpu": cpu, "begun": "now", "seconds": 900, "spent": 600.0, "finished": finished}
    head["not_asked_for"] = []
    return {**head, "parts": entries | {name: entries[name] | part for name, part in parts.items()}}


# --- what falls short --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_nothing_falls_short_where_nothing_does(part: str) -> None:
    assert judge(part, SOUND[part]) == []


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("machine", {"why_none": "no cuDNN"}, "TensorFlow can use no GPU: no cuDNN"),
        ("run", {"code": 1, "verify": None}, "the quickstart ended with exit code 1"),
        ("run", {"verify": 1}, "verify of the published run ended with exit code 1"),
        ("run", {"arms": {"frozen": arm()}}, "the published run has no scratch, fine_tune"),
        ("deterministic", {"differing": ["a.csv"]}, "two deterministic runs: 1 of 9 files differ, such as a.csv"),
        ("deterministic", {"compared": 0}, "two deterministic runs: there are no files to compare"),
        ("kill", {"run": run()}, "the run that was started again began anew instead of going on"),
        ("kill", {"killed": False, "code": 0}, "the run could not be killed in time: it ended with exit code 0 before"),
        ("memory", {"refused": run(0)}, "plan of a batch that cannot fit ended with exit code 0 instead of 78"),
        ("memory", {"number": None}, "plan of a batch that cannot fit names no number that does: Give at most 96"),
        ("memory", {"fitting": run(1)}, "plan of the batch of 96 that was named ended with exit code 1"),
        ("decode", {"share": 0.5}, "photos are read at 50% of the rate of decoding alone; the goal is 90%"),
    ],
)  # fmt: skip
def test_each_shortfall_is_said_in_words(part: str, changes: dict[str, Any], said: str) -> None:
    assert texts(part, **changes) == [said]


def test_accuracies_in_another_precision_may_differ_as_far_as_their_intervals_overlap() -> None:
    runs = SOUND["precision"]["runs"]
    near = run(precision="mixed_float16", frozen=arm(0.85))
    assert texts("precision", runs=runs | {"mixed_float16": near}) == []
    far = run(precision="mixed_float16", frozen=arm(0.7))
    said = "frozen differs between mixed_float16 and float32: test accuracy 0.700 and 0.900"
    assert texts("precision", runs=runs | {"mixed_float16": far}) == [said]


def test_a_precision_that_was_not_taken_is_wrong() -> None:
    runs = SOUND["precision"]["runs"] | {"mixed_bfloat16": run()}
    assert texts("precision", runs=runs) == ["mixed_bfloat16 was asked for, and the manifest says float32"]


def test_xla_that_was_not_taken_is_wrong() -> None:
    assert texts("xla", runs={"off": run(), "on": run()}) == ["XLA on was asked for, and the manifest says False"]


def test_a_model_is_served_within_the_proofs_tolerance_where_there_is_one() -> None:
    off, other = texts("serve", arms={"frozen": SERVED | {"largest_logit_difference": 0.07, "agreement": 0.98}})
    assert off == "frozen's model, served on the CPU, is off by 0.07 in a logit; 0.06 is accepted"
    assert other.endswith("names the same class for 98.0% of 200 test photos; the goal is 99%")
    unproven = SERVED | {"proof": None}
    assert texts("serve", arms={"frozen": unproven}) == []
    (far,) = texts("serve", arms={"frozen": unproven | {"largest_difference": 0.06}})
    assert far == "frozen's model, served on the CPU, is off by 0.06 in a probability; 0.05 is accepted"


def test_ten_epochs_are_compared_with_the_frozen_layers_pass_and_the_heads_epochs_in_them() -> None:
    assert seconds_of_arm(WORKERS, "job", "frozen", 1000) == pytest.approx(10 * 1000 / 80_000 + 1000 / 5000)
    assert seconds_of_arm(WORKERS, "Keras", "frozen", 1000) == pytest.approx(10 * 1000 / 1000)
    ours = 1000 / 5000 + 2 * 1000 / 80_000 + 8 * 1000 / 2000
    assert seconds_of_arm(WORKERS, "job", "fine_tune", 1000) == pytest.approx(ours)
    theirs = 2 * 1000 / 1000 + 8 * 1000 / 700
    assert times_keras(WORKERS, "fine_tune", 1000) == pytest.approx(theirs / ours)
    assert times_keras(WORKERS, "scratch", 1000) == pytest.approx(300 / 200)
    assert times_keras({"job, XLA off": WORKERS["job, XLA off"]}, "frozen", 1000) is None


def test_slower_than_a_goal_is_no_error_of_the_result() -> None:
    slow = WORKERS | {"Keras, XLA on": worker(scratch=400.0, frozen=1000.0, fine_tune=1500.0)}
    found = SOUND["keras"] | {"batches": {"32": slow}}
    (shortfall,) = judge("keras", found)
    assert shortfall == ("slower", "fine_tune at batch 32 trains 1.7 times as fast as tuned Keras; the goal is 3")
    assert judge("keras", found, cpu=True) == []


def test_shares_and_utilisation_are_held_against_their_goals() -> None:
    lazy = worker(features=5000.0, scratch=300.0)
    lazy["arms"]["scratch"] |= {"share": 0.9, "utilisation": 0.5}
    assert texts("rates", batches={"32": {"job, XLA on": lazy}}) == [
        "scratch at batch 32 (job, XLA on) trains at 90.0% of its bare step rate; the goal is 95%",
        "scratch at batch 32 (job, XLA on) keeps the GPU busy 50% of the time; the goal is 90%",
    ]


def test_what_was_not_measured_counts_as_falling_short() -> None:
    (shortfall,) = judge("rates", SOUND["rates"] | {"sizes": [32, 256]})
    assert shortfall == ("not run", "nothing was measured at batch 256: out of time")
    lost = SOUND["rates"]["batches"]["32"] | {"job, XLA on": {"ready": {}, "fault": "out of memory", "arms": {}}}
    (shortfall,) = judge("rates", SOUND["rates"] | {"batches": {"32": lost}}, cpu=True)
    assert shortfall == ("failed", "job, XLA on at batch 32: out of memory")


def test_several_devices_are_held_against_linear() -> None:
    rates = {"one": run(), "all": run(scratch=arm(rate=1500.0))}
    two: dict[str, Any] = {"count": 2, "runs": {"one": run(), "all": run()}, "rates": rates}
    said = "scratch on 2 devices reaches 75% of linear; the goal is 90%"
    assert texts("devices", **two) == [said]
    assert texts("devices", cpu=True, **two) == []


def test_shares_are_formed_within_a_turn_before_the_median_is_taken() -> None:
    pairs = ((50.0, 100.0), (90.0, 100.0), (300.0, 600.0))
    found = medians([{"training": training, "bare": bare} for training, bare in pairs])
    assert found == {"training": 90.0, "bare": 100.0, "share": 0.5}
    assert medians([{"training": 1.0}]) == {"training": 1.0}


# --- page and exit code ------------------------------------------------------------------------------------------

SLOW = {"shortfalls": [["slower", "fine_tune trains 2.1 times as fast as tuned Keras; the goal is 3"]]}


def test_a_run_that_falls_short_of_nothing_ends_with_0() -> None:
    assert exit_code(report()) == 0
    assert "13 parts: 13 passed." in page(report())
    assert "\nNothing falls short.\n" in page(report())


@pytest.mark.parametrize(
    ("entry", "status"),
    [
        (SLOW, "slower than the goal"),
        ({"shortfalls": [["wrong", "files differ"], *SLOW["shortfalls"]]}, "wrong"),
        ({"shortfalls": [["failed", "its process ended with exit code 1"]], "output": ["Traceback"]}, "failed"),
        ({"shortfalls": [["not run", "not run: out of time"]], "found": None}, "not run"),
        ({"state": "running", "found": None}, "running"),
    ],
)
def test_whatever_falls_short_ends_with_1_and_is_on_the_page(entry: dict[str, Any], status: str) -> None:
    whole = report(keras=entry)
    assert exit_code(whole) == 1
    text = page(whole)
    assert f"| keras | {status} | 9 |" in text
    for kind, said in entry.get("shortfalls", ()):
        assert f"- keras: **{'slower than the goal' if kind == 'slower' else kind}**: {said}\n" in text
    assert ("Last lines of keras:\n\n```text\nTraceback\n```" in text) == (status == "failed")


def test_what_is_wrong_comes_before_what_is_slow() -> None:
    wrong = {"shortfalls": [["wrong", "files differ"]]}
    assert [each.kind for _, each in shortfalls_of(report(rates=SLOW, xla=wrong))] == ["wrong", "slower"]


def test_every_table_of_a_cpu_says_so_in_its_title() -> None:
    for cpu in (True, False):
        text = page(report(cpu=cpu))
        titles = [line for line in text.splitlines() if line.startswith(("# ", "**"))]
        assert len(titles) == 13
        assert [ON_CPU in title for title in titles] == [cpu] * len(titles)
    assert json.loads(json.dumps(report(cpu=True)))["title"].endswith(ON_CPU)


def test_every_row_of_a_table_has_a_cell_for_every_column() -> None:
    several = {"count": 2, "runs": {"one": run(), "all": run()}, "rates": {"one": run(), "all": run()}}
    for table in page(report(devices={"found": several})).split("\n\n"):
        if table.startswith("|"):
            assert len({line.count(" | ") for line in table.splitlines() if not line.endswith("|  |")}) == 1, table


def test_a_page_of_a_run_that_was_killed_says_so() -> None:
    text = page(report(finished=False, devices={"state": "not begun", "found": None}))
    assert "The run has not ended, or was killed." in text
    assert "| devices | not begun |" in text


# --- running -----------------------------------------------------------------------------------------------------


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.measure.gpu_acceptance", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_it_fails_within_seconds_with_the_reason_and_what_to_do(tmp_path: Path) -> None:
    start = time.monotonic()
    done = command("--output", str(tmp_path / "gpu"), CUDA_VISIBLE_DEVICES="-1")
    assert time.monotonic() - start < 10
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert "CUDA_VISIBLE_DEVICES is '-1' and hides every GPU" in sentence
    assert "--cpu" in sentence
    assert not (tmp_path / "gpu").exists()


def test_a_driver_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    why = gpu_acceptance.no_gpu()
    assert why is not None
    assert "the NVIDIA driver's library cannot be loaded (libcuda.so.1: cannot open" in why


def test_parts_that_there_are_not_are_refused() -> None:
    done = command("--cpu", "--only", "run,speed")
    assert done.returncode == 2
    assert "--only: received speed; accepted: machine, data, run," in done.stderr


def test_the_most_valuable_parts_come_first_and_what_measures_runs_alone() -> None:
    assert PARTS[:9] == ("machine", "data", "run", "serve", "deterministic", "kill", "memory", "rates", "keras")
    lines = {part: len(line) for line in LINES for task in line for part in task.parts}
    assert {part for part, together in lines.items() if together > 1} == {*ALWAYS, "serve", "deterministic", "kill"}


def acceptance(folder: Path, *lines: tuple[Task, ...], seconds: float, monkeypatch: pytest.MonkeyPatch) -> Acceptance:
    """Return a run of other tasks than usual, which has ended."""
    monkeypatch.setattr(gpu_acceptance, "LINES", lines)
    run = Acceptance(Place(folder / "work", folder / "gpu", cpu=True), PARTS[:3], seconds)
    assert run.run() == 1
    assert json.loads((folder / "gpu" / JSON).read_text())["finished"]
    return run


def test_a_part_that_crashes_is_recorded_with_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, data = Task("gpu_gone", ("run",), 60, 0), Task("gpu_data", ("data",), 60, 0)
    run = acceptance(tmp_path, (gone, data), seconds=60, monkeypatch=monkeypatch)
    parts = run.report["parts"]
    assert parts["run"]["shortfalls"] == [["failed", "its process ended with exit code 1 before the part was through"]]
    assert parts["run"]["output"][-1].endswith("No module named tests.measure.gpu_gone")
    assert parts["data"]["shortfalls"] == []
    assert "No module named tests.measure.gpu_gone" in (tmp_path / "gpu" / PAGE).read_text()


def test_a_part_that_takes_too_long_is_ended_and_without_its_data_no_other_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, then = Task("gpu_data", ("data",), 1, 0), Task("gpu_parts", ("run",), 60, 0)
    parts = acceptance(tmp_path, (slow,), (then,), seconds=60, monkeypatch=monkeypatch).report["parts"]
    said = "its process was ended after 1 s, its limit before the part was through"
    assert parts["data"]["shortfalls"] == [["failed", said]]
    assert parts["run"]["shortfalls"] == [["not run", "not run: the part data did not pass"]]


def test_what_does_not_fit_the_time_is_told_as_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = acceptance(tmp_path, *LINES, seconds=0, monkeypatch=monkeypatch).report
    assert {tuple(each) for part in whole["parts"].values() for each in part["shortfalls"]} == {
        ("not run", "not run: out of time: 0 s were left")
    }
    assert "3 parts: 3 not run." in page(whole)


def test_some_parts_run_on_the_cpu(tmp_path: Path) -> None:
    done = command("--cpu", "--only", "serve", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads((tmp_path / JSON).read_text())
    assert list(whole["parts"]) == ["machine", "data", "run", "serve"]
    assert whole["title"].endswith(ON_CPU)
    assert whole["parts"]["run"]["found"]["arms"].keys() == set(ARMS)
    assert any(line.startswith("scratch: epoch 2/2") for line in whole["parts"]["run"]["found"]["log"])
    assert all(each["agreement"] == 1 for each in whole["parts"]["serve"]["found"]["arms"].values())
    text = (tmp_path / PAGE).read_text()
    assert ON_CPU in text.splitlines()[0]
    assert "Not asked for: deterministic, kill," in text
    # it is there to be sent on
    for path in (tmp_path, ROOT, ROOT.parent, Path(tempfile.gettempdir())):
        assert str(path) not in (tmp_path / JSON).read_text()


@pytest.mark.slow
def test_the_whole_of_it_runs_on_the_cpu(tmp_path: Path) -> None:
    done = command("--cpu", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads((tmp_path / JSON).read_text())
    assert list(whole["parts"]) == list(PARTS)
    assert whole["parts"]["kill"]["found"]["killed"]
    assert whole["parts"]["devices"]["found"]["count"] == 2
