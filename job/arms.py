"""The compared ways to train, as rows of one table, and the phases each goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Part(Enum):
    """Which variables train in a phase. The head always does."""

    HEAD = "head"
    TAIL = "tail"  # the backbone from fine_tune_from on, and the head
    ALL = "all"


@dataclass(frozen=True)
class Phase:
    """A stretch of an arm's training in which the same variables train.

    epochs: at least 1. learning_rate: the peak of the phase's schedule.
    trains_batch_norm: whether BatchNorm normalises by the batch and moves its statistics. Only an arm without
    pretrained statistics may: in fine-tuning they would drift away from what the frozen layers expect.
    """

    name: str
    trains: Part
    epochs: int
    learning_rate: float
    trains_batch_norm: bool = False


@dataclass(frozen=True)
class Recipe:
    """The numbers that the phases are made from; docs/measurements.md says how the defaults were chosen."""

    epochs: int
    head_epochs: int
    learning_rate: float
    fine_tune_learning_rate: float


@dataclass(frozen=True)
class Arm:
    """One row: pretrained says whether it starts from the weights file or from random values; about, what it does."""

    name: str
    about: str
    pretrained: bool
    plan: Callable[[Recipe], tuple[Phase, ...]]

    def phases(self, recipe: Recipe) -> tuple[Phase, ...]:
        """Return the phases that have epochs; together they take ``recipe.epochs``."""
        return tuple(phase for phase in self.plan(recipe) if phase.epochs > 0)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(
            "scratch",
            "Everything trains, from random values.",
            pretrained=False,
            plan=lambda r: (Phase("all", Part.ALL, r.epochs, r.learning_rate, trains_batch_norm=True),),
        ),
        Arm(
            "frozen",
            "A new head trains on the pretrained backbone, which stays as it is.",
            pretrained=True,
            plan=lambda r: (Phase("head", Part.HEAD, r.epochs, r.learning_rate),),
        ),
        Arm(
            "fine_tune",
            "A new head trains on the pretrained backbone, then also the backbone from a given layer on.",
            pretrained=True,
            plan=lambda r: (
                Phase("head", Part.HEAD, r.head_epochs, r.learning_rate),
                Phase("tail", Part.TAIL, r.epochs - r.head_epochs, r.fine_tune_learning_rate),
            ),
        ),
    )
}


def about(name: str) -> str:
    """Return the sentence about an arm; a published run may have one that this version does not know."""
    return ARMS[name].about if name in ARMS else "An arm of its own."
