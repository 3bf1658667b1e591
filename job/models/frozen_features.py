"""Frozen layers run once: rows of what they make of each split, kept on local disk."""

from __future__ import annotations

import errno
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.arms import Part
from job.data.row_cache import RowCache
from job.data.row_files import RowFile
from job.data.rows import Rows, RowValues
from job.errors import ConfigError
from job.machine.console import Console
from job.machine.limits import memory_left
from job.machine.replicas import Function, Replicas
from job.models.classifier import Classifier, Cut
from job.models.cuts import POOLED
from job.models.inference import in_batches, inference_batch

logger = logging.getLogger(__name__)

VARIANCE_FLOOR = 0.1
# Pooled rows are held in memory where they take at most this part of it.
HELD_SHARE = 8
_WHOLE = "1-of-1"


class Computed:
    """Rows that frozen layers make of the pixels at every reading, as long as nothing is kept."""

    def __init__(self, pixels: RowValues, cut: Cut, function: Function) -> None:
        """Take the pixels and a compiled function to rows at ``cut``."""
        self._pixels = pixels
        self._function = function
        self.shape = (len(pixels), *cut.shape)
        self.dtype = cut.dtype

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, index: npt.NDArray[np.int64] | slice) -> npt.NDArray[Any]:
        """Return the rows at ``index`` (int64 [k]) in that order, computed anew."""
        chosen = np.arange(len(self))[index]
        if not len(chosen):
            return np.empty((0, *self.shape[1:]), self.dtype)
        size = inference_batch(self._pixels.shape[1:])
        return np.concatenate([self._some(chosen[i : i + size]) for i in range(0, len(chosen), size)])

    def _some(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        padded = np.resize(chosen, max(2, len(chosen)))
        return np.asarray(self._function(tf.constant(self._pixels[padded]))[0])[: len(chosen)]


class Features:
    """The rows of one pretrained backbone at its cuts: made in one pass over each split, shared by all results."""

    def __init__(
        self,
        pixels: Mapping[str, Rows],
        parts: Sequence[Part],
        cache: RowCache | None,
        key: Mapping[str, Any],
        console: Console,
        replicas: Replicas | None = None,
    ) -> None:
        """Take the decoded splits (values uint8 [n, size, size, 3]).

        parts: what the run's arms train beside scratch, in order of computation: TAIL before HEAD. cache: where rows
        are kept; None has frozen layers run at every reading. key: what decides rows beside split and cut (plain
        values).
        """
        self._pixels = pixels
        self._parts = tuple(parts)
        self._cache = cache
        self._key = key
        self._console = console
        self._replicas = replicas or Replicas()
        self._rows: dict[tuple[str, str], Rows] = {}
        self._functions: dict[tuple[str, ...], Function] = {}

    def rows(self, classifier: Classifier, part: Part, split: str) -> Rows:
        """Return ``split`` at the cut before ``part``; all splits and parts are made at the first call.

        The backbone must hold its pretrained weights at that call.
        """
        cut = classifier.cut(part)
        if cut.at_pixels:
            return self._pixels[split]
        if not self._rows:
            for name in self._pixels:
                self._make(classifier, name)
        return self._rows[cut.name, split]

    def _make(self, classifier: Classifier, split: str) -> None:
        start = time.perf_counter()
        pixels = self._pixels[split]
        cuts = [cut for part in self._parts if not (cut := classifier.cut(part)).at_pixels]
        if self._cache is None:
            for cut in cuts:
                values = Computed(pixels.values, cut, self._function((cut,)))
                # traced here: training reads in another thread, and Keras keeps its state per thread
                values[np.arange(2)]
                self._rows[cut.name, split] = replace(pixels, values=values)
            return
        keys = {cut.name: self._full_key(cut, split) for cut in cuts}
        found: dict[str, RowFile] = {}
        for cut in cuts:
            if (kept := self._cache.find(_name(keys[cut.name]), keys[cut.name])) is not None:
                found[cut.name] = kept
        missing = [cut for cut in cuts if cut.name not in found]
        if missing:
            found |= self._compute(self._cache, split, missing, keys)
        for cut in cuts:
            self._rows[cut.name, split] = replace(pixels, values=self._placed(cut, found[cut.name]))
        logger.info(
            "features of %s: %d rows at %s, %s, %.1f s", split, len(pixels.values),
            " and ".join(f"{cut.name} ({cut.row_bytes:,} bytes each)" for cut in cuts),
            "computed" if missing else "from the cache", time.perf_counter() - start,
            extra={"split": split, "examples": len(pixels.values), "computed": len(missing) > 0},
        )  # fmt: skip

    def _compute(
        self, cache: RowCache, split: str, cuts: Sequence[Cut], keys: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, RowFile]:
        """Run the frozen layers once over ``split`` and keep what they give at each of ``cuts``."""
        pixels = self._pixels[split]
        function = self._function(tuple(cuts))
        try:
            with ExitStack() as stack:
                writers = []
                for cut in cuts:
                    key = keys[cut.name]
                    making = cache.make(_name(key), key, cut.shape, cut.dtype, len(pixels.values))
                    writers.append(stack.enter_context(making))
                with self._console.bar(f"features {split}", len(pixels.values)) as advance:
                    for results in in_batches(function, pixels.values, None, self._replicas):
                        for writer, result in zip(writers, results, strict=True):
                            writer.write(result)
                        advance(len(results[0]))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError.of(
                "TRANSFER_CACHE_DIR",
                f"the disk ran full while features of {split} were written to {cache.folder}; give a larger one, or "
                "set TRANSFER_FEATURE_CACHE=off",
            ) from error
        return {cut.name: writer.rows for cut, writer in zip(cuts, writers, strict=True)}

    def _function(self, cuts: tuple[Cut, ...]) -> Function:
        """Return the compiled function from pixels to rows at ``cuts``, in which every layer runs once."""
        names = tuple(cut.name for cut in cuts)
        if names not in self._functions:

            def run(pixels: tf.Tensor) -> list[tf.Tensor]:
                first, *later = cuts
                rows = first.trunk(pixels)
                return [rows, *(tf.cast(first.tail(rows, False), cut.dtype) for cut in later)]

            size = next(iter(self._pixels.values())).values.shape[1]
            signature = [tf.TensorSpec([None, size, size, 3], tf.uint8)]
            self._functions[names] = tf.function(run, input_signature=signature, autograph=False)
        return self._functions[names]

    def _full_key(self, cut: Cut, split: str) -> dict[str, Any]:
        rows = self._pixels[split]
        digest = hashlib.sha256()
        for i in rows.in_place():
            digest.update(rows.ids[i].encode() + b"\0" + rows.digests[i])
        return {**self._key, "split": split, "examples": digest.hexdigest(), "cut": cut.name}

    def _placed(self, cut: Cut, rows: RowFile) -> RowValues:
        """Return rows in memory where that pays.

        Pooled rows (5 KB for MobileNetV2) are stepped over in a millisecond, so reading them would show. Rows of
        feature maps stay on disk on a CPU: the page cache holds them if anything can, reading ahead hides the rest,
        and the memory in use does not grow with the photos. (A GPU's step is short enough to want them beside it:
        training puts them there.)
        """
        return rows.load() if cut.name == POOLED and rows.nbytes <= memory_left() // HELD_SHARE else rows


def _name(key: Mapping[str, Any]) -> str:
    named = "-".join(str(key[part]) for part in ("dataset", "split", "backbone", "image_size", "cut"))
    # workers on one machine may share the folder
    return named if key.get("share", _WHOLE) == _WHOLE else f"{named}-{key['share']}"


def mean_and_deviation(
    rows: Rows, index: npt.NDArray[np.int64], replicas: Replicas | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return mean and standard deviation per feature of pooled rows at ``index`` (int64 [n]), both float64 [features].

    A share of the mean variance is added to each feature's own: on the solar cells some features vary a hundredth as
    much as others, and dividing by that makes the logits jump when the layers before them begin to train.

    All workers of ``replicas`` call it, and all get the same.
    """
    values = rows.read(index)
    # in double precision throughout, and without ndarray.var's copy of all rows in it
    sums = np.stack([values.sum(axis=0, dtype=np.float64), np.einsum("ij,ij->j", values, values, dtype=np.float64)])
    parts = (replicas or Replicas()).gather(sums.tobytes())
    mean, squares = np.sum([np.frombuffer(part).reshape(sums.shape) for part in parts], axis=0) / len(index)
    variance = np.maximum(squares - mean**2, 0.0)
    return mean, np.sqrt(variance + VARIANCE_FLOOR * variance.mean() + 1e-12)
