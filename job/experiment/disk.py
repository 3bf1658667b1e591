"""How much disk a run takes at its peak, and where."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras

from job.arms import ARMS, Part
from job.errors import Problem
from job.experiment.places import Places
from job.machine.limits import Quota, disk_left, gigabytes, in_memory
from job.models import cuts
from job.models.cuts import bytes_of_weights
from job.settings.environment import Settings
from job.storage.local import LocalStore
from job.training.stages import phases_of

# The platform's variable that bounds files.
QUOTA = "EPHEMERAL_STORAGE_LIMIT"
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
    there already, in the place of others that would be written. quota: what the platform lets files take there.
    """

    variable: str
    folder: Path
    needed: int
    what: str
    there: int = 0
    quota: Quota | None = None

    @property
    def whole(self) -> int:
        """Return what it takes in the end: where it lies in memory, what is there already counts as well."""
        return self.needed + self.there


def files_in_memory(places: Sequence[Space]) -> tuple[Space, ...]:
    """Return those of ``places`` that something is written to and that lie in memory."""
    return tuple(place for place in places if place.whole and in_memory(place.folder))


@dataclass(frozen=True)
class Disk:
    """What is written to one disk.

    places: that lie on it. free: bytes that may be written. limited_by: the variable that says so; None where the file
    system does.
    """

    places: tuple[Space, ...]
    free: int
    limited_by: str | None

    @property
    def needed(self) -> int:
        """Return the bytes that are written to it."""
        return sum(place.needed for place in self.places)

    def problem(self) -> Problem | None:
        """Return what to change where there is too little room; None where there is enough."""
        if self.needed <= self.free:
            return None
        most = max(self.places, key=lambda place: place.needed)
        told = ", ".join(f"{gigabytes(place.needed)} for {place.what}" for place in self.places if place.needed)
        has, larger = "has", "a larger disk"
        if self.limited_by:
            has = f"by {self.limited_by} has"
            larger = f"{self.needed - self.free:,} bytes more (Kubernetes: limits.ephemeral-storage)"
        return Problem(
            self.limited_by or most.variable,
            f"the run writes about {gigabytes(self.needed)} to the disk of {most.folder}, which {has} "
            f"{gigabytes(self.free)} free: {told}. Give {larger}, smaller splits or a smaller TRANSFER_IMAGE_SIZE",
        )


def disks(places: Sequence[Space]) -> list[Disk]:
    """Return the disks that something is written to; the first is that of the first place."""
    found = []
    rest = list(places)
    while rest:
        together = tuple(place for place in rest if _same_disk(place, rest[0]))
        quota = next((place.quota for place in together if place.quota), None)
        found.append(Disk(together, *room(rest[0].folder, quota)))
        rest = [place for place in rest if place not in together]
    return found


def room(folder: Path, quota: Quota | None) -> tuple[int, str | None]:
    """Return the bytes that may be written below ``folder``, and the variable that says so; None: the disk."""
    free = disk_left(folder)
    if quota is None or (left := quota.left()) >= free:
        return free, None
    return left, QUOTA


def scratch_quota(settings: Settings) -> Quota | None:
    """Return what the platform lets scratch space take; None where it says nothing, or where that lies in memory."""
    limit = settings.platform.ephemeral_storage_limit
    folder = Path(settings.runtime.cache_dir or tempfile.gettempdir())
    return Quota(limit, folder) if limit and not in_memory(folder) else None


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
    scratch, quota = "TRANSFER_CACHE_DIR", scratch_quota(settings)
    found = [
        Space(scratch, folder, pixels, "decoded images", quota=quota),
        Space(scratch, folder, sum(sizes.values()) - again, "rows of frozen layers", again, quota),
        Space(scratch, folder, COPIES_IN_SCRATCH * model, "a model and a checkpoint", quota=quota),
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
