"""The same photo in more than one split: byte for byte, or encoded anew.

A photo is compared as a thumbnail: the mean brightness in 12 x 12 cells of its row. Two are the same photo where, made
equally bright and sharp, the thumbnails differ by at most 4% of their contrast, and what lies within the cells agrees.

Found are other JPEG qualities, other formats, other sizes. Not found, by design: crops, mirror images, changed colours
or contrast, words laid over a photo, and what is worse than JPEG 30. Photos with next to no contrast are compared byte
for byte only.

``python -m tests.measure.near_duplicates`` measured how far copies lie apart, and how near different photos come:
docs/statistics.md has its figures. The nearest different ones, solar cells from neighbouring wafers, are 4.9% off.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from job import manifest
from job.data.rows import Rows
from job.machine.replicas import Replicas
from job.stopping import stop_if_asked

# Cells along a side of a thumbnail. At 16, photos halved to JPEG 50 are 5.3% off, as far as different ones.
_CELLS = 12
# Within a cell, this many parts along a side at most.
_PARTS = 4
_DIFFERENCE = 0.040
# Correlation of what lies within the cells.
_DETAIL = 0.7
# Correlation of thumbnails from which on a pair is looked at closely.
_CANDIDATE = 0.99
# Standard deviation of a thumbnail, in grey levels: below it, the noise of an encoder is all that is left to compare.
_CONTRAST = 1.0
# Of each photo, this many of the most similar in a block are looked at, and the first: enough to find its group, and a
# bound where a data set consists of little else than copies.
_CLOSEST = 8
_LISTED = 1000
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Means are exchanged and compared in 256ths of a grey level, so that they are the same whoever computed them.
_STEPS = 256
_READ = 256  # rows at a time
_BLOCK = (1024, 8192)  # thumbnails compared at a time: 32 MB of correlations
_PAIRS = 2048  # looked at closely at a time

_Numbers = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Found:
    """The photos that lie in more than one split.

    count: distinct photos. listed: the first 1,000 of them with all their examples, in the order of the splits.
    """

    count: int
    listed: tuple[manifest.Duplicate, ...]


def find(pixels: Mapping[str, Rows], replicas: Replicas) -> Found:
    """Find the photos of which more than one split has an example: exact copies, and ones encoded anew.

    Every example of a split is compared with all of the other splits: 144 multiplications and additions for each pair,
    1.4e11 for 10,000 test and 100,000 training photos. Memory is 1.5 KB for each example and 200 MB beside. Where more
    than 8 of a block of 8,192 examples look like a photo, the most similar 8 are taken, and the first.

    All workers call it, and all get the same. Each makes the thumbnails of the rows that it holds and compares a part
    of them; what is exchanged is 288 bytes for each example, and 4.6 KB for each one that looks like another.

    Args:
        pixels: the rows of each split, values uint8 [n, size, size, 3].
        replicas: the workers.

    Raises:
        Stopped: the process is asked to stop.
    """
    splits = _Splits(pixels, replicas)
    pairs = np.concatenate([splits.exact(), splits.alike()])
    spanning = [group for group in _groups(len(splits.names), pairs) if len(np.unique(splits.split_of[group])) > 1]
    return Found(len(spanning), tuple(splits.record(group) for group in spanning[:_LISTED]))


def cell_means(pixels: npt.NDArray[np.uint8], cells: int) -> npt.NDArray[np.uint16]:
    """Return the mean brightness (luma of BT.601) in ``cells`` x ``cells`` parts of each photo, in 256ths of a level.

    Args:
        pixels: uint8 [n, size, size, 3].
        cells: along a side; they need not divide the size.

    Returns:
        uint16 [n, cells, cells].
    """
    size = pixels.shape[1]
    edges = np.linspace(0, size, cells + 1)
    overlap = np.minimum(edges[1:, None], np.arange(1, size + 1)) - np.maximum(edges[:-1, None], np.arange(size))
    share = (np.maximum(overlap, 0) * cells / size).astype(np.float32)
    means = share @ (pixels.astype(np.float32) @ _LUMA) @ share.T
    return np.asarray(np.rint(_STEPS * means), np.uint16)


def differences(one: _Floats, other: _Floats) -> _Floats:
    """Return by how much thumbnails differ that are made equally bright and sharp, as a share of their contrast.

    A photo that was made smaller is blurred, to first order by a part of its second derivative, which may differ along
    the sides. Least squares find both parts.

    Args:
        one: float32 [k, cells, cells].
        other: likewise.

    Returns:
        float32 [k]: the standard deviation of what is left, divided by the smaller one of the thumbnails' own.
    """
    edged: _Floats = np.pad((one + other) / 2, ((0, 0), (1, 1), (1, 1)), mode="edge")
    blurs = (np.diff(edged[:, :, 1:-1], 2, axis=1), np.diff(edged[:, 1:-1], 2, axis=2))
    down, across, left = (_centred(each) for each in (*blurs, one - other))
    dd, da, aa = (np.einsum("ij,ij->i", *each) for each in ((down, down), (down, across), (across, across)))
    dl, al = (np.einsum("ij,ij->i", each, left) for each in (down, across))
    determinant = np.maximum(dd * aa - da * da, np.finfo(np.float32).tiny)
    left -= ((aa * dl - da * al) / determinant)[:, None] * down + ((dd * al - da * dl) / determinant)[:, None] * across
    contrast = np.minimum(_centred(one).std(axis=1), _centred(other).std(axis=1))
    return np.asarray(left.std(axis=1) / contrast)


def _centred(values: _Floats) -> _Floats:
    """Return [k, ...] as [k, m], less the mean of each."""
    flat = values.reshape(len(values), -1)
    return np.asarray(flat - flat.mean(axis=1, keepdims=True))


class _Splits:
    """The examples of all splits, numbered through: those of the first split, then those of the second, and so on."""

    def __init__(self, pixels: Mapping[str, Rows], replicas: Replicas) -> None:
        self._replicas = replicas
        self._rows = tuple(pixels.values())
        sizes = [len(rows) for rows in self._rows]
        self._starts = [0, *itertools.accumulate(sizes)]
        self.names = [(split, example) for split, rows in pixels.items() for example in rows.ids]
        self.split_of = np.repeat(np.arange(len(sizes)), sizes)
        self._digests = [digest for rows in self._rows for digest in rows.digests]

    def exact(self) -> _Numbers:
        """Return pairs, int64 [k, 2], that connect all examples with the same digest."""
        first: dict[bytes, int] = {}
        firsts = np.array([first.setdefault(digest, i) for i, digest in enumerate(self._digests)], np.int64)
        pairs = np.stack([firsts, np.arange(len(firsts))], axis=1)
        return pairs[firsts < pairs[:, 1]]

    def alike(self) -> _Numbers:
        """Return pairs, int64 [k, 2], of examples of different splits that show the same photo."""
        thumbnails = self._means(np.arange(len(self.names)), _CELLS)
        contrast = _centred(thumbnails).std(axis=1)
        # of copies in a split one is enough: the others are connected with it
        firsts: dict[tuple[int, bytes], int] = {}
        for i, key in enumerate(zip(self.split_of.tolist(), self._digests, strict=True)):
            firsts.setdefault(key, i)
        chosen = np.array([i for i in firsts.values() if contrast[i] >= _CONTRAST], np.int64)
        of_splits = [chosen[self.split_of[chosen] == split] for split in range(len(self._rows))]
        found = [np.empty((0, 2), np.int64)]
        for number, (some, others) in enumerate(_blocks(of_splits)):
            if number % self._replicas.workers == self._replicas.worker:
                stop_if_asked()
                found.extend(_similar(thumbnails, some, others))
        told = b"".join(self._replicas.gather(np.concatenate(found).tobytes()))
        pairs = np.unique(np.frombuffer(told, np.int64).reshape(-1, 2), axis=0)
        return np.concatenate([found[0], *(part[self._agrees(part)] for part in _parts(pairs, _PAIRS))])

    def _agrees(self, pairs: _Numbers) -> npt.NDArray[np.bool_]:
        """Return of which of ``pairs`` [k, 2] what lies within the cells agrees too, bool [k]. All workers call it."""
        stop_if_asked()
        examples = np.unique(pairs)
        parts = max(1, min(_PARTS, self._rows[0].values.shape[1] // _CELLS))
        means = self._means(examples, _CELLS * parts).reshape(-1, _CELLS, parts, _CELLS, parts)
        detail = (means - means.mean((2, 4), keepdims=True)).reshape(len(examples), -1)
        one, other = (detail[np.searchsorted(examples, side)] for side in pairs.T)
        product, ones, others = (np.einsum("ij,ij->i", *each) for each in ((one, other), (one, one), (other, other)))
        return np.asarray(product >= _DETAIL * np.sqrt(ones * others))

    def _means(self, examples: _Numbers, cells: int) -> _Floats:
        """Return the mean brightness in cells of ``examples`` (ascending), in levels, float32 [k, cells, cells].

        They are computed where the rows are held. All workers call it.
        """
        means = []
        for rows, start, end in zip(self._rows, self._starts, self._starts[1:], strict=False):
            index = examples[(start <= examples) & (examples < end)] - start
            own = [cell_means(rows.values[part], cells).tobytes() for part in _parts(rows.positions(index), _READ)]
            shape = (-1, cells, cells)
            if rows.placement is None:
                means.append(np.frombuffer(b"".join(own), np.uint16).reshape(shape))
                continue
            told = np.empty((len(index), cells, cells), np.uint16)
            for worker, theirs in enumerate(self._replicas.gather(b"".join(own))):
                told[rows.placement.holders[index] == worker] = np.frombuffer(theirs, np.uint16).reshape(shape)
            means.append(told)
        return np.concatenate(means).astype(np.float32) / np.float32(_STEPS)

    def record(self, group: _Numbers) -> manifest.Duplicate:
        """Return what is published of a group of examples."""
        names = [self.names[i] for i in group]
        return manifest.Duplicate(
            kind="exact" if len({self._digests[i] for i in group}) == 1 else "near",
            examples=tuple(manifest.Example.model_validate({"split": s, "example_id": e}) for s, e in names),
        )


def _parts(values: _Numbers, size: int) -> Iterator[_Numbers]:
    """Yield ``values`` in parts of at most ``size``, and so that a request to stop is heeded between them."""
    for start in range(0, len(values), size):
        stop_if_asked()
        yield values[start : start + size]


def _blocks(splits: Sequence[_Numbers]) -> Iterator[tuple[_Numbers, _Numbers]]:
    """Yield all examples of each two splits, some against some."""
    for one, other in itertools.combinations(sorted(splits, key=len), 2):
        yield from itertools.product(_parts(one, _BLOCK[0]), _parts(other, _BLOCK[1]))


def _similar(thumbnails: _Floats, some: _Numbers, others: _Numbers) -> Iterator[_Numbers]:
    """Yield pairs, int64 [k, 2], of one of ``some`` and one of ``others`` whose thumbnails agree; the lower first."""
    correlations = _unit(thumbnails[some]) @ _unit(thumbnails[others]).T
    close = correlations >= _CANDIDATE
    crowded = np.flatnonzero(close.sum(axis=1) > _CLOSEST)
    if len(crowded):
        alike = close[crowded]
        closest = np.argpartition(-correlations[crowded], _CLOSEST, axis=1)[:, :_CLOSEST]
        close[crowded] = False
        close[crowded[:, None], closest] = True
        # Of many copies, rounding decides which are closest, so they fell apart into groups, on some CPUs. The first
        # that looks alike is the same for all of them: with it, on either side, they hang together.
        columns = np.flatnonzero(alike.any(axis=0))
        close[crowded, alike.argmax(axis=1)] = True
        close[crowded[alike[:, columns].argmax(axis=0)], columns] = True
    rows, columns = np.nonzero(close)
    for part in _parts(np.sort(np.stack([some[rows], others[columns]], axis=1), axis=1), _PAIRS):
        yield part[differences(thumbnails[part[:, 0]], thumbnails[part[:, 1]]) <= _DIFFERENCE]


def _unit(thumbnails: _Floats) -> _Floats:
    centred = _centred(thumbnails)
    return np.asarray(centred / np.linalg.norm(centred, axis=1, keepdims=True))


def _groups(count: int, pairs: _Numbers) -> list[_Numbers]:
    """Return the groups of two and more among ``count`` examples that ``pairs`` [k, 2] connect.

    Each is ascending, and they are in the order of their first members.
    """
    links = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), (count, count))
    labels = connected_components(links, directed=False)[1]
    members = np.argsort(labels, kind="stable")
    groups = np.split(members, np.flatnonzero(np.diff(labels[members])) + 1)
    return sorted((group for group in groups if len(group) > 1), key=lambda group: int(group[0]))
