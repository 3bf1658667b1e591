from __future__ import annotations

import pytest

from job.arms import ARMS, Part, Phase, Recipe
from job.settings.environment import load
from job.settings.groups import TrainingSettings, default_head_epochs

RECIPE = Recipe(epochs=10, head_epochs=3, learning_rate=1e-3, fine_tune_learning_rate=1e-4)


def test_the_table_has_the_arms_that_the_settings_accept() -> None:
    accepted = TrainingSettings.model_json_schema()["properties"]["arms"]["items"]["enum"]
    assert list(ARMS) == accepted
    assert load({"TRANSFER_ARMS": ",".join(ARMS)}).training.arms == tuple(ARMS)
    assert load({}).training.arms == tuple(ARMS)


def test_each_arm_stands_under_its_own_name() -> None:
    assert {name: arm.name for name, arm in ARMS.items()} == {name: name for name in ARMS}


def test_only_scratch_starts_from_random_values() -> None:
    assert {name: arm.pretrained for name, arm in ARMS.items()} == {"scratch": False, "frozen": True, "fine_tune": True}


def test_the_phases_are_the_documented_ones() -> None:
    assert {name: arm.phases(RECIPE) for name, arm in ARMS.items()} == {
        "scratch": (Phase("all", Part.ALL, 10, 1e-3, trains_batch_norm=True),),
        "frozen": (Phase("head", Part.HEAD, 10, 1e-3),),
        "fine_tune": (Phase("head", Part.HEAD, 3, 1e-3), Phase("tail", Part.TAIL, 7, 1e-4)),
    }


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 31])
def test_the_phases_sum_to_the_epochs_and_none_is_empty(arm: str, epochs: int) -> None:
    for head_epochs in {0, default_head_epochs(epochs), epochs - 1}:
        phases = ARMS[arm].phases(Recipe(epochs, head_epochs, 1e-3, 1e-4))
        assert sum(phase.epochs for phase in phases) == epochs
        assert all(phase.epochs >= 1 for phase in phases)
        assert len({phase.name for phase in phases}) == len(phases)


def test_without_head_epochs_fine_tune_is_one_phase() -> None:
    (phase,) = ARMS["fine_tune"].phases(Recipe(10, 0, 1e-3, 1e-4))
    assert phase == Phase("tail", Part.TAIL, 10, 1e-4)


def test_only_scratch_trains_batch_norm() -> None:
    trains = {name: {phase.trains_batch_norm for phase in arm.phases(RECIPE)} for name, arm in ARMS.items()}
    assert trains == {"scratch": {True}, "frozen": {False}, "fine_tune": {False}}
