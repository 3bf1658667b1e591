"""Random numbers that hang on the seed alone, whoever else draws."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from job.backbone_table import BACKBONES
from job.models.backbones import build
from job.models.randomness import initial_values


def two_layers(between: Callable[[], object] = lambda: None) -> list[npt.NDArray[Any]]:
    """Return the initial values of two layers, with something in between."""
    layers = [keras.layers.Dense(3)]
    between()
    layers.append(keras.layers.Dense(3))
    for layer in layers:
        layer.build((None, 4))
    return [layer.kernel.numpy() for layer in layers]


def draw_elsewhere() -> None:
    thread = threading.Thread(target=random.random)
    thread.start()
    thread.join()


def test_initial_values_hang_on_the_seed_alone_whoever_draws_meanwhile() -> None:
    with initial_values(5):
        expected = two_layers()
    with initial_values(5):
        np.testing.assert_array_equal(two_layers(draw_elsewhere), expected)
    with initial_values(6):
        assert not np.array_equal(two_layers(), expected)
    assert not np.array_equal(*expected)


def test_they_are_those_that_keras_gives_where_nobody_else_draws() -> None:
    keras.utils.set_random_seed(5)
    network, layers = build(BACKBONES["MobileNet"], 32, "conv_pw_2_relu").get_weights(), two_layers()
    with initial_values(5):
        again = build(BACKBONES["MobileNet"], 32, "conv_pw_2_relu").get_weights(), two_layers()
    for one, other in zip([*network, *layers], [*again[0], *again[1]], strict=True):
        np.testing.assert_array_equal(one, other)


def test_others_draw_from_their_own_numbers_meanwhile_and_keras_does_afterwards() -> None:
    random.seed(5)
    expected = random.getrandbits(64)
    with initial_values(5):
        two_layers()
        assert random.getrandbits(64) == expected
    keras.utils.set_random_seed(7)
    first = two_layers()
    keras.utils.set_random_seed(7)
    np.testing.assert_array_equal(two_layers(), first)
