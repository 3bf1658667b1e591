"""What the phases of an arm train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from job.arms import Phase
from job.augmentation import Augment
from job.model import Cut
from job.rows import Rows


@dataclass(frozen=True)
class Augmented:
    """What steps are taken on where photos are changed at random: the pixels, at a cut that is the whole network.

    augment: changes them. Frozen layers then give another output in every epoch, so they run in every step; validation
    and evaluation see the photos as they are, and keep to the rows of the stage.
    """

    cut: Cut
    train: Rows
    augment: Augment


@dataclass(frozen=True)
class Stage:
    """A phase with its rows, at one cut.

    index: int64 [n], the rows of ``train`` that are trained on. augmented: where steps are taken on other rows.
    """

    phase: Phase
    cut: Cut
    train: Rows
    index: npt.NDArray[np.int64]
    validation: Rows
    augmented: Augmented | None = None

    @property
    def stepped(self) -> tuple[Cut, Rows]:
        """Return the rows that steps are taken on, and where in the network they are."""
        return (self.augmented.cut, self.augmented.train) if self.augmented else (self.cut, self.train)
