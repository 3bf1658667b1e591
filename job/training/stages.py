"""The phases of an arm, and what they train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from job.arms import ARMS, Phase, Recipe
from job.data.rows import Rows
from job.models.classifier import Cut
from job.settings.groups import TrainingSettings
from job.training.augmentation import Augment


def phases_of(training: TrainingSettings) -> dict[str, tuple[Phase, ...]]:
    """Return the phases of every arm that runs."""
    rates = training.learning_rate, training.fine_tune_learning_rate
    recipe = Recipe(training.epochs, training.resolved_head_epochs, *rates)
    return {arm: ARMS[arm].phases(recipe) for arm in training.arms}


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
