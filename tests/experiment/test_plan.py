"""``python -m job plan``: what it checks, tells and measures, by the real command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.arms import ARMS
from job.errors import ConfigError
from job.experiment.estimate import duration
from tests.support.running import Finished, Published, completed, published_by, run_job

ARM_NAMES = list(ARMS)


def found(environment: dict[str, str]) -> dict[str, Any]:
    lines = completed(environment, "plan").lines
    (line,) = (line for line in lines if "fingerprint" in line and "message" not in line)
    return line


def refusal(environment: dict[str, str], verb: str, variable: str) -> str:
    """Return the one error of a command that is refused for the variable."""
    return refused(run_job(environment, verb), variable)


def refused(done: Finished, variable: str) -> str:
    assert done.code == ConfigError.exit_code, done.errors
    (problem,) = (line for line in done.lines if line.get("severity") == "ERROR")
    assert problem["variable"] == variable
    return str(problem["message"])


@pytest.fixture(scope="module")
def planned(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the command says of the small comparison at two fractions, and the folder that it was to write to."""
    output = tmp_path_factory.mktemp("plan") / "output"
    changes = {"TRANSFER_OUTPUT_URI": str(output), "TRANSFER_COST_PER_HOUR": "3600"}
    return found(small | changes | {"TRANSFER_TRAIN_FRACTIONS": "0.5,1.0"}), output


def test_it_counts_what_a_run_would_do(planned: tuple[dict[str, Any], Path]) -> None:
    plan, output = planned
    assert plan["results"] == 6
    assert plan["examples"] == {"train": 72, "validation": 24, "test": 24}
    # two epochs of 36 and of 72 images, 16 at a time
    assert plan["steps"] == dict.fromkeys(ARM_NAMES, 2 * (3 + 5))
    assert (plan["arms"], plan["fractions"], plan["seeds"]) == (ARM_NAMES, [0.5, 1.0], [0])
    assert plan["output"] == str(output / plan["run_id"])
    assert plan["checkpoints"] == str(output / plan["run_id"] / "checkpoints")
    assert plan["published"] is False
    assert (plan["fine_tune_from"], plan["cut"], plan["row_bytes"]) == ("conv_pw_12", "conv_dw_12_relu", 2048)


def test_it_tells_what_a_run_needs_and_what_there_is(planned: tuple[dict[str, Any], Path]) -> None:
    plan, _ = planned
    assert plan["device_proof"].startswith("matrix product and convolution computed")
    pixels = 120 * 32 * 32 * 3
    assert pixels < plan["disk"]["needed"] < plan["disk"]["free"]
    memory = plan["memory"]
    assert 0 < memory["decoding"] < memory["needed"] < memory["limit"]


def test_it_measures_seconds_and_prices_them(planned: tuple[dict[str, Any], Path]) -> None:
    plan, _ = planned
    seconds = dict(plan["seconds"])
    total = seconds.pop("total")
    assert set(seconds) == {"start", "decode", "features", *ARM_NAMES, "evaluation", "export"}
    assert all(value > 0 for value in seconds.values()), seconds
    assert total == pytest.approx(sum(seconds.values()), abs=0.1)
    assert plan["cost"] == pytest.approx(total, abs=0.1)  # at 3600 an hour


def test_nothing_is_spent_before_the_first_life(planned: tuple[dict[str, Any], Path]) -> None:
    plan, _ = planned
    assert plan["spent"] == 0
    assert plan["left"] == pytest.approx(plan["seconds"]["total"])


def test_it_leaves_nothing_behind(planned: tuple[dict[str, Any], Path]) -> None:
    _, output = planned
    assert not output.exists()


@pytest.mark.slow
def test_people_get_a_table(small: dict[str, str], tmp_path: Path) -> None:
    changes = {"TRANSFER_LOG_FORMAT": "text", "TRANSFER_ARMS": "frozen", "TRANSFER_OUTPUT_URI": str(tmp_path / "out")}
    # the platform's place is not used where one is asked for
    changes |= {"AIP_CHECKPOINT_DIR": str(tmp_path / "vertex"), "TRANSFER_CHECKPOINT_URI": str(tmp_path / "mine")}
    done = completed(small | changes, "plan")
    for told in (
        "72 train, 24 validation, 24 test", "matrix product and convolution computed", "time in all",
        f"{tmp_path / 'mine'}/pets-MobileNet-",
    ):  # fmt: skip
        assert told in done.errors
    assert "fine_tune trains from" not in done.errors
    assert "cost" not in done.errors
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_would_take_more_than_its_cap_is_refused_after_the_table(
    tiny: dict[str, str], tmp_path: Path
) -> None:
    changes = {"TRANSFER_ARMS": "frozen", "TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    changes |= {"TRANSFER_MAX_SECONDS": "1000000", "TRANSFER_MAX_COST": "1002.5", "TRANSFER_COST_PER_HOUR": "3600"}
    environment = tiny | changes
    mark = found(environment | {"TRANSFER_MAX_COST": "1000000"})
    # two lives that were killed, and one of another experiment
    place = tmp_path / "output" / mark["run_id"] / "checkpoints" / "spent"
    place.mkdir(parents=True)
    for number, of in enumerate((mark["fingerprint"], mark["fingerprint"], "0" * 64)):
        life = {"seconds": 500.0, "opening": 10.0, "share": 0.25 * number}
        (place / f"{of[:12]}-{number}.json").write_text(json.dumps(life))
    done = run_job(environment, "plan")
    (table,) = (line for line in done.lines if "left" in line)
    assert table["spent"] == 1000
    seconds = table["seconds"]
    again = seconds["start"] + seconds["decode"]
    assert table["left"] == pytest.approx(again + 0.75 * (seconds["total"] - again), abs=0.1)
    told = (
        f"received 1002.5: 1000.00 (1000 s) spent over all restarts, and the rest is estimated at {table['left']:.2f} ("
    )
    message = refused(done, "TRANSFER_MAX_COST")
    assert told in message
    assert float(message.split("give ")[1].split()[0]) >= 1000 + table["left"]


def test_a_published_run_would_take_no_time(small: dict[str, str], published: Published) -> None:
    plan = found(small | {"TRANSFER_OUTPUT_URI": str(published.folder.parent)})
    assert plan["run_id"] == published.manifest["run_id"]
    assert plan["published"] is True
    assert plan["seconds"] == {"total": 0.0}


def test_another_experiment_under_the_same_id_is_refused(small: dict[str, str], published: Published) -> None:
    changes = {"TRANSFER_OUTPUT_URI": str(published.folder.parent), "TRANSFER_EPOCHS": "1"}
    named = {"TRANSFER_RUN_ID": published.manifest["run_id"], "TRANSFER_ARMS": "frozen"}
    done = run_job(small | changes | named, "plan")
    assert done.code == ConfigError.exit_code, done.errors
    assert "another experiment is published" in done.text


def few(folder: Path, train: int) -> dict[str, str]:
    """Return the settings of ``train`` training photos, and one of validation and test each."""
    from tests.support.photos import write_dataset

    dataset = write_dataset(folder / "tfds", "few", {"train": train, "validation": 1, "test": 1}, size=32, shards=1)
    splits = {f"TRANSFER_{name.upper()}_SPLIT": name for name in ("train", "validation", "test")}
    return splits | {"TRANSFER_DATASET": str(dataset), "TRANSFER_OUTPUT_URI": str(folder / "output")}


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_fewer_training_photos_than_classes_are_refused(tiny: dict[str, str], tmp_path: Path, verb: str) -> None:
    said = refusal(tiny | few(tmp_path, 1), verb, "TRANSFER_TRAIN_SPLIT")
    assert "'train' has 1 examples for 2 classes" in said


def test_two_training_photos_and_a_larger_batch_are_planned_and_published(tiny: dict[str, str], tmp_path: Path) -> None:
    changes = few(tmp_path, 2)
    plan = found(tiny | changes)
    assert plan["steps"] == dict.fromkeys(ARM_NAMES, 2)
    assert plan["seconds"]["total"] > 0
    manifest = published_by(tiny | changes, tmp_path / "output").manifest
    assert [result["train_examples"] for result in manifest["results"]] == [2, 2, 2]


@pytest.mark.slow
def test_rows_that_are_kept_are_counted_on_and_left_alone(tiny: dict[str, str], tmp_path: Path) -> None:
    changes = {"TRANSFER_ARMS": "frozen", "TRANSFER_CACHE_DIR": str(tmp_path / "cache")}
    changes |= {"TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    completed(tiny | changes)
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache" / "features").iterdir()}
    assert len(before) == 6
    plan = found(tiny | changes | {"TRANSFER_EPOCHS": "3"})
    assert plan["seconds"]["features"] == 0.0
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache" / "features").iterdir()} == before


@pytest.mark.parametrize("verb", [pytest.param("run", marks=pytest.mark.slow), "plan"])
def test_images_that_fill_the_memory_are_refused_before_anything_is_built(
    small: dict[str, str], tmp_path: Path, verb: str
) -> None:
    changes = {"TRANSFER_IMAGE_SIZE": "4096", "TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    changes |= {"TRANSFER_BACKBONE": "VGG16", "TRANSFER_FINE_TUNE_FROM": "block5_conv1"}
    assert "GB of memory, and " in refusal(small | changes, verb, "TRANSFER_IMAGE_SIZE")


def test_the_platforms_limit_of_disk_decides_the_cut_and_is_refused_where_nothing_fits(
    small: dict[str, str], tmp_path: Path
) -> None:
    changes = {"TRANSFER_ARMS": "fine_tune", "TRANSFER_CACHE_DIR": str(tmp_path / "cache")}
    changes |= {"TRANSFER_OUTPUT_URI": str(tmp_path / "output")}
    free = found(small | changes)
    assert (free["cut"], free["disk"]["limited_by"]) == ("conv_dw_12_relu", None)
    # all but the rows of frozen layers, of which there is room for some
    enough = free["disk"]["needed"] - 120 * 2048 + 100_000
    tight = found(small | changes | {"EPHEMERAL_STORAGE_LIMIT": str(enough)})
    assert (tight["cut"], tight["disk"]["limited_by"]) == ("pixels", "EPHEMERAL_STORAGE_LIMIT")
    assert tight["disk"]["needed"] <= tight["disk"]["free"] <= enough
    said = refusal(small | changes | {"EPHEMERAL_STORAGE_LIMIT": "1000000"}, "run", "EPHEMERAL_STORAGE_LIMIT")
    assert "bytes more (Kubernetes: limits.ephemeral-storage)" in said


@pytest.mark.parametrize(
    "variable", ["TRANSFER_CHECKPOINT_URI", pytest.param("AIP_CHECKPOINT_DIR", marks=pytest.mark.slow)]
)
def test_a_place_for_checkpoints_that_cannot_be_written_is_refused_by_name(
    small: dict[str, str], tmp_path: Path, variable: str
) -> None:
    (tmp_path / "file").write_text("")
    changes = {"TRANSFER_OUTPUT_URI": str(tmp_path / "output"), variable: str(tmp_path / "file" / "below")}
    assert "file/below" in refusal(small | changes, "plan", variable)


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (12_000, "3 h 20 min")]
)
def test_durations_are_told_for_people(seconds: float, told: str) -> None:
    assert duration(seconds) == told
