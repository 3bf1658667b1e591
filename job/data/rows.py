"""Examples as rows with ids: one way to decode for training and serving, nested subsets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class RowValues(Protocol):
    """Rows [n, ...] that can be read by index, wherever they lie: an array, a file, or computed when read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the number of rows and the shape of one."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of the values."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, index: npt.NDArray[np.int64] | slice, /) -> npt.NDArray[Any]:
        """Return these rows, in this order, as an array."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the row of each example lies.

    holders: int32 [n], the worker that read it. positions: int64 [n], its row among those of that worker. worker: which
    of them this one is.
    """

    holders: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    worker: int = 0


@dataclass(frozen=True, eq=False)
class Rows:
    """The examples of one split, in the order of the data set's files, whoever read them in whatever order.

    ids: TFDS's id of each example, ``file__index``; unique over all splits of a data set.
    labels: int32 [n], index into the class names.
    values: [m, ...], the pixels (uint8 [m, size, size, 3]) or what was computed from them, of the m examples that this
        worker read; may lie on disk.
    digests: BLAKE2b-128 of each encoded image, 16 bytes each.
    placement: where in ``values`` the examples are; None where the first is the first, and so on.
    """

    ids: tuple[str, ...]
    labels: npt.NDArray[np.int32]
    values: RowValues
    digests: tuple[bytes, ...]
    placement: Placement | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def held(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of the examples at ``index`` (int64 [...]) this worker holds, bool [...]."""
        if self.placement is None:
            return np.ones(index.shape, bool)
        return np.asarray(self.placement.holders[index] == self.placement.worker)

    def positions(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return where in ``values`` those of the examples at ``index`` (int64 [k]) are that this worker holds."""
        return index if self.placement is None else self.placement.positions[index[self.held(index)]]

    def read(self, index: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return the rows of those of the examples at ``index`` (int64 [k]) that this worker holds, in that order."""
        return self.values[self.positions(index)]

    def in_place(self) -> npt.NDArray[np.int64]:
        """Return the examples that this worker holds in the order of ``values``, int64 [m]."""
        if self.placement is None:
            return np.arange(len(self))
        mine = np.flatnonzero(self.placement.holders == self.placement.worker)
        return mine[np.argsort(self.placement.positions[mine])]


def stratified_subset(labels: npt.NDArray[np.integer[Any]], fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Choose a part of the examples in which every class keeps its share.

    Each class is cut on its own from an order that depends on the seed alone, so at one seed the smaller fraction lies
    inside the larger. (Rounding to an exact total would break this: a class could lose an example as the total grows.)

    Args:
        labels: integers [n].
        fraction: more than 0, at most 1.
        seed: not negative.

    Returns:
        int64 indices into ``labels``, ascending; of every class at least one.

    Raises:
        ValueError: the fraction is outside its range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    return np.sort(np.concatenate(list(_class_parts(labels, fraction, seed)))) if len(labels) else np.empty(0, np.int64)


def _class_parts(labels: npt.NDArray[np.integer[Any]], fraction: float, seed: int) -> Iterable[npt.NDArray[np.int64]]:
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).astype(np.int64)
        order = np.random.default_rng([seed, int(label)]).permutation(len(members))
        yield members[order[: max(1, int(fraction * len(members) + 0.5))]]
