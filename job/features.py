"""Frozen layers run once: rows of what the trunk makes of a split, kept on local disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.console import Console
from job.model import PIXELS, POOLED, Cut
from job.rows import Rows
from job.runtime import stop_if_asked

logger = logging.getLogger(__name__)

# Rows do not depend on their companions, so inference may use any batch but one (see ``run_over``).
INFERENCE_BATCH = 64
VARIANCE_FLOOR = 0.1


def run_over(
    function: Callable[[tf.Tensor], tf.Tensor],
    values: npt.NDArray[np.generic],
    *,
    index: npt.NDArray[np.int64] | None = None,
    out: npt.NDArray[np.float32] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> npt.NDArray[np.float32]:
    """Return ``function`` of every row of ``values`` [n, ...] as float32 [n, ...].

    The last batch is padded with copies of a row, and the padding's results are dropped: a batch of one takes other
    kernels and differed by 1e-6, so every batch has the same shape.

    index: the rows to take, in this order; all where None. out: where results are written, an array is made where
    None. advance: called with the number of rows done after each batch.
    """
    rows = np.arange(len(values)) if index is None else index
    for start in range(0, len(rows), INFERENCE_BATCH):
        chosen = rows[start : start + INFERENCE_BATCH]
        padded = np.resize(chosen, INFERENCE_BATCH)
        stop_if_asked()
        result = np.asarray(function(tf.constant(values[padded])), np.float32)[: len(chosen)]
        if out is None:
            out = np.empty((len(rows), *result.shape[1:]), np.float32)
        out[start : start + len(chosen)] = result
        advance(len(chosen))
    if out is None:
        raise ValueError("no rows were given")
    return out


class Features:
    """The rows of one pretrained backbone at its cuts, each made at first use from the nearest rows before it."""

    def __init__(self, pixels: Mapping[str, Rows], folder: Path, console: Console) -> None:
        """Take the decoded splits (values uint8 [n, size, size, 3]) and a folder on local disk."""
        self._rows = {(PIXELS, split): rows for split, rows in pixels.items()}
        self._folder = folder
        self._console = console

    def rows(self, cut: Cut, split: str, before: Cut | None = None) -> Rows:
        """Return ``split`` at ``cut``. The backbone must hold its pretrained weights at the call that makes them.

        before: an earlier cut of the same backbone. Pooled rows are then made from its rows, so that the layers
        before it run once for both.
        """
        key = (cut.name, split)
        if key not in self._rows:
            self._rows[key] = self._make(cut, split, before)
        return self._rows[key]

    def _make(self, cut: Cut, split: str, before: Cut | None) -> Rows:
        if cut.trunk is None:
            raise ValueError(f"{cut.name} rows are decoded, not made")
        source = self.rows(before, split) if before is not None else self._rows[PIXELS, split]
        if before is not None and before.name != PIXELS:
            tail = before.tail
            function = tf.function(lambda rows: tail(rows, False), autograph=False)
        else:
            function = tf.function(cut.trunk, autograph=False)
        count = len(source.labels)
        path = self._folder / f"{len(self._rows)}-{split}.npy"
        out = np.lib.format.open_memmap(path, "w+", np.float32, (count, *cut.shape))
        with self._console.bar(f"features {split}", count) as advance:
            run_over(function, source.values, out=out, advance=advance)
        row_bytes = int(np.prod(cut.shape)) * 4
        logger.info(
            "features of %s: %d rows of %d bytes at %s", split, count, row_bytes, cut.name,
            extra={"split": split, "examples": count, "cut": cut.name},
        )  # fmt: skip
        # pooled rows are small and are read in every head epoch: 5 KB each for MobileNetV2
        return replace(source, values=np.array(out) if cut.name == POOLED else out)


def mean_and_deviation(
    values: npt.NDArray[np.floating],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return mean and standard deviation per feature of pooled rows [n, features], both float64 [features].

    A share of the mean variance is added to each feature's own: on the solar cells some features vary a hundredth as
    much as others, and dividing by that makes the logits jump when the layers before them begin to train.
    """
    variance = values.var(axis=0, dtype=np.float64)
    return values.mean(axis=0, dtype=np.float64), np.sqrt(variance + VARIANCE_FLOOR * variance.mean() + 1e-12)
