"""HDF5 files of unknown origin, opened only after their headers were looked at: a small file can declare anything.

The library follows links into other files, sets aside the memory that a header asks for, and calls itself for every
group inside a group: 20,000 of them end the process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

# Keras's own files have at most 8 groups inside each other, and some 4,000 objects (NASNetLarge).
_DEEPEST = 32
_MOST_LINKS = 100_000
# Keras splits lists at 64 KiB, as HDF5 stores them: texts of variable length as 16 bytes each. What is no list takes no
# more memory than the file.
_LARGEST_LIST = 2**16


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Yield the file, open for reading, of which nothing but headers was read.

    It has no links that lead out of it and no data that lie elsewhere, is nested as Keras's files are, has attributes
    of a bounded size, and numbers that lie in it as they are. How many it declares is the caller's to look at.

    Raises:
        ValueError: it is not such a file; the text says what it has.
        OSError: it cannot be read, or is damaged; and RuntimeError and KeyError, according to where.
    """
    with h5py.File(path, "r") as file:
        _check(file)
        yield file


def _check(file: Any) -> None:
    waiting = [(file, 0)]
    links = 0
    while waiting:
        group, depth = waiting.pop()
        _check_attributes(group)
        for name in group:
            links += 1
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise ValueError(f"{_place(group, name)} is a link to another place, which Keras does not write")
            if depth == _DEEPEST or links > _MOST_LINKS:
                raise ValueError(f"it has more than {_MOST_LINKS:,} objects, or more than {_DEEPEST} inside each other")
            member = group[name]
            if isinstance(member, h5py.Group):
                waiting.append((member, depth + 1))
            elif isinstance(member, h5py.Dataset):
                _check_dataset(member, _place(group, name))
                _check_attributes(member)


def _check_attributes(member: Any) -> None:
    for name in member.attrs:
        attribute = member.attrs.get_id(name)
        if math.prod(attribute.shape) > 1 and attribute.get_storage_size() > _LARGEST_LIST:
            raise ValueError(f"the list {name!r} of {member.name} is larger than {_LARGEST_LIST:,} bytes")


def _check_dataset(dataset: Any, place: str) -> None:
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"the numbers of {place} lie in another file")
    if dataset.id.get_create_plist().get_nfilters():
        # what a filter makes of a chunk has no bound
        raise ValueError(f"the numbers of {place} are compressed, which Keras does not do: store them as they are")


def _place(group: Any, name: str) -> str:
    return f"{group.name.rstrip('/')}/{name}"
