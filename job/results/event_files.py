"""Training as TensorBoard reads it: one event file for each result, made from the published records."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2, summary_v2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

from job import manifest

_FORMAT = "brain.Event:2"
# As in every file so far: one that a run goes on with begins with the bytes that it had before.
_WRITER = "job.event_files"
# TensorBoard looks for "tfevents" in the name; the first number is usually a time, which would differ every time.
_NAME = "events.out.tfevents.0.result"
_CHARTS = {"loss": ("loss/train", "loss/validation"), "accuracy": ("accuracy/train", "accuracy/validation")}


def write(
    folder: Path,
    result_name: str,
    hparams: Mapping[str, bool | int | float | str],
    history: Sequence[manifest.Epoch],
    started: float,
    result: manifest.Result | None = None,
) -> Path:
    """Write what is known of a result to its one event file in ``folder``, and return the file.

    The file depends on the arguments alone, and has the same name every time: writing it again replaces it. A later
    one, with more epochs or with the result, begins with the bytes of the earlier, so that a TensorBoard that has read
    those goes on behind them.

    Scalars by epoch (step is the epoch's number, its time ``started`` and the seconds so far): ``loss/train``,
    ``loss/validation``, ``accuracy/train``, ``accuracy/validation``, and ``phase``, counted from 1, whose steps show
    where other variables begin to train. The tab Custom Scalars has train and validation in one chart. The final
    figures have the last epoch as their step: ``test/accuracy``, ``test/loss``, ``test/auc``,
    ``test/calibration_error``, ``train_examples``, ``examples_per_second``, ``seconds/...``, and, where they are known,
    ``energy_joules`` and ``cost``. All are metrics of the tab HParams. Scalars are float32, as TensorBoard keeps them.

    Args:
        folder: is made if need be; it is the run's name in TensorBoard, so each result wants one of its own.
        result_name: names the result among the sessions of HParams.
        hparams: settings that decide the result.
        history: the epochs so far.
        started: when training began, seconds since the epoch of Unix.
        result: the finished result, where it is finished; its session is then marked successful.

    Raises:
        OSError: the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _NAME
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in _events(result_name, hparams, history, started, result):
        writer.write(event.SerializeToString(deterministic=True))
    path.write_bytes(buffer.getvalue())
    return path


def _events(
    result_name: str,
    hparams: Mapping[str, bool | int | float | str],
    history: Sequence[manifest.Epoch],
    started: float,
    result: manifest.Result | None,
) -> Iterator[Event]:
    yield Event(wall_time=started, file_version=_FORMAT, source_metadata=SourceMetadata(writer=_WRITER))
    yield Event(wall_time=started, summary=summary_v2.hparams_pb(dict(hparams), result_name, started))
    yield Event(wall_time=started, summary=_layout())
    now, phases = started, list(dict.fromkeys(epoch.phase for epoch in history))
    for epoch in history:
        now += epoch.seconds
        scalars = {
            "loss/train": epoch.train_loss,
            "loss/validation": epoch.validation_loss,
            "accuracy/train": epoch.train_accuracy,
            "accuracy/validation": epoch.validation_accuracy,
            "phase": 1 + phases.index(epoch.phase),
        }
        yield Event(wall_time=now, step=epoch.epoch, summary=_scalars(scalars))
    if result is None:
        return
    last = history[-1].epoch if history else 0
    yield Event(wall_time=now, step=last, summary=_scalars(_final(result)))
    ended = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=now)
    yield Event(
        wall_time=now,
        summary=Summary(
            value=[
                Summary.Value(
                    tag=hparams_metadata.SESSION_END_INFO_TAG,
                    metadata=hparams_metadata.create_summary_metadata(
                        plugin_data_pb2.HParamsPluginData(session_end_info=ended)
                    ),
                    tensor=hparams_metadata.NULL_TENSOR,
                )
            ]
        ),
    )


def _final(result: manifest.Result) -> dict[str, float]:
    test = result.metrics.test
    figures = {
        "test/accuracy": test.accuracy,
        "test/loss": test.loss,
        "test/auc": test.auc,
        "test/calibration_error": test.calibration_error,
        "train_examples": result.train_examples,
        "examples_per_second": result.examples_per_second,
        **{f"seconds/{name}": value for name, value in result.seconds.model_dump().items()},
        "energy_joules": result.energy_joules,
        "cost": result.cost,
    }
    return {tag: value for tag, value in figures.items() if value is not None}


def _scalars(values: Mapping[str, float]) -> Summary:
    about = scalar_metadata.create_summary_metadata(display_name="", description="")
    return Summary(
        value=[
            Summary.Value(tag=tag, metadata=about, tensor=tensor_util.make_tensor_proto(np.float32(value)))
            for tag, value in values.items()
        ]
    )


def _layout() -> Summary:
    """Return the charts of Custom Scalars: what one run's curves are compared in."""
    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))
        for title, tags in _CHARTS.items()
    ]
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title="train and validation", chart=charts)])
    value = Summary.Value(
        tag=layout_metadata.CONFIG_SUMMARY_TAG,
        metadata=layout_metadata.create_summary_metadata(),
        tensor=tensor_util.make_tensor_proto(layout.SerializeToString(), shape=()),
    )
    return Summary(value=[value])
