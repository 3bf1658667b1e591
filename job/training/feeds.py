"""What steps take in: rows, labels and the order of the batches, made ready while the call before computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.data.row_files import RowFile
from job.data.rows import Rows
from job.machine.limits import memory_left
from job.machine.replicas import Replicas
from job.models.classifier import Cut
from job.models.frozen_features import HELD_SHARE

# Rows that are read ahead of a call, at most.
_BYTES_AHEAD = 32 * 2**20
# An arm has two phases at most, with rows of their own.
_PHASES = 2
# Steps that a padded call has room for, at most: their order takes 64 numbers a row of a batch.
_STEPS_PADDED = 64

Index = npt.NDArray[np.int64]


class Feed(NamedTuple):
    """What one replica takes into a call of several steps. All but the rows of feature maps is small.

    rows: [n, ...] as ``packed`` gives them. labels: int64 [n]. order: int64 [steps, most], the rows of each step, as an
    index into ``rows``. places: int64 [steps, most], where in the step's whole batch they stand. weights: float32
    [steps, most], 0 where there is no row, else 1. (Not int32: TensorFlow keeps those on the host.)
    """

    rows: tf.Tensor
    labels: tf.Tensor
    order: tf.Tensor
    places: tf.Tensor
    weights: tf.Tensor


@dataclass(frozen=True)
class Call:
    """Some steps in one call.

    feeds: of each replica of this worker. steps: how many. sizes: float32 [steps or more], examples of each over all
    replicas. images: of all steps. padded: whether the arrays are as large as in every other call, so that what is
    compiled for one shape serves.
    """

    feeds: tuple[Feed, ...]
    steps: int
    sizes: tf.Tensor
    images: int
    padded: bool


def packed(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return rows as steps take them: those of bytes two by two, as float16 [n, half the bytes], others as they are.

    No GPU has a kernel that gathers uint8: 32 photos of 160 px took 7 ms on an H100, by way of the host, and 0.2 ms so.
    """
    if values.dtype != np.uint8:
        return values
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    if flat.shape[1] % 2:
        flat = np.pad(flat, ((0, 0), (0, 1)))
    return np.ascontiguousarray(flat).view(np.float16)


def unpacked(rows: tf.Tensor, cut: Cut) -> tf.Tensor:
    """Return the rows [n, *shape] of ``cut`` that were ``packed``."""
    if cut.dtype != np.uint8:
        return rows
    values = tf.reshape(tf.bitcast(rows, tf.uint8), [-1, 2 * rows.shape[1]])
    return tf.reshape(values[:, : math.prod(cut.shape)], [-1, *cut.shape])


def packed_spec(cut: Cut) -> tf.TensorSpec:
    """Return shape and dtype of packed rows at ``cut``."""
    if cut.dtype != np.uint8:
        return tf.TensorSpec([None, *cut.shape], cut.dtype)
    return tf.TensorSpec([None, -(-math.prod(cut.shape) // 2)], tf.float16)


class Residents:
    """Rows that stay on the devices while steps are taken on them, kept for the next result."""

    def __init__(self, replicas: Replicas, device_bytes: int | None = None) -> None:
        """Take the bytes that rows may take on a device, in all; None where its memory is the process's own."""
        self._replicas = replicas
        self._device_bytes = device_bytes
        self._kept: list[tuple[Rows, list[tuple[tf.Tensor, tf.Tensor]]]] = []

    def of(self, rows: Rows) -> list[tuple[tf.Tensor, tf.Tensor]] | None:
        """Return packed rows and their labels on each device; None where they are read for every call instead."""
        for kept, tensors in self._kept:
            if kept.values is rows.values:
                return tensors
        values = self._loaded(rows)
        if values is None:
            return None
        del self._kept[: 1 - _PHASES]
        labels = rows.labels[rows.in_place()].astype(np.int64)
        tensors = [
            (tf.identity(tf.constant(packed(values))), tf.identity(tf.constant(labels)))
            for _ in self._replicas.on_each_device()
        ]
        self._kept.append((rows, tensors))
        return tensors

    def _loaded(self, rows: Rows) -> npt.NDArray[Any] | None:
        values = rows.values
        if self._device_bytes is None:
            return values if isinstance(values, np.ndarray) else None
        if not isinstance(values, np.ndarray | RowFile) or values.nbytes > self._device_bytes // _PHASES:
            return None
        if isinstance(values, np.ndarray):
            return values
        return values.load() if values.nbytes <= memory_left() // HELD_SHARE else None


class Feeder:
    """Makes the calls of one phase of one result."""

    def __init__(
        self, cut: Cut, rows: Rows, batch_size: int, replicas: Replicas, residents: Residents, most_steps: int
    ) -> None:
        """Take the rows that steps are taken on, at ``cut``. most_steps: of a call, where nothing else bounds it."""
        self._cut = cut
        self._rows = rows
        self._batch_size = batch_size
        self._replicas = replicas
        self._labels = rows.labels[rows.in_place()].astype(np.int64)
        self._resident = residents.of(rows)
        ahead = max(1, _BYTES_AHEAD // (cut.row_bytes * batch_size))
        self.most_steps = most_steps if self._resident else ahead
        self._room = _STEPS_PADDED if self._resident else min(_STEPS_PADDED, ahead)

    def calls(self, order: Index, next_steps: Callable[[], tuple[int, bool]]) -> Iterator[Call]:
        """Yield the calls that step over ``order`` (int64 [n], of rows) once.

        What a call takes is read while the call before computes.

        next_steps: returns how many steps the next call should have, and whether it is to be padded.
        """
        batches = self._batches(order, next_steps)
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
            ahead = next(batches, None)
            future = None if ahead is None else reader.submit(self.read, *ahead)
            while future is not None:
                call = future.result()
                ahead = next(batches, None)
                future = None if ahead is None else reader.submit(self.read, *ahead)
                yield call

    def _batches(self, order: Index, next_steps: Callable[[], tuple[int, bool]]) -> Iterator[tuple[list[Index], bool]]:
        size = self._batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        at = 0
        while at < len(batches):
            steps, padded = next_steps()
            steps = min(steps, self._room) if padded else steps
            call = batches[at : at + steps]
            if not padded and len(call) > 1 and len(call[-1]) < size:
                call.pop()  # the last, smaller batch has a call of its own
            at += len(call)
            yield call, padded

    def read(self, batches: list[Index], padded: bool = False) -> Call:
        """Return the call that takes a step on each of ``batches``, of all workers, with what this worker holds."""
        sizes = [len(batch) for batch in batches]
        local, room = self._replicas.local, self._room if padded else len(batches)
        feeds = []
        for number in self._replicas.on_each_device():
            places_of = [self._places(batch, number) for batch in batches]
            counts = np.array([len(places) for places in places_of])
            position = self._rows.positions(
                np.concatenate([batch[places] for batch, places in zip(batches, places_of, strict=True)])
            )
            most = -(-self._batch_size // local) if padded else max(1, counts.max())
            order, places = np.zeros((2, room, most), np.int64)
            filled = np.arange(most) < np.resize(counts, room)[:, None]
            filled[len(batches) :] = False
            order[filled] = position if self._resident else np.arange(len(position))
            places[filled] = np.concatenate(places_of)
            rows, labels = self._values(number, position, room * most if padded else max(1, len(position)))
            feeds.append(Feed(rows, labels, tf.constant(order), tf.constant(places), tf.constant(filled, tf.float32)))
        numbers = np.zeros(room, np.float32)
        numbers[: len(sizes)] = sizes
        return Call(tuple(feeds), len(batches), tf.constant(numbers), sum(sizes), padded)

    def _places(self, batch: Index, number: int) -> Index:
        """Return which places of a batch replica ``number`` of this worker takes, of those that the worker holds."""
        if self._replicas.count == 1:
            return np.arange(len(batch))
        return np.array_split(np.flatnonzero(self._rows.held(batch)), self._replicas.local)[number]

    def _values(self, number: int, position: Index, room: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the rows at ``position`` and their labels, and others behind them where there is ``room`` for more."""
        if self._resident:
            return self._resident[number]
        values, labels = packed(self._rows.values[position]), self._labels[position]
        if missing := room - len(position):
            values = np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])
            labels = np.concatenate([labels, np.zeros(missing, np.int64)])
        return tf.constant(values), tf.constant(labels)
