"""What is wrong is said before anything is trained, and nothing is left behind: the whole command, environment in."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.running import ROOT, run_job

Change = dict[str, str]

# Each row: what is changed in a sound environment, and the variable that the message must name. None of these needs
# TensorFlow to be refused.
BY_SETTINGS: list[tuple[Change, str]] = [
    ({"TRANSFER_EPOCH": "3"}, "TRANSFER_EPOCH"),
    ({"TRANSFER_BACKBONES": "MobileNet"}, "TRANSFER_BACKBONES"),
    ({"transfer_epochs": "3"}, "transfer_epochs"),
    ({"TRANSFER_EPOCHS": "ten"}, "TRANSFER_EPOCHS"),
    ({"TRANSFER_EPOCHS": "0"}, "TRANSFER_EPOCHS"),
    ({"TRANSFER_EPOCHS": "2.5"}, "TRANSFER_EPOCHS"),
    ({"TRANSFER_EPOCHS": ""}, "TRANSFER_EPOCHS"),
    ({"TRANSFER_HEAD_EPOCHS": "2"}, "TRANSFER_HEAD_EPOCHS"),
    ({"TRANSFER_BATCH_SIZE": "-1"}, "TRANSFER_BATCH_SIZE"),
    ({"TRANSFER_LEARNING_RATE": "nan"}, "TRANSFER_LEARNING_RATE"),
    ({"TRANSFER_LEARNING_RATE": "0"}, "TRANSFER_LEARNING_RATE"),
    ({"TRANSFER_FINE_TUNE_LEARNING_RATE": "fast"}, "TRANSFER_FINE_TUNE_LEARNING_RATE"),
    ({"TRANSFER_OPTIMIZER": "adamm"}, "TRANSFER_OPTIMIZER"),
    ({"TRANSFER_ARMS": "scratch,thawed"}, "TRANSFER_ARMS"),
    ({"TRANSFER_ARMS": "frozen,frozen"}, "TRANSFER_ARMS"),
    ({"TRANSFER_BACKBONE": "mobilenet_v2"}, "TRANSFER_BACKBONE"),
    ({"TRANSFER_IMAGE_SIZE": "16"}, "TRANSFER_IMAGE_SIZE"),
    ({"TRANSFER_DROPOUT": "1"}, "TRANSFER_DROPOUT"),
    ({"TRANSFER_HEAD_UNITS": "256,x"}, "TRANSFER_HEAD_UNITS"),
    ({"TRANSFER_WEIGHTS_SHA256": "abc"}, "TRANSFER_WEIGHTS_SHA256"),
    ({"TRANSFER_DETERMINISTIC": "ja"}, "TRANSFER_DETERMINISTIC"),
    ({"TRANSFER_PRECISION": "float64"}, "TRANSFER_PRECISION"),
    ({"TRANSFER_XLA": "maybe"}, "TRANSFER_XLA"),
    ({"TRANSFER_FEATURE_CACHE": "on"}, "TRANSFER_FEATURE_CACHE"),
    ({"TRANSFER_LOG_FORMAT": "xml"}, "TRANSFER_LOG_FORMAT"),
    ({"TRANSFER_MAX_BAD_IMAGES": "2"}, "TRANSFER_MAX_BAD_IMAGES"),
    ({"TRANSFER_RUN_ID": "../up"}, "TRANSFER_RUN_ID"),
    ({"TRANSFER_COST_PER_HOUR": "-1"}, "TRANSFER_COST_PER_HOUR"),
    ({"TRANSFER_OUTPUT_URI": "s3://bucket/prefix"}, "TRANSFER_OUTPUT_URI"),
    ({"TRANSFER_VALIDATION_SPLIT": "train[:60%]"}, "TRANSFER_VALIDATION_SPLIT"),
    ({"TRANSFER_SEEDS": "0,0"}, "TRANSFER_SEEDS"),
    ({"TRANSFER_TRAIN_FRACTIONS": "0.5,1.5"}, "TRANSFER_TRAIN_FRACTIONS"),
    ({"TRANSFER_AUGMENTATION": "mirror"}, "TRANSFER_AUGMENTATION"),
    ({"TRANSFER_CHECKPOINT_URI": "s3://bucket/checkpoints"}, "TRANSFER_CHECKPOINT_URI"),
    ({"TRANSFER_CHECKPOINT_SECONDS": "0"}, "TRANSFER_CHECKPOINT_SECONDS"),
    ({"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}'}, "TF_CONFIG"),
    ({"TF_CONFIG": "{"}, "TF_CONFIG"),
]

# These need the data set, the backbone, the weights or the output to be looked at.
BY_LOOKING: list[tuple[Change, str]] = [
    ({"TRANSFER_DATASET": "cats_vs_dog"}, "TRANSFER_DATASET"),
    ({"TRANSFER_DATASET": "{tmp}/nothing"}, "TRANSFER_DATASET"),
    ({"TRANSFER_DATASET": "gs://no-such-bucket/pets/1.0.0"}, "TRANSFER_DATASET"),
    ({"TRANSFER_DATASET": "cats_vs_dogs", "TRANSFER_DATA_DIR": "gs://no-such-bucket/tfds"}, "TRANSFER_DATA_DIR"),
    ({"TRANSFER_TRAIN_SPLIT": "train[:70%]"}, "TRANSFER_TRAIN_SPLIT"),
    ({"TRANSFER_TEST_SPLIT": "train[70%:]"}, "TRANSFER_TEST_SPLIT"),
    ({"TRANSFER_TEST_SPLIT": "test"}, "TRANSFER_TEST_SPLIT"),
    ({"TRANSFER_TEST_SPLIT": "train[80%"}, "TRANSFER_TEST_SPLIT"),
    ({"TRANSFER_VALIDATION_SPLIT": "train[60%:60%]"}, "TRANSFER_VALIDATION_SPLIT"),
    ({"TRANSFER_MAX_BAD_IMAGES": "0"}, "TRANSFER_MAX_BAD_IMAGES"),
    ({"TRANSFER_FINE_TUNE_FROM": "conv_pw_99"}, "TRANSFER_FINE_TUNE_FROM"),
    ({"TRANSFER_TRUNCATE_AT": "block_7"}, "TRANSFER_TRUNCATE_AT"),
    ({"TRANSFER_TRUNCATE_AT": "conv_pw_6_relu"}, "TRANSFER_FINE_TUNE_FROM"),
    ({"TRANSFER_WEIGHTS": "{tmp}/absent.h5"}, "TRANSFER_WEIGHTS"),
    ({"TRANSFER_WEIGHTS": "{tmp}/garbage.h5"}, "TRANSFER_WEIGHTS"),
    ({"TRANSFER_BACKBONE": "MobileNetV3Small", "TRANSFER_FINE_TUNE_FROM": "all"}, "TRANSFER_WEIGHTS"),
    ({"TRANSFER_WEIGHTS_SHA256": "0" * 64}, "TRANSFER_WEIGHTS_SHA256"),
    ({"TRANSFER_OUTPUT_URI": "{tmp}/garbage.h5/below"}, "TRANSFER_OUTPUT_URI"),
    ({"TRANSFER_OUTPUT_URI": "gs://no-such-bucket/prefix"}, "TRANSFER_OUTPUT_URI"),
    ({"AIP_MODEL_DIR": "gs://no-such-bucket/model"}, "AIP_MODEL_DIR"),
    ({"TRANSFER_CHECKPOINT_URI": "{tmp}/garbage.h5/below"}, "TRANSFER_CHECKPOINT_URI"),
    ({"AIP_CHECKPOINT_DIR": "gs://no-such-bucket/checkpoints"}, "AIP_CHECKPOINT_DIR"),
    ({"TRANSFER_CACHE_DIR": "{tmp}/garbage.h5/below"}, "TRANSFER_CACHE_DIR"),
]


@pytest.fixture
def refused(
    small: dict[str, str],
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[[Change], list[str]]]:
    """Run the command inside this process, where TensorFlow is loaded already, and return its error messages."""
    from job.__main__ import main

    output = tmp_path / "output"
    (tmp_path / "garbage.h5").write_bytes(b"no weights")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(change: Change) -> list[str]:
        sound = small | {"TRANSFER_OUTPUT_URI": str(output), "STORAGE_EMULATOR_HOST": server}
        for name, value in (sound | change).items():
            monkeypatch.setenv(name, value.replace("{tmp}", str(tmp_path)))
        assert main([]) == 78
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert not [line for line in lines if "epoch" in line], "something was trained"
        assert not output.exists(), "something was left behind"
        return [line["message"] for line in lines if line["severity"] == "ERROR"]

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


@pytest.mark.parametrize(("change", "variable"), BY_SETTINGS + BY_LOOKING, ids=str)
def test_a_malformed_environment_is_refused_by_name(
    refused: Callable[[Change], list[str]], change: Change, variable: str
) -> None:
    messages = refused(change)
    assert any(variable in message for message in messages), messages


def test_mistakes_of_different_kinds_are_reported_together(refused: Callable[[Change], list[str]]) -> None:
    messages = refused(
        {
            "TRANSFER_TEST_SPLIT": "train[70%:]",
            "TRANSFER_FINE_TUNE_FROM": "conv_pw_99",
            "TRANSFER_OUTPUT_URI": "gs://no-such-bucket/prefix",
        }
    )
    named = {message.partition(":")[0] for message in messages}
    assert named == {"TRANSFER_TEST_SPLIT", "TRANSFER_FINE_TUNE_FROM", "TRANSFER_OUTPUT_URI"}


def test_a_layer_that_truncation_removed_cannot_be_where_fine_tuning_starts(
    refused: Callable[[Change], list[str]],
) -> None:
    (message,) = refused({"TRANSFER_TRUNCATE_AT": "conv_pw_6_relu"})
    assert "conv_pw_12" in message


def test_a_settings_error_and_env_answer_without_tensorflow(small: dict[str, str], tmp_path: Path) -> None:
    # A package named tensorflow that cannot be imported stands in the way of anyone who tries.
    for name in ("tensorflow", "keras"):
        (tmp_path / "blocked" / name).mkdir(parents=True)
        (tmp_path / "blocked" / name / "__init__.py").write_text("raise SystemExit('imported')\n")
    path = {"PYTHONPATH": f"{tmp_path / 'blocked'}:{ROOT}"}
    wrong = run_job(small | path | {"TRANSFER_EPOCHS": "0", "TRANSFER_OUTPUT_URI": str(tmp_path / "output")})
    assert wrong.code == 78
    assert wrong.text.startswith("TRANSFER_EPOCHS: ")
    assert run_job(path, "env").code == 0
    stopped = run_job(small | path | {"TRANSFER_OUTPUT_URI": str(tmp_path / "output")})
    assert "imported" in stopped.errors, "the packages in the way were not even met"


def test_a_wrong_data_set_leaves_no_prepared_folder(
    refused: Callable[[Change], list[str]], photos: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    before = sorted(path.name for path in copy.iterdir())
    refused({"TRANSFER_DATASET": str(copy), "TRANSFER_TRAIN_SPLIT": "train[:0]"})
    assert sorted(path.name for path in copy.iterdir()) == before
