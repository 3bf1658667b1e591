"""Passes without gradients over any number of rows, in batches of one shape."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.data.rows import Rows, RowValues
from job.machine.replicas import Function, Replicas
from job.models.classifier import Classifier, Cut
from job.stopping import stop_if_asked

# Rows depend on their companions by rounding at most, so inference may use any batch but one (see ``in_batches``).
INFERENCE_BATCH = 32
# On a GPU, which 32 photos are too few to fill: of 160 px, or of rows with as many values; of larger ones fewer.
_ON_GPU = 256
_VALUES_ON_GPU = _ON_GPU * 160 * 160 * 3
# While one batch is read and handed over, another computes: 1.1 to 1.2 times as many images a second on two cores.
IN_FLIGHT = 2


def inference_batch(shape: Sequence[int], *, gpu: bool | None = None) -> int:
    """Return how many rows of ``shape`` inference takes at once: on a CPU always as many, on a GPU a power of two.

    gpu: whether it runs on one; None asks TensorFlow.
    """
    if not (bool(tf.config.list_logical_devices("GPU")) if gpu is None else gpu):
        return INFERENCE_BATCH
    fitting = max(1, _VALUES_ON_GPU // math.prod(shape))
    return min(_ON_GPU, max(INFERENCE_BATCH, 1 << (fitting.bit_length() - 1)))


def in_batches(
    function: Function,
    values: RowValues,
    index: npt.NDArray[np.int64] | None = None,
    replicas: Replicas | None = None,
) -> Iterator[list[npt.NDArray[Any]]]:
    """Yield what ``function`` makes of the rows of ``values`` [n, ...], batch after batch: arrays [at most 256, ...].

    The last batch is padded with copies of a row, and the padding's results are dropped: a batch of one takes other
    kernels and differed by 1e-6, so every batch has the same shape.

    index: the rows to take, in this order; all where None. replicas: whose devices of this worker share the batches.
    """
    replicas = replicas or Replicas()
    rows = np.arange(len(values)) if index is None else index
    size = inference_batch(values.shape[1:])
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    groups = [batches[start : start + replicas.local] for start in range(0, len(batches), replicas.local)]

    def compute(group: Sequence[npt.NDArray[np.int64]]) -> list[list[npt.NDArray[Any]]]:
        filled = [*group, *[group[-1]] * (replicas.local - len(group))]
        tensors = [tf.constant(values[np.resize(filled[number], size)]) for number in replicas.on_each_device()]
        results = replicas.each(function, tensors)
        return [
            [np.asarray(each)[: len(chosen)] for each in result] for chosen, result in zip(group, results, strict=False)
        ]

    if groups:
        # the first one in this thread: it may trace, and Keras keeps its state per thread
        yield from compute(groups[0])
    waiting: deque[Future[list[list[npt.NDArray[Any]]]]] = deque()
    with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="inference") as pool:
        for group in groups[1:]:
            waiting.append(pool.submit(compute, group))
            if len(waiting) > IN_FLIGHT:
                stop_if_asked()
                yield from waiting.popleft().result()
        for future in waiting:
            stop_if_asked()
            yield from future.result()


def run_over(
    function: Callable[[tf.Tensor], tf.Tensor],
    values: RowValues,
    index: npt.NDArray[np.int64] | None = None,
    replicas: Replicas | None = None,
) -> npt.NDArray[np.float32]:
    """Return ``function`` of every row of ``values`` [n, ...], or of those at ``index``, as float32 [n, ...]."""
    results = [result for (result,) in in_batches(function, values, index, replicas)]
    if not results:
        raise ValueError("no rows were given")
    return np.concatenate(results).astype(np.float32, copy=False)


def logits_of(
    classifier: Classifier, cut: Cut, rows: Rows, index: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.float32]:
    """Return the logits float32 [n, classes] of all ``rows``, or of those at ``index`` (int64 [n]), in inference mode.

    Every worker computes those of the rows that it holds, and gets those of the others from them. All call it.
    """
    chosen = np.arange(len(rows)) if index is None else index
    replicas, inference = classifier.replicas, classifier.inference(cut)
    mine = rows.positions(chosen)
    own = run_over(inference, rows.values, mine, replicas) if len(mine) else np.empty(0, np.float32)
    if rows.placement is None:
        return own
    parts = [np.frombuffer(part, np.float32) for part in replicas.gather(own.tobytes())]
    logits = np.empty((len(chosen), sum(map(len, parts)) // len(chosen)), np.float32)
    for worker, part in enumerate(parts):
        logits[rows.placement.holders[chosen] == worker] = part.reshape(-1, logits.shape[1])
    return logits
