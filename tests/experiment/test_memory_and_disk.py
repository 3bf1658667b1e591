"""Memory and disk that a run takes, from shapes alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import keras
import numpy as np
import pytest

from job.backbone_table import BACKBONES
from job.data.row_cache import RowCache, kept_rows
from job.experiment.disk import Space, disks, files_in_memory
from job.experiment.memory import Memory, memory_needed
from job.machine.limits import Quota, gigabytes
from job.models.backbones import build
from job.settings.groups import TrainingSettings
from job.training.stages import phases_of
from tests.support.refusals import assert_told
from tests.support.running import completed

GB = 10**9
SIZE = 8


def of_arms(backbone: keras.Model, *arms: str, batch: int = 32, first: int = 1, optimizer: str = "adam") -> Memory:
    phases = phases_of(TrainingSettings(arms=arms))
    return memory_needed(backbone, first, phases, optimizer, batch, examples=1000, limit=16 * GB)


def network() -> keras.Model:
    """Convolution, BatchNorm, ReLU, convolution: 8 px, 4 channels."""
    pixels = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", use_bias=False)(pixels)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.ReLU()(x)
    return keras.Model(pixels, keras.layers.Conv2D(4, 3, padding="same", use_bias=False, name="last")(x))


def test_a_training_step_keeps_what_gradients_are_computed_from() -> None:
    # pixels, the first convolution's result and the ReLU's; BatchNorm's result is overwritten by the ReLU's
    kept = 4 * SIZE**2 * (3 + 4 + 4)
    widest = 4 * SIZE**2 * (4 + 4)
    assert of_arms(network(), "scratch").per_image == kept + widest // 2


def test_fine_tuning_keeps_the_tails_part_alone() -> None:
    backbone = network()
    last = backbone.layers.index(backbone.get_layer("last"))
    assert of_arms(backbone, "fine_tune", first=last).per_image == 4 * SIZE**2 * 4 + 4 * SIZE**2 * 4 // 2


def test_a_head_alone_needs_passes_without_gradients_only() -> None:
    needed = of_arms(network(), "frozen")
    assert needed.per_image == 0
    assert needed.needed == needed.fixed + needed.rows + needed.forward


def test_a_pass_takes_its_widest_place_and_one_more_of_the_largest_tensor() -> None:
    tensor = 4 * SIZE**2 * 4
    # two passes of 32 images: a convolution's result and its normalised values, and what fits in neither's place
    assert of_arms(network(), "frozen").forward == 2 * 32 * (2 * tensor + tensor)


def test_mobilenet_v2_at_224_px_needs_what_its_run_took() -> None:
    with keras.StatelessScope(initialize_variables=False):
        outline = build(BACKBONES["MobileNetV2"], 224)
    # the run held 1507 MB of its own at most
    assert 1_507_000_000 < of_arms(outline, "frozen").needed < 1.25 * 1_507_000_000


def test_the_arm_that_needs_most_decides() -> None:
    backbone = network()
    both, scratch = of_arms(backbone, "frozen", "scratch"), of_arms(backbone, "scratch")
    assert both.per_image == scratch.per_image
    assert of_arms(backbone, "scratch", optimizer="sgd").fixed < scratch.fixed


def test_a_network_without_values_has_the_same_needs() -> None:
    row = BACKBONES["MobileNet"]
    with keras.StatelessScope(initialize_variables=False):
        outline = build(row, 32)
    assert of_arms(outline, "scratch", "fine_tune") == of_arms(build(row, 32), "scratch", "fine_tune")


@pytest.mark.parametrize("dtype_policy", ["mixed_float16"], indirect=True)
@pytest.mark.usefixtures("dtype_policy")
def test_half_precision_halves_all_but_the_pixels() -> None:
    pixels, result = 4 * SIZE**2 * 3, 2 * SIZE**2 * 4
    assert of_arms(network(), "scratch").per_image == pixels + 2 * result + (pixels + result) // 2


# in all, 8 GB for a batch of 100
NEEDS = Memory(fixed=GB, rows=GB, per_image=60_000_000, batch=100, forward=2 * GB, limit=9 * GB)


def test_enough_memory_is_no_problem() -> None:
    assert NEEDS.needed == 8 * GB
    assert NEEDS.problem() is None
    assert NEEDS.is_tight
    assert not replace(NEEDS, limit=16 * GB).is_tight


def test_the_largest_batch_that_fits_is_named() -> None:
    said = "needs about 8.00 GB of memory, and 5.00 GB may be used", "Give at most 50"
    assert_told(replace(NEEDS, limit=5 * GB).problem(), "TRANSFER_BATCH_SIZE", *said)
    assert replace(NEEDS, limit=5 * GB, batch=50).problem() is None


@pytest.mark.parametrize(
    ("limit", "variable"),
    [(3.5 * GB, "TRANSFER_IMAGE_SIZE"), (1.5 * GB, "TRANSFER_BACKBONE")],
)
def test_where_no_batch_fits_images_or_network_are_named(limit: float, variable: str) -> None:
    assert_told(replace(NEEDS, limit=int(limit)).problem(), variable, f"{limit / GB:.2f} GB may be used")


def test_decoding_counts_where_it_takes_more_than_computing() -> None:
    roomy = replace(NEEDS, limit=100 * GB)
    assert replace(roomy, photos=5 * GB).needed == NEEDS.needed
    assert replace(roomy, photos=7 * GB).decoding == 7 * GB
    assert replace(roomy, photos=7 * GB).needed == NEEDS.needed + GB


def test_decoding_takes_what_is_left_so_that_it_is_never_why_a_run_is_refused_or_warned_of() -> None:
    crowded = replace(NEEDS, photos=50 * GB, limit=20 * GB)
    assert crowded.decoding == 14 * GB
    assert crowded.problem() is None
    assert not crowded.is_tight
    assert crowded.one_photo == 18 * GB
    # what training takes later may be used for photos before
    assert replace(NEEDS, photos=50 * GB, limit=8 * GB).decoding == 6 * GB
    assert replace(NEEDS, photos=50 * GB, limit=8 * GB, files=(PIXELS,)).one_photo == 4 * GB


# of the kernel, a tmpfs on every usual Linux
SHARED_MEMORY = Path("/dev", "shm")
PIXELS = Space("TRANSFER_CACHE_DIR", Path("/scratch"), 2 * GB, "decoded images")
MODELS = Space("TRANSFER_OUTPUT_URI", Path("/output"), GB // 2, "models", there=GB // 2)


def test_files_in_memory_are_part_of_what_is_needed_with_those_that_are_there_already() -> None:
    assert replace(NEEDS, files=(PIXELS, MODELS)).needed == NEEDS.needed + 3 * GB


def test_files_in_memory_that_do_not_fit_are_told_with_where_to_put_them() -> None:
    assert_told(
        replace(NEEDS, files=(MODELS, PIXELS), limit=10 * GB).problem(),
        "TRANSFER_CACHE_DIR",
        "needs about 11.0 GB of memory, and 10.0 GB may be used",
        "3.00 GB for files on a file system in memory",
        "1.00 GB for models in /output, 2.00 GB for decoded images in /scratch",
        "Give a folder on a disk",
    )


def test_of_several_places_in_memory_the_variable_that_chose_most_of_it_is_named() -> None:
    parts = tuple(replace(PIXELS, needed=400_000_000, what=what) for what in ("decoded images", "a model", "rows"))
    assert_told(replace(NEEDS, files=(MODELS, *parts), limit=9 * GB).problem(), "TRANSFER_CACHE_DIR")


def test_where_the_batch_must_shrink_anyway_files_in_memory_leave_less_for_it() -> None:
    said = "2.00 GB for decoded images in /scratch", "Give at most 50"
    assert_told(replace(NEEDS, files=(PIXELS,), limit=7 * GB).problem(), "TRANSFER_BATCH_SIZE", *said)
    assert replace(NEEDS, files=(PIXELS,), limit=7 * GB, batch=50).problem() is None


def test_where_no_batch_fits_beside_files_in_memory_these_are_named() -> None:
    assert_told(replace(NEEDS, files=(PIXELS,), limit=5 * GB).problem(), "TRANSFER_CACHE_DIR")


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason=f"there is no {SHARED_MEMORY}: mount a tmpfs there")
def test_places_in_memory_are_told_from_those_on_a_disk() -> None:
    shared = replace(PIXELS, folder=SHARED_MEMORY / "not" / "yet")
    assert files_in_memory([replace(PIXELS, folder=Path("/proc/self")), shared, replace(shared, needed=0)]) == (shared,)


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason=f"there is no {SHARED_MEMORY}: mount a tmpfs there")
@pytest.mark.slow
def test_plan_counts_scratch_space_in_memory_as_memory(small: dict[str, str], tmp_path: Path) -> None:
    changes = {"TRANSFER_ARMS": "frozen", "TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    with TemporaryDirectory(dir=SHARED_MEMORY) as scratch:
        done = completed(small | changes | {"TRANSFER_CACHE_DIR": scratch, "TRANSFER_LOG_FORMAT": "text"}, "plan")
    assert "of it for files in memory (tmpfs)" in done.errors


def test_what_is_written_to_one_disk_is_added_up(tmp_path: Path) -> None:
    places = [
        Space("TRANSFER_CACHE_DIR", tmp_path, 10, "decoded images"),
        Space("TRANSFER_OUTPUT_URI", tmp_path / "not" / "yet", 5, "models"),
    ]
    (disk,) = disks(places)
    assert disk.needed == 15
    assert disk.free > 15
    assert disk.problem() is None


def test_too_little_disk_is_told_with_what_takes_most_of_it(tmp_path: Path) -> None:
    places = [
        Space("TRANSFER_OUTPUT_URI", tmp_path / "output", 10**9, "models"),
        Space("TRANSFER_CACHE_DIR", tmp_path, 10**18, "decoded images"),
    ]
    (problem,) = [disk.problem() for disk in disks(places)]
    images = f"{gigabytes(10**18)} for decoded images"
    assert_told(problem, "TRANSFER_CACHE_DIR", "1,000,000,001.0 GB", images, str(tmp_path))


def test_what_the_platform_lets_files_take_counts_where_it_is_less_than_the_disk(tmp_path: Path) -> None:
    (tmp_path / "used").write_bytes(bytes(4 * 10**6))
    places = [
        Space("TRANSFER_CACHE_DIR", tmp_path, 5 * 10**6, "decoded images", quota=Quota(10**7, tmp_path)),
        Space("TRANSFER_OUTPUT_URI", tmp_path / "output", 2 * 10**6, "models"),
    ]
    (disk,) = disks(places)
    assert 5.9e6 < disk.free <= 6e6
    more = f"Give {7 * 10**6 - disk.free:,} bytes more (Kubernetes: limits.ephemeral-storage)"
    assert_told(disk.problem(), "EPHEMERAL_STORAGE_LIMIT", "by EPHEMERAL_STORAGE_LIMIT has 6 MB free", more)
    (roomy,) = disks([replace(places[0], quota=Quota(10**18, tmp_path))])
    assert roomy.limited_by is None
    assert roomy.problem() is None


def test_rows_of_an_earlier_run_are_found_by_what_decides_them(tmp_path: Path) -> None:
    key = {"backbone": "MobileNet", "image_size": 32}
    cache = RowCache(tmp_path)
    for name, more in (("mine", {}), ("other", {"image_size": 64})):
        full = key | {"cut": "pooled", "split": "train", "examples": "abc"} | more
        with cache.make(name, full, (4,), np.float32, 2) as writer:
            writer.write(np.zeros((2, 4), np.float32))
    (tmp_path / "damaged.json").write_text("{")
    (tmp_path / "strange.json").write_text("[1]")
    assert kept_rows(tmp_path, key) == {("pooled", "train"): (tmp_path / "mine.npy").stat().st_size}
    assert kept_rows(tmp_path / "none", key) == {}
