"""How much disk a run takes at its peak, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras

from job.arms import ARMS, Part
from job.errors import Problem
from job.experiment.places import Places
from job.machine.limits import disk_left, gigabytes, in_memory
from job.models import cuts
from job.models.cuts import bytes_of_weights
from job.settings.environment import Settings
from job.storage.local import LocalStore
from job.training.stages import phases_of

# A SavedModel beside its variables.
_GRAPH_BYTES = 10 * 10**6
# Of a model's size: a SavedModel and a checkpoint, which has two slots for each variable, on the way to their places;
# and the newest checkpoints, the one before included.
COPIES_IN_SCRATCH = 4
COPIES_IN_CHECKPOINTS = 9


@dataclass(frozen=True)
class Space:
    """Bytes that are written to one place.

    variable: which setting chose it. what: what it is that is written there, for people. there: bytes that it takes
    there already, in the place of others that would be written.
    """

    variable: str
    folder: Path
    needed: int
    what: str
    there: int = 0

    @property
    def whole(self) -> int:
        """Return what it takes in the end: where it lies in memory, what is there already counts as well."""
        return self.needed + self.there


def files_in_memory(places: Sequence[Space]) -> tuple[Space, ...]:
    """Return those of ``places`` that something is written to and that lie in memory."""
    return tuple(place for place in places if place.whole and in_memory(place.folder))


def disk_needed(places: Sequence[Space]) -> tuple[int, int]:
    """Return the bytes that are written to the disk of the first place, and how many are free there."""
    first = places[0]
    return sum(place.needed for place in places if _same_disk(place, first)), disk_left(first.folder)


def disk_problems(places: Sequence[Space]) -> list[Problem]:
    """Return what to change about every disk that has too little room for all that is written to it."""
    found = []
    rest = list(places)
    while rest:
        together = [place for place in rest if _same_disk(place, rest[0])]
        needed, free = disk_needed(rest)
        rest = [place for place in rest if place not in together]
        if needed > free:
            most = max(together, key=lambda place: place.needed)
            told = ", ".join(f"{gigabytes(place.needed)} for {place.what}" for place in together if place.needed)
            found.append(
                Problem(
                    most.variable,
                    f"the run writes about {gigabytes(needed)} to the disk of {most.folder}, which has "
                    f"{gigabytes(free)} free: {told}. Give a larger disk, smaller splits or a smaller "
                    "TRANSFER_IMAGE_SIZE",
                )
            )
    return found


def _same_disk(one: Space, other: Space) -> bool:
    return _device(one.folder) == _device(other.folder)


def _device(folder: Path) -> int:
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    return existing.stat().st_dev


def bytes_of_model(backbone: keras.Model) -> int:
    """Return about what a SavedModel of ``backbone`` takes on disk."""
    return bytes_of_weights(backbone.layers) + _GRAPH_BYTES


def spaces(
    settings: Settings,
    folder: Path,
    held: Mapping[str, int],
    backbone: keras.Model,
    cut: cuts.Candidate,
    kept: Mapping[tuple[str, str], int],
    places: Places,
) -> tuple[Space, ...]:
    """Return what a run writes to local disks; the first place is its scratch space.

    Args:
        settings: of the run.
        folder: its scratch space.
        held: how many examples of each split this worker reads.
        backbone: the network; only its shapes are looked at.
        cut: where its trunk ends.
        kept: bytes of rows that are there from an earlier run, by cut and split.
        places: the stores that the run writes to.
    """
    training, phases = settings.training, phases_of(settings.training)
    row_bytes = {}
    if settings.runtime.feature_cache == "auto" and any(ARMS[arm].pretrained for arm in phases):
        row_bytes[cuts.POOLED] = 4 * int(backbone.output_shape[-1])
        if cut.operation is not None and any(p.trains is Part.TAIL for each in phases.values() for p in each):
            row_bytes[cut.name] = cut.row_bytes
    pixels = sum(held.values()) * settings.model.image_size**2 * 3
    sizes = {(at, split): rows * size for split, rows in held.items() for at, size in row_bytes.items()}
    again = sum(size for where, size in sizes.items() if where in kept)
    model = bytes_of_model(backbone)
    results = len(training.arms) * len(training.seeds) * len(settings.data.train_fractions)
    scratch = "TRANSFER_CACHE_DIR"
    found = [
        Space(scratch, folder, pixels, "decoded images"),
        Space(scratch, folder, sum(sizes.values()) - again, "rows of frozen layers", again),
        Space(scratch, folder, COPIES_IN_SCRATCH * model, "a model and a checkpoint"),
    ]
    # finished results are stored first, and copied to their places when all are
    published = 2 * results * model
    there = sum(stored.bytes for stored in places.run.list().values()) if isinstance(places.run, LocalStore) else 0
    for store, size, kept_size, what in (
        (places.run, max(0, published - there), there, "models"),
        (places.checkpoints, COPIES_IN_CHECKPOINTS * model, 0, "checkpoints"),
        (places.model, model, 0, "the best model"),
    ):
        if isinstance(store, LocalStore):
            found.append(Space(store.variable, Path(store.uri), size, what, kept_size))
    return tuple(found)
