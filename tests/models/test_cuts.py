"""Where a backbone can be cut, and which cut costs least."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from job.backbone_table import BACKBONES
from job.models.backbones import build, first_trainable
from job.models.cuts import PIXELS, Candidate, Means, candidates, choose, seconds_per_example

PLENTY = Means(epochs=8, examples=1600, disk=10**12, memory=10**11, flops_per_second=4.6e10)


def found(name: str, size: int, fine_tune_from: str | None = None) -> list[Candidate]:
    row = BACKBONES[name]
    backbone = build(row, size)
    return candidates(backbone, first_trainable(backbone, fine_tune_from or row.fine_tune_from))


@pytest.fixture(scope="module")
def mobilenet() -> list[Candidate]:
    return found("MobileNetV2", 160)


def test_the_latest_cut_is_the_last_tensor_that_is_needed_alone(mobilenet: list[Candidate]) -> None:
    # block_11_expand comes after it and is frozen too, but block_10_project_BN is still needed by block_11's sum
    latest = mobilenet[-1]
    assert latest.name == "block_10_project_BN"
    assert latest.row_bytes == 10 * 10 * 96 * 4
    assert mobilenet[0].name == PIXELS
    assert mobilenet[0].row_bytes == 160 * 160 * 3
    assert "block_9_add" in [cut.name for cut in mobilenet]
    assert "block_9_expand" not in [cut.name for cut in mobilenet]


def test_the_later_the_cut_the_less_is_left_to_run(mobilenet: list[Candidate]) -> None:
    flops = [cut.flops for cut in mobilenet]
    assert flops == sorted(flops, reverse=True)
    # block_11_expand alone: 96 x 576 weights used at 10 x 10 positions, and ten per value written
    assert mobilenet[-1].flops == 2 * 96 * 576 * 100 + 10 * 100 * 576


def test_with_room_enough_the_latest_cut_costs_least(mobilenet: list[Candidate]) -> None:
    assert choose(mobilenet, PLENTY).name == "block_10_project_BN"


def test_a_small_disk_is_given_smaller_rows_and_a_full_one_the_pixels(mobilenet: list[Candidate]) -> None:
    smaller = choose(mobilenet, replace(PLENTY, disk=1600 * 30_000))
    assert smaller.name == "block_9_add"
    assert smaller.row_bytes * 1600 <= 1600 * 30_000
    assert choose(mobilenet, replace(PLENTY, disk=-1)).name == PIXELS


def test_where_rows_do_not_fit_memory_their_bytes_weigh_ten_times(mobilenet: list[Candidate]) -> None:
    latest = replace(mobilenet[-1], flops=0)
    slow = replace(PLENTY, memory=0)
    assert math.isclose(seconds_per_example(latest, slow), 10 * seconds_per_example(latest, PLENTY))


def test_on_a_fast_device_with_slow_rows_recomputing_is_chosen(mobilenet: list[Candidate]) -> None:
    fast = replace(PLENTY, memory=0, flops_per_second=2e12)
    assert choose(mobilenet, fast).row_bytes < mobilenet[-1].row_bytes


def test_rows_that_cost_more_than_the_layers_they_save_are_passed_over() -> None:
    nasnet = found("NASNetMobile", 160)
    assert len(nasnet) > 1
    assert min(cut.row_bytes for cut in nasnet[1:]) > 8 * nasnet[0].row_bytes
    assert choose(nasnet, replace(PLENTY, memory=0)).name == PIXELS


@pytest.mark.parametrize(("name", "expected"), [("ConvNeXtTiny", "add"), ("DenseNet121", "_concat")])
def test_bare_additions_and_concatenations_are_cuts_too(name: str, expected: str) -> None:
    assert any(expected in cut.name for cut in found(name, 64))


def test_half_precision_halves_the_bytes() -> None:
    row = BACKBONES["MobileNetV2"]
    backbone: Any = build(row, 96)
    index = first_trainable(backbone, row.fine_tune_from)
    whole, half = candidates(backbone, index), candidates(backbone, index, value_bytes=2)
    assert half[-1].row_bytes * 2 == whole[-1].row_bytes
    assert half[0].row_bytes == whole[0].row_bytes


def test_a_backbone_that_trains_from_its_first_layer_has_only_the_pixels() -> None:
    assert [cut.name for cut in found("MobileNetV2", 96, "all")] == [PIXELS]
