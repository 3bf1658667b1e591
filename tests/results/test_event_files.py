"""What TensorBoard reads from a result's event file: by its own reader, and by its server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.util import tensor_util

from job.manifest import Epoch, Result
from job.results.event_files import write
from tests.support import small_runs
from tests.support.servers import free_port

STARTED = 1_700_000_000.0
HPARAMS: dict[str, bool | int | float | str] = {
    "arm": "fine_tune",
    "train_fraction": 0.1,
    "seed": 3,
    "deterministic": True,
}
HISTORY = [
    Epoch(
        epoch=number,
        phase="head" if number < 3 else "tail",
        train_loss=1 / number,
        train_accuracy=1 - 0.1 / number,
        validation_loss=1.1 / number,
        validation_accuracy=1 - 0.2 / number,
        seconds=2.5,
    )
    for number in (1, 2, 3, 4)
]
TAGS = {"loss/train", "loss/validation", "accuracy/train", "accuracy/validation", "phase"}


def finished(**changes: Any) -> Result:
    record = small_runs.manifest([], results=[small_runs.manifest([]).results[0].model_dump() | changes])
    return record.results[0]


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def scalars(found: EventAccumulator) -> dict[str, list[tuple[int, float, float]]]:
    """Return step, wall time and value of each scalar."""
    return {
        tag: [
            (each.step, each.wall_time, tensor_util.make_ndarray(each.tensor_proto).item())
            for each in found.Tensors(tag)
        ]
        for tag in found.Tags()["tensors"]
        if found.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
    }


def hparams(found: EventAccumulator, tag: str) -> bytes:
    content: bytes = found.SummaryMetadata(tag).plugin_data.content
    return content


def test_every_epoch_is_there_with_its_step_its_time_and_the_numbers_of_the_record(tmp_path: Path) -> None:
    write(tmp_path, "fine_tune", HPARAMS, HISTORY, STARTED)
    found = scalars(read(tmp_path))
    assert set(found) == TAGS
    for tag in TAGS - {"phase"}:
        quantity, split = tag.split("/")
        values = [getattr(epoch, f"{split}_{quantity}") for epoch in HISTORY]
        expected = [(i + 1, STARTED + 2.5 * (i + 1), float(np.float32(value))) for i, value in enumerate(values)]
        assert found[tag] == expected
    assert [value for _, _, value in found["phase"]] == [1, 1, 2, 2]


def test_the_settings_are_hparams_of_their_types_and_an_unfinished_session_has_no_end(tmp_path: Path) -> None:
    write(tmp_path, "fine_tune/seed-3", HPARAMS, HISTORY[:1], STARTED)
    found = read(tmp_path)
    start = metadata.parse_session_start_info_plugin_data(hparams(found, metadata.SESSION_START_INFO_TAG))
    assert start.group_name == "fine_tune/seed-3"
    assert start.start_time_secs == STARTED
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert values == HPARAMS
    assert values["deterministic"] is True
    assert metadata.SESSION_END_INFO_TAG not in found.Tags()["tensors"]


def test_a_finished_result_brings_its_final_figures_and_a_successful_end(tmp_path: Path) -> None:
    result = finished(cost=0.25, energy_joules=1200.0)
    write(tmp_path, "fine_tune", HPARAMS, HISTORY, STARTED, result)
    found = read(tmp_path)
    test = result.metrics.test
    expected = {
        "test/accuracy": test.accuracy,
        "test/loss": test.loss,
        "test/auc": test.auc,
        "test/calibration_error": test.calibration_error,
        "train_examples": 30,
        "examples_per_second": 10.0,
        "energy_joules": 1200.0,
        "cost": 0.25,
        **{f"seconds/{name}": 1.0 for name in ("data", "features", "training", "evaluation", "export", "total")},
    }
    final = {tag: values for tag, values in scalars(found).items() if tag not in TAGS}
    assert final == {tag: [(4, STARTED + 10, float(np.float32(value)))] for tag, value in expected.items()}
    metrics = {name for name, value in test.model_dump().items() if isinstance(value, float)}
    assert {tag.removeprefix("test/") for tag in final if tag.startswith("test/")} == metrics
    end = metadata.parse_session_end_info_plugin_data(hparams(found, metadata.SESSION_END_INFO_TAG))
    assert (end.status, end.end_time_secs) == (api_pb2.STATUS_SUCCESS, STARTED + 10)


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    metrics = small_runs.metrics(12, 11)
    result = finished(metrics=dict.fromkeys(("train", "validation", "test"), metrics | {"auc": None}))
    write(tmp_path, "frozen", HPARAMS, [], STARTED, result)
    found = set(scalars(read(tmp_path)))
    assert "test/accuracy" in found
    assert not found & {"test/auc", "cost", "energy_joules"}


def test_train_and_validation_share_a_chart(tmp_path: Path) -> None:
    write(tmp_path, "frozen", HPARAMS, HISTORY, STARTED)
    (event,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(event.tensor_proto).item())
    (category,) = layout.category
    assert {chart.title: list(chart.multiline.tag) for chart in category.chart} == {
        "loss": ["^loss/train$", "^loss/validation$"],
        "accuracy": ["^accuracy/train$", "^accuracy/validation$"],
    }


def test_writing_again_leaves_one_file_and_doubles_nothing(tmp_path: Path) -> None:
    one = write(tmp_path, "frozen", HPARAMS, HISTORY[:2], STARTED)
    again = write(tmp_path, "frozen", HPARAMS, HISTORY, STARTED + 60, finished())
    assert list(tmp_path.iterdir()) == [one] == [again]
    assert {len(values) for tag, values in scalars(read(tmp_path)).items() if tag in TAGS} == {4}


def test_a_reader_of_the_file_goes_on_where_it_was_when_epochs_are_added(tmp_path: Path) -> None:
    path = write(tmp_path, "frozen", HPARAMS, HISTORY[:1], STARTED)
    before, loader = path.read_bytes(), EventFileLoader(str(path))
    first = list(loader.Load())
    write(tmp_path, "frozen", HPARAMS, HISTORY, STARTED, finished())
    assert path.read_bytes().startswith(before)
    assert [event.step for event in first] == [0, 0, 0, 1]
    assert [event.step for event in loader.Load()] == [2, 3, 4, 4, 0]


def test_the_file_depends_on_the_arguments_alone(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        path = write(tmp_path / name, "frozen", dict(reversed(HPARAMS.items())) if files else HPARAMS, HISTORY, STARTED)
        files.append((path.name, path.read_bytes()))
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Callable[..., Any]]]:
    """A folder of results that a TensorBoard serves, and what asks it."""
    logs = tmp_path_factory.mktemp("logs")
    for seed, figures in ((0, finished(cost=0.5)), (1, finished(cost=0.25))):
        write(logs / f"frozen/seed-{seed}", f"frozen/seed-{seed}", HPARAMS | {"seed": seed}, HISTORY, STARTED, figures)
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logs, "--port", str(port), "--host", "127.0.0.1"]
    with (logs.parent / "tensorboard.log").open("wb") as log:
        server = subprocess.Popen([*command, "--reload_interval", "1"], stdout=log, stderr=log)

    def ask(path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        url = f"http://127.0.0.1:{port}/data/{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
            return json.load(answer)

    def up() -> bool:
        try:
            return len(ask("runs")) == 2
        except urllib.error.URLError:
            assert server.poll() is None, (logs.parent / "tensorboard.log").read_text()
            return False

    try:
        wait_for(up)
        yield logs, ask
    finally:
        server.terminate()
        server.wait()


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not done():
        assert time.monotonic() < end, "TensorBoard did not get there within two minutes"
        time.sleep(0.5)


@pytest.mark.slow
def test_the_server_serves_runs_curves_and_hparams(board: tuple[Path, Callable[..., Any]]) -> None:
    _, ask = board
    assert sorted(ask("runs")) == ["frozen/seed-0", "frozen/seed-1"]
    curve = ask("plugin/scalars/scalars", run="frozen/seed-0", tag="loss/validation")
    assert [(step, value) for _, step, value in curve] == [
        (epoch.epoch, pytest.approx(epoch.validation_loss)) for epoch in HISTORY
    ]
    (category,) = ask("plugin/custom_scalars/layout")["category"]
    assert [chart["title"] for chart in category["chart"]] == ["loss", "accuracy"]
    drawn = ask("plugin/custom_scalars/scalars", run="frozen/seed-0", tag="^loss/train$")
    assert len(drawn["tag_to_events"]["loss/train"]) == 4
    experiment = ask("plugin/hparams/experiment", {})
    assert {each["name"] for each in experiment["hparamInfos"]} >= {"seed"}
    metrics = [each["name"] for each in experiment["metricInfos"]]
    assert {each["tag"] for each in metrics} >= {"test/accuracy", "cost", "loss/validation"}
    groups = ask(
        "plugin/hparams/session_groups",
        {
            "startIndex": 0,
            "sliceSize": 10,
            "allowedStatuses": ["STATUS_SUCCESS"],
            "colParams": [{"metric": name} for name in metrics],
        },
    )["sessionGroups"]
    assert [group["name"] for group in groups] == ["frozen/seed-0", "frozen/seed-1"]
    assert [group["hparams"]["seed"] for group in groups] == [0, 1]
    costs = [{v["name"]["tag"]: v["value"] for v in group["metricValues"]}["cost"] for group in groups]
    assert costs == [0.5, 0.25]


@pytest.mark.slow
def test_the_server_shows_epochs_that_are_added_while_it_runs(board: tuple[Path, Callable[..., Any]]) -> None:
    logs, ask = board
    write(logs / "live", "live", HPARAMS, HISTORY[:2], STARTED)

    def seen(count: int) -> Callable[[], bool]:
        def enough() -> bool:
            try:
                return len(ask("plugin/scalars/scalars", run="live", tag="loss/train")) == count
            except urllib.error.HTTPError:
                return False

        return enough

    wait_for(seen(2))
    write(logs / "live", "live", HPARAMS, HISTORY, STARTED)
    wait_for(seen(4))
