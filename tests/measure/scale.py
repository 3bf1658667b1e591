"""How time grows with photos and GPUs, on paper: ``python -m tests.measure.scale`` prints the table of docs/scale.md.

Measured rates carry the command that measured them; assumed ones say so. MobileNetV2 at 160 px, fine_tune from
block_11_expand_BN, ten epochs of which two train the head, 256 images for each GPU in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt

# measured: photos of 192 px to rows of 160 px, on one core of a Xeon at 2.5 GHz, median of three times 1,000
DECODED_PER_CORE = 208.0
CORES_PER_GPU = 8
# assumed, since no GPU was at hand: an L4 without gradients through the whole network, and training its tail
FORWARD_PER_GPU = 3000.0
TAIL_PER_GPU = 2000.0
# assumed: what a photo takes in the data set, and what a worker reads from object storage
PHOTO_BYTES = 100e3
STORAGE_BYTES_PER_SECOND = 1e9
NETWORK_BYTES_PER_SECOND = 25e9 / 8
# counted: pixels as uint8, rows at block_11's cut in float16, pooled features in float32 (`plan` says them)
ROW_BYTES = 160 * 160 * 3 + 38_400 // 2 + 5_120
# counted: trainable parameters of backbone and head (`manifest.json`)
GRADIENT_BYTES = 4 * 1_865_154
# counted: an id of 40 characters as Python keeps it, its place, label and digest, on every worker
BYTES_PER_EXAMPLE = 40 + 49 + 33 + 8 + 12 + 16 + 8
BATCH_PER_GPU = 256
TAIL_EPOCHS = 8


@dataclass(frozen=True)
class Scale:
    """A run of so many photos on so many workers with one GPU each."""

    photos: float
    gpus: int

    @property
    def read(self) -> float:
        """Return the seconds of reading the photos from storage, each worker its share."""
        return self.photos * PHOTO_BYTES / (self.gpus * STORAGE_BYTES_PER_SECOND)

    @property
    def decode(self) -> float:
        """Return the seconds of decoding, which reading runs beside."""
        return max(self.read, self.photos / (self.gpus * CORES_PER_GPU * DECODED_PER_CORE))

    @property
    def features(self) -> float:
        """Return the seconds of the one pass of the frozen layers."""
        return self.photos / (self.gpus * FORWARD_PER_GPU)

    @property
    def imbalance(self) -> float:
        """Return how much more of a batch the worker has that has most: a batch is drawn from all shares alike."""
        if self.gpus == 1:
            return 1.0
        # the expected maximum of normal variables
        return 1 + sqrt(2 * log(self.gpus)) * sqrt((1 - 1 / self.gpus) / BATCH_PER_GPU)

    @property
    def all_reduce(self) -> float:
        """Return the seconds of one step's all-reduce in a ring."""
        return 2 * (1 - 1 / self.gpus) * GRADIENT_BYTES / NETWORK_BYTES_PER_SECOND

    @property
    def training(self) -> float:
        """Return the seconds of the tail's epochs; the head's, on pooled features, are seconds."""
        steps = TAIL_EPOCHS * self.photos / (self.gpus * BATCH_PER_GPU)
        return steps * (BATCH_PER_GPU * self.imbalance / TAIL_PER_GPU + self.all_reduce)

    @property
    def total(self) -> float:
        """Return the seconds of all of it."""
        return self.decode + self.features + self.training


def hours(seconds: float) -> str:
    """Return seconds as hours or minutes."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def table() -> str:
    """Return the table of docs/scale.md."""
    columns = ("photos", "GPUs", "decode", "frozen layers", "fine_tune", "of it all-reduce", "in all", "GPU hours")
    columns += ("local disk for each worker", "memory for ids on each")
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---:'] * len(columns))} |"]
    for photos in (1e6, 1e8):
        for gpus in (1, 8, 64):
            run = Scale(photos, gpus)
            share = run.all_reduce / (BATCH_PER_GPU * run.imbalance / TAIL_PER_GPU + run.all_reduce)
            cells = [f"{photos / 1e6:.0f} million", str(gpus), hours(run.decode), hours(run.features)]
            cells += [hours(run.training), f"{share:.0%}", hours(run.total), f"{run.total * gpus / 3600:,.1f}"]
            cells += [f"{photos * ROW_BYTES / gpus / 1e9:,.0f} GB", f"{photos * BYTES_PER_EXAMPLE / 1e9:,.1f} GB"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201
