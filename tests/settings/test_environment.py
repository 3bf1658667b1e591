from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from job.backbone_table import BACKBONES
from job.errors import ConfigError
from job.settings.environment import (
    Settings,
    Variable,
    bound_threads,
    fingerprint,
    load,
    log_format,
    prepare_tensorflow,
    variables,
    variables_markdown,
)
from job.settings.groups import DataSettings, ModelSettings, OutputSettings, TrainingSettings, default_head_epochs
from tests.support.refusals import refused

CONTRACT_DEFAULTS = {
    "TRANSFER_DATASET": "cats_vs_dogs",
    "TRANSFER_DATA_DIR": "TFDS's own",
    "TRANSFER_TRAIN_SPLIT": "train[:20%]",
    "TRANSFER_VALIDATION_SPLIT": "train[80%:90%]",
    "TRANSFER_TEST_SPLIT": "train[90%:]",
    "TRANSFER_TRAIN_FRACTIONS": "1.0",
    "TRANSFER_BACKBONE": "MobileNetV2",
    "TRANSFER_IMAGE_SIZE": "160",
    "TRANSFER_WEIGHTS": "imagenet",
    "TRANSFER_WEIGHTS_SHA256": "",
    "TRANSFER_TRUNCATE_AT": "",
    "TRANSFER_HEAD_UNITS": "",
    "TRANSFER_DROPOUT": "0.0",
    "TRANSFER_ARMS": "scratch,frozen,fine_tune",
    "TRANSFER_FINE_TUNE_FROM": "the backbone's own",
    "TRANSFER_EPOCHS": "10",
    "TRANSFER_HEAD_EPOCHS": None,  # docs/settings.md says, and this table is its
    "TRANSFER_BATCH_SIZE": "32",
    "TRANSFER_OPTIMIZER": "adam",
    "TRANSFER_LEARNING_RATE": None,
    "TRANSFER_FINE_TUNE_LEARNING_RATE": None,
    "TRANSFER_AUGMENTATION": "none",
    "TRANSFER_SEEDS": "0",
    "TRANSFER_PRECISION": "auto",
    "TRANSFER_XLA": "auto",
    "TRANSFER_DETERMINISTIC": "false",
    "TRANSFER_FEATURE_CACHE": "auto",
    "TRANSFER_CACHE_DIR": "a temporary folder",
    "TRANSFER_CHECKPOINT_URI": "AIP_CHECKPOINT_DIR, else under the run",
    "TRANSFER_CHECKPOINT_SECONDS": "60",
    "TRANSFER_OUTPUT_URI": "output",
    "TRANSFER_RUN_ID": "from the fingerprint",
    "TRANSFER_MAX_BAD_IMAGES": "0.01",
    "TRANSFER_COST_PER_HOUR": "",
    "TRANSFER_LOG_FORMAT": "auto",
    "TRANSFER_MAX_SECONDS": "",
    "TRANSFER_MAX_COST": "",
}


def problems_of(environ: dict[str, str]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(environ)
    return {problem.variable: problem.message for problem in caught.value.problems}


MALFORMED = [
    # environment, what the message must say besides the variable and the value
    ({"TRANSFER_EPOCS": "3"}, "TRANSFER_EPOCHS"),
    ({"TRANSFER_BACKBON": "Xception"}, "TRANSFER_BACKBONE"),
    ({"TRANSFER_LEARNINGRATE": "0.1"}, "TRANSFER_LEARNING_RATE"),
    ({"Transfer_Epochs": "3"}, "TRANSFER_EPOCHS"),
    ({"TRANSFER_": "3"}, "no such setting"),
    ({"TRANSFER_DATASET": ""}, "unset it for cats_vs_dogs"),
    ({"TRANSFER_DATASET": "s3://bucket/cats"}, "gs://"),
    ({"TRANSFER_DATASET": "cats_vs_dogs\r"}, "white space"),
    ({"TRANSFER_DATA_DIR": "gs:/bucket/tfds"}, "gs://bucket"),
    ({"TRANSFER_DATA_DIR": "gs:///tfds"}, "bucket's name"),
    ({"TRANSFER_TRAIN_SPLIT": ""}, "unset it for train[:20%]"),
    ({"TRANSFER_TEST_SPLIT": "train[:20%]"}, "TRANSFER_TRAIN_SPLIT"),
    ({"TRANSFER_VALIDATION_SPLIT": "train[:20 %]"}, "TRANSFER_TRAIN_SPLIT"),
    ({"TRANSFER_TRAIN_FRACTIONS": "0"}, "above 0 and at most 1"),
    ({"TRANSFER_TRAIN_FRACTIONS": "1.5"}, "above 0 and at most 1"),
    ({"TRANSFER_TRAIN_FRACTIONS": "1,1.0"}, "repeated"),
    ({"TRANSFER_TRAIN_FRACTIONS": "0.5,"}, "entry of the list is empty"),
    ({"TRANSFER_TRAIN_FRACTIONS": "half"}, "number"),
    ({"TRANSFER_MAX_BAD_IMAGES": "1"}, "below 1"),
    ({"TRANSFER_MAX_BAD_IMAGES": "-0.1"}, "at least 0"),
    ({"TRANSFER_BACKBONE": "mobilenetv2"}, "did you mean MobileNetV2?"),
    ({"TRANSFER_BACKBONE": "Xceptoin"}, "did you mean Xception?"),
    ({"TRANSFER_BACKBONE": "my_own_cnn"}, "MobileNetV2"),
    ({"TRANSFER_IMAGE_SIZE": "31"}, "MobileNetV2"),
    ({"TRANSFER_IMAGE_SIZE": "70", "TRANSFER_BACKBONE": "Xception"}, "at least 71"),
    ({"TRANSFER_IMAGE_SIZE": "4097"}, "at most 4096"),
    ({"TRANSFER_IMAGE_SIZE": "160.5"}, "whole number"),
    ({"TRANSFER_IMAGE_SIZE": "160px"}, "whole number"),
    ({"TRANSFER_WEIGHTS": "https://example.com/w.h5"}, "imagenet"),
    ({"TRANSFER_WEIGHTS": "Imagenet"}, "did you mean imagenet?"),
    ({"TRANSFER_WEIGHTS_SHA256": "abc"}, "64 hexadecimal digits"),
    ({"TRANSFER_WEIGHTS_SHA256": "g" * 64}, "64 hexadecimal digits"),
    ({"TRANSFER_HEAD_UNITS": "256,0"}, "at least 1"),
    ({"TRANSFER_HEAD_UNITS": "256;128"}, "comma-separated"),
    ({"TRANSFER_DROPOUT": "1"}, "below 1"),
    ({"TRANSFER_DROPOUT": "nan"}, "number"),
    ({"TRANSFER_ARMS": "scratch,frosen"}, "did you mean frozen?"),
    ({"TRANSFER_ARMS": "frozen,frozen"}, "repeated"),
    ({"TRANSFER_ARMS": ""}, "unset it for scratch,frozen,fine_tune"),
    ({"TRANSFER_FINE_TUNE_FROM": ""}, "unset it for the backbone's own"),
    ({"TRANSFER_EPOCHS": "0"}, "at least 1"),
    ({"TRANSFER_EPOCHS": "ten"}, "whole number"),
    ({"TRANSFER_HEAD_EPOCHS": "-1"}, "at least 0"),
    ({"TRANSFER_HEAD_EPOCHS": "10"}, "TRANSFER_EPOCHS"),
    ({"TRANSFER_BATCH_SIZE": "1"}, "bit-equal"),
    ({"TRANSFER_BATCH_SIZE": "65537"}, "at most 65536"),
    ({"TRANSFER_OPTIMIZER": "Adam"}, "did you mean adam?"),
    ({"TRANSFER_LEARNING_RATE": "0"}, "above 0"),
    ({"TRANSFER_LEARNING_RATE": "11"}, "at most 10"),
    ({"TRANSFER_FINE_TUNE_LEARNING_RATE": "inf"}, "number"),
    ({"TRANSFER_AUGMENTATION": "flips"}, "did you mean flip?"),
    ({"TRANSFER_SEEDS": "-1"}, "at least 0"),
    ({"TRANSFER_SEEDS": str(2**31)}, "2147483647"),
    ({"TRANSFER_PRECISION": "float16"}, "mixed_float16"),
    ({"TRANSFER_XLA": "true"}, "auto, on or off"),
    ({"TRANSFER_DETERMINISTIC": "on"}, "true, false, 1, 0, yes or no"),
    ({"TRANSFER_DETERMINISTIC": "flase"}, "true, false"),
    ({"TRANSFER_DETERMINISTIC": ""}, "unset it for false"),
    ({"TRANSFER_FEATURE_CACHE": "on"}, "auto or off"),
    ({"TRANSFER_CACHE_DIR": "gs://bucket/cache"}, "local"),
    ({"TRANSFER_CHECKPOINT_URI": "s3://bucket/checkpoints"}, "gs://bucket/prefix"),
    ({"TRANSFER_CHECKPOINT_SECONDS": "0"}, "above 0"),
    ({"TRANSFER_OUTPUT_URI": "s3://bucket/runs"}, "gs://bucket/prefix"),
    ({"TRANSFER_OUTPUT_URI": "http://example.com/runs"}, "gs://bucket/prefix"),
    ({"TRANSFER_OUTPUT_URI": "gs://"}, "bucket's name"),
    ({"TRANSFER_OUTPUT_URI": "gs://Bucket/runs"}, "lower-case"),
    ({"TRANSFER_OUTPUT_URI": "gs://ab"}, "bucket's name"),
    ({"TRANSFER_OUTPUT_URI": "gs://10.0.0.1/runs"}, "bucket's name"),
    ({"TRANSFER_OUTPUT_URI": "gs://bucket-/runs"}, "bucket's name"),
    ({"TRANSFER_RUN_ID": "a/b"}, "letters, digits"),
    ({"TRANSFER_RUN_ID": ".hidden"}, "the first a letter or digit"),
    ({"TRANSFER_RUN_ID": "a" * 129}, "1 to 128"),
    ({"TRANSFER_COST_PER_HOUR": "-1"}, "at least 0"),
    ({"TRANSFER_COST_PER_HOUR": "1.20 EUR"}, "number"),
    ({"TRANSFER_MAX_SECONDS": "0"}, "above 0"),
    ({"TRANSFER_MAX_SECONDS": "-1"}, "above 0"),
    ({"TRANSFER_MAX_SECONDS": "nan"}, "number"),
    ({"TRANSFER_MAX_SECONDS": "inf"}, "number"),
    ({"TRANSFER_MAX_COST": "0", "TRANSFER_COST_PER_HOUR": "1"}, "above 0"),
    ({"TRANSFER_MAX_COST": "nan", "TRANSFER_COST_PER_HOUR": "1"}, "number"),
    ({"TRANSFER_MAX_COST": "5"}, "TRANSFER_COST_PER_HOUR, and none is set"),
    ({"TRANSFER_MAX_COST": "5", "TRANSFER_COST_PER_HOUR": "0"}, "TRANSFER_COST_PER_HOUR, and that is 0"),
    ({"TRANSFER_LOG_FORMAT": "jsonl"}, "did you mean json?"),
    ({"AIP_MODEL_DIR": "s3://bucket/model"}, "gs://"),
    ({"TF_CONFIG": "{"}, "not valid JSON"),
    ({"TF_CONFIG": "[" * 100_000}, "not valid JSON"),
    ({"TF_CONFIG": "[]"}, "not a JSON object"),
    ({"TF_CONFIG": '{"cluster": ["a:1"]}'}, "addresses"),
    ({"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}}'}, "no task.type and task.index"),
]


@pytest.mark.parametrize(("environ", "says"), MALFORMED, ids=[str(environ)[:60] for environ, _ in MALFORMED])
def test_a_malformed_variable_is_named_with_what_was_received_and_what_is_accepted(
    environ: dict[str, str], says: str
) -> None:
    (variable, value), *_ = environ.items()
    problems = problems_of(environ)
    assert list(problems) == [variable]
    message = problems[variable]
    assert says in message
    assert f"received {repr(value)[:79]}" in message
    for jargon in ("pydantic", "Input should", "String should", "Value error", "validation error", "http://errors"):
        assert jargon not in message


def test_all_mistakes_are_reported_together() -> None:
    environ = {
        "TRANSFER_EPOCS": "3",
        "TRANSFER_DATASET": "",
        "TRANSFER_BACKBONE": "mobilenetv2",
        "TRANSFER_DROPOUT": "much",
        "TRANSFER_SEEDS": "0,one",
        "TRANSFER_XLA": "maybe",
        "TRANSFER_OUTPUT_URI": "s3://bucket",
        "TRANSFER_CHECKPOINT_SECONDS": "-5",
        "TRANSFER_HEAD_EPOCHS": "10",
        "TRANSFER_MAX_COST": "5",
        "TRANSFER_TEST_SPLIT": "train[:20%]",
        "TF_CONFIG": "{",
    }
    assert set(problems_of(environ)) == set(environ)


def test_the_error_text_has_one_line_per_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"TRANSFER_EPOCHS": "x\ny", "TRANSFER_DROPOUT": "2"})
    assert len(str(caught.value).splitlines()) == len(caught.value.problems) == 2
    assert caught.value.exit_code == 78
    assert caught.value.__context__ is None


def test_a_check_over_two_variables_is_left_out_only_when_one_of_them_is_wrong() -> None:
    assert "TRANSFER_HEAD_EPOCHS" not in problems_of({"TRANSFER_HEAD_EPOCHS": "10", "TRANSFER_EPOCHS": "x"})
    assert "TRANSFER_HEAD_EPOCHS" in problems_of({"TRANSFER_HEAD_EPOCHS": "10", "TRANSFER_BATCH_SIZE": "x"})
    assert "TRANSFER_IMAGE_SIZE" not in problems_of({"TRANSFER_IMAGE_SIZE": "20", "TRANSFER_BACKBONE": "x"})
    splits = {"TRANSFER_TRAIN_SPLIT": "", "TRANSFER_VALIDATION_SPLIT": "a", "TRANSFER_TEST_SPLIT": "a"}
    assert "TRANSFER_VALIDATION_SPLIT" in problems_of(splits)["TRANSFER_TEST_SPLIT"]


def test_every_wrong_entry_of_a_list_is_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"TRANSFER_SEEDS": "1,x,2.5,-2"})
    assert [problem.variable for problem in caught.value.problems] == ["TRANSFER_SEEDS"] * 3
    for entry, problem in zip(("'x'", "'2.5'", "'-2'"), caught.value.problems, strict=True):
        assert f"of which {entry} is not accepted" in problem.message


def test_three_identical_splits_name_each_other() -> None:
    splits = ("TRANSFER_TRAIN_SPLIT", "TRANSFER_VALIDATION_SPLIT", "TRANSFER_TEST_SPLIT")
    with pytest.raises(ConfigError) as caught:
        load(dict.fromkeys(splits, "train"))
    assert all(split in str(caught.value) for split in splits)


def test_head_epochs_do_not_matter_where_nothing_is_fine_tuned() -> None:
    settings = load({"TRANSFER_HEAD_EPOCHS": "10", "TRANSFER_ARMS": "frozen,scratch"})
    assert settings.training.arms == ("frozen", "scratch")


@pytest.mark.parametrize(("epochs", "head"), [(1, 0), (2, 1), (3, 1), (5, 1), (10, 2), (100, 20)])
def test_default_head_epochs_leave_an_epoch_to_fine_tune(epochs: int, head: int) -> None:
    assert default_head_epochs(epochs) == head < epochs
    assert load({"TRANSFER_EPOCHS": str(epochs)}).training.resolved_head_epochs == head


def test_an_empty_environment_gives_the_defaults() -> None:
    assert load({}) == load({"PATH": "/bin", "TRANSFERRED": "1"}) == Settings()


def test_the_process_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFER_EPOCHS", "7")
    assert load().training.epochs == 7
    assert TrainingSettings().epochs == 10


@pytest.mark.parametrize("variable", CONTRACT_DEFAULTS)
def test_the_default_is_the_contracts(variable: str) -> None:
    row = next(row for row in variables() if row.name == variable)
    expected = CONTRACT_DEFAULTS[variable]
    assert row.default if expected is None else row.default == expected


def test_the_variables_come_in_the_contracts_order_and_the_platforms_last() -> None:
    names = [row.name for row in variables()]
    assert names[: len(CONTRACT_DEFAULTS)] == list(CONTRACT_DEFAULTS)
    assert not any(name.startswith("TRANSFER_") for name in names[len(CONTRACT_DEFAULTS) :])


# An experiment that differs in everything: each value must arrive, as the type that it has in Python.
DIFFERENT = {
    "TRANSFER_DATASET": ("tf_flowers:3.0.1", "tf_flowers:3.0.1"),
    "TRANSFER_DATA_DIR": ("gs://my_bucket.example/tfds", "gs://my_bucket.example/tfds"),
    "TRANSFER_TRAIN_SPLIT": ("train[:80%]", "train[:80%]"),
    "TRANSFER_VALIDATION_SPLIT": ("validation+extra", "validation+extra"),
    "TRANSFER_TEST_SPLIT": ("test", "test"),
    "TRANSFER_TRAIN_FRACTIONS": ("0.25,1", (0.25, 1.0)),
    "TRANSFER_MAX_BAD_IMAGES": ("0", 0.0),
    "TRANSFER_BACKBONE": ("Xception", "Xception"),
    "TRANSFER_IMAGE_SIZE": ("71", 71),
    "TRANSFER_WEIGHTS": ("weights/no_top.h5", "weights/no_top.h5"),
    "TRANSFER_WEIGHTS_SHA256": ("AB" * 32, "ab" * 32),
    "TRANSFER_TRUNCATE_AT": ("add_7", "add_7"),
    "TRANSFER_HEAD_UNITS": ("256, 256", (256, 256)),
    "TRANSFER_DROPOUT": ("0.5", 0.5),
    "TRANSFER_ARMS": ("fine_tune,scratch", ("fine_tune", "scratch")),
    "TRANSFER_FINE_TUNE_FROM": ("all", "all"),
    "TRANSFER_EPOCHS": ("4", 4),
    "TRANSFER_HEAD_EPOCHS": ("0", 0),
    "TRANSFER_BATCH_SIZE": ("2", 2),
    "TRANSFER_OPTIMIZER": ("adamw", "adamw"),
    "TRANSFER_LEARNING_RATE": ("1e-2", 0.01),
    "TRANSFER_FINE_TUNE_LEARNING_RATE": ("1e-5", 1e-5),
    "TRANSFER_SEEDS": ("2147483647,0", (2**31 - 1, 0)),
    "TRANSFER_PRECISION": ("mixed_bfloat16", "mixed_bfloat16"),
    "TRANSFER_XLA": ("off", "off"),
    "TRANSFER_DETERMINISTIC": ("yes", True),
    "TRANSFER_FEATURE_CACHE": ("off", "off"),
    "TRANSFER_AUGMENTATION": ("standard", "standard"),
    "TRANSFER_CACHE_DIR": ("/scratch", "/scratch"),
    "TRANSFER_CHECKPOINT_URI": ("/checkpoints", "/checkpoints"),
    "TRANSFER_CHECKPOINT_SECONDS": ("2.5", 2.5),
    "TRANSFER_OUTPUT_URI": ("gs://bucket/runs/", "gs://bucket/runs/"),
    "TRANSFER_RUN_ID": ("a" * 128, "a" * 128),
    "TRANSFER_COST_PER_HOUR": ("1.2", 1.2),
    "TRANSFER_LOG_FORMAT": ("json", "json"),
    "TRANSFER_MAX_SECONDS": ("3600", 3600.0),
    "TRANSFER_MAX_COST": ("2.5", 2.5),
}


def test_every_variable_arrives_with_its_type() -> None:
    assert set(DIFFERENT) == set(CONTRACT_DEFAULTS)
    settings = load({variable: text for variable, (text, _) in DIFFERENT.items()})
    groups = (settings.data, settings.model, settings.training, settings.runtime, settings.output)
    values = {f"TRANSFER_{name.upper()}": value for group in groups for name, value in group}
    for variable, (_, expected) in DIFFERENT.items():
        assert (values[variable], type(values[variable])) == (expected, type(expected)), variable


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", True), ("TRUE", True), ("1", True), ("Yes", True), ("false", False), ("0", False), ("nO", False)],
)
def test_booleans_are_read_in_any_letter_case(text: str, expected: bool) -> None:
    assert load({"TRANSFER_DETERMINISTIC": text}).runtime.deterministic is expected


@pytest.mark.parametrize("row", variables(), ids=lambda row: row.name)
def test_an_empty_value_is_unset_where_the_default_is_blank_and_an_error_elsewhere(row: Variable) -> None:
    if row.default == "":
        assert load({row.name: ""}) == Settings()
    else:
        assert list(problems_of({row.name: ""})) == [row.name]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_takes_its_smallest_image_and_none_smaller(backbone: str) -> None:
    smallest = BACKBONES[backbone].minimum_size
    environ = {"TRANSFER_BACKBONE": backbone, "TRANSFER_IMAGE_SIZE": str(smallest)}
    assert load(environ).resolved()["fine_tune_from"] == BACKBONES[backbone].fine_tune_from
    assert list(problems_of(environ | {"TRANSFER_IMAGE_SIZE": str(smallest - 1)})) == ["TRANSFER_IMAGE_SIZE"]


def test_the_platforms_variables_are_read_under_their_own_names() -> None:
    config = '{"cluster": {"chief": ["a:1"]}, "task": {"type": "chief", "index": 0}}\n'
    platform = load({"AIP_MODEL_DIR": "gs://bucket/model/", "TF_CONFIG": config, "TFDS_DATA_DIR": "/d"}).platform
    assert (platform.model_dir, platform.tf_config, platform.tfds_data_dir) == ("gs://bucket/model/", config, "/d")
    assert platform.checkpoint_dir is None


@pytest.mark.parametrize(("text", "expected"), [("", None), ("0", 0), ("27917287424", 27_917_287_424)])
def test_the_limit_of_ephemeral_storage_is_a_number_of_bytes(text: str, expected: int | None) -> None:
    assert load({"EPHEMERAL_STORAGE_LIMIT": text}).platform.ephemeral_storage_limit == expected


@pytest.mark.parametrize("text", ["26Gi", "-1", "many"])
def test_a_limit_of_ephemeral_storage_that_is_no_number_of_bytes_is_refused(text: str) -> None:
    message = problems_of({"EPHEMERAL_STORAGE_LIMIT": text})["EPHEMERAL_STORAGE_LIMIT"]
    assert f"received '{text}'; accepted: a whole number, at least 0" in message


def test_no_secret_of_a_value_is_repeated_in_an_error() -> None:
    environ = {
        "TRANSFER_WEIGHTS": "https://user:hunter2@example.com/w.h5?X-Goog-Signature=hunter2",
        "TRANSFER_OUTPUT_URI": "gs://key:hunter2@bucket/runs",
        "TRANSFER_DATASET": "gs://bucket/cats?token=hunter2",
        "TRANSFER_ARMS": "frozen,https://example.com/?token=hunter2",
        "TRANSFER_API_TOKEN": "hunter2",
        "TRANSFER_SIGNED": "https://example.com/?sig=hunter2",
        "AIP_MODEL_DIR": "https://example.com/model?sig=hunter2",
    }
    problems = problems_of(environ)
    assert set(problems) == set(environ)
    assert "hunter2" not in str(problems)
    assert "https://example.com/w.h5" in problems["TRANSFER_WEIGHTS"]


def test_a_long_value_is_cut_in_an_error() -> None:
    message = problems_of({"TRANSFER_RUN_ID": "x/" * 5000})["TRANSFER_RUN_ID"]
    assert "'x/x/" in message
    assert len(message) < 250


def test_resolved_holds_every_setting_as_json_with_defaults_filled_in() -> None:
    resolved = load({"TRANSFER_EPOCHS": "20"}).resolved()
    assert [f"TRANSFER_{name.upper()}" for name in resolved] == list(CONTRACT_DEFAULTS)
    assert json.loads(json.dumps(resolved, allow_nan=False)) == resolved
    assert resolved["head_epochs"] == default_head_epochs(20)
    assert resolved["fine_tune_from"] == "block_11_expand_BN"
    assert resolved["arms"] == ["scratch", "frozen", "fine_tune"]


def test_resolved_never_holds_a_secret() -> None:
    environ = {"STORAGE_EMULATOR_HOST": "http://user:hunter2@localhost:1", "TFDS_DATA_DIR": "/d?token=hunter2"}
    environ |= {"TRANSFER_DATA_DIR": "data?token=hunter2", "TRANSFER_WEIGHTS": "dir/w.h5?sig=hunter2"}
    environ |= {"TRANSFER_CACHE_DIR": "mnt/x://me:hunter2@host/cache?sig=hunter2"}
    settings = load(environ)
    assert settings.output == OutputSettings()
    assert "hunter2" not in json.dumps(settings.resolved())
    assert settings.resolved()["weights"] == "dir/w.h5"
    assert settings.model.weights == "dir/w.h5?sig=hunter2"


DECIDING = ("TRAIN_SPLIT", "BACKBONE", "DROPOUT", "ARMS", "EPOCHS", "SEEDS", "PRECISION")
NOT_DECIDING = (
    *("DATASET", "DATA_DIR", "WEIGHTS", "WEIGHTS_SHA256", "CACHE_DIR"),
    *("OUTPUT_URI", "RUN_ID", "MAX_BAD_IMAGES", "COST_PER_HOUR", "LOG_FORMAT", "MAX_SECONDS", "MAX_COST"),
)


@pytest.mark.parametrize("name", DECIDING + NOT_DECIDING)
def test_only_what_decides_the_result_enters_the_fingerprint(name: str) -> None:
    # without a price, a cost is refused
    names = [name, "COST_PER_HOUR"] if name == "MAX_COST" else [name]
    changed = load({f"TRANSFER_{each}": DIFFERENT[f"TRANSFER_{each}"][0] for each in names})
    assert changed != Settings()
    assert (fingerprint(changed.deciding()) != fingerprint(Settings().deciding())) is (name in DECIDING)


def test_a_default_that_is_spelled_out_does_not_change_the_fingerprint() -> None:
    spelled = load(
        {"TRANSFER_HEAD_EPOCHS": str(default_head_epochs(10)), "TRANSFER_FINE_TUNE_FROM": "block_11_expand_BN"}
    )
    assert fingerprint(spelled.deciding()) == fingerprint(load({}).deciding())


def test_the_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    one = fingerprint({"a": 1, "b": {"c": [1.5, None], "d": "é"}})
    assert one == fingerprint({"b": {"d": "é", "c": [1.5, None]}, "a": 1})
    assert one != fingerprint({"a": 1, "b": {"c": [1.5, None], "d": "e"}})
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1}, object()])
def test_the_fingerprint_refuses_what_has_no_json_form(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        fingerprint({"a": value})


def test_settings_cannot_be_changed() -> None:
    settings = load({})
    with pytest.raises(ValidationError, match="frozen"):
        settings.training.epochs = 3
    with pytest.raises(AttributeError):
        settings.training = TrainingSettings()  # type: ignore[misc]


def test_settings_made_in_code_are_checked_too() -> None:
    for wrong in (
        lambda: OutputSettings(checkpoint_seconds=0),
        lambda: OutputSettings(checkpoint_uri="s3://bucket"),
        lambda: TrainingSettings(seeds=(1, 1)),
        lambda: DataSettings(dataset=""),
        lambda: ModelSettings(image_sise=3),
    ):
        with pytest.raises(ValidationError):
            wrong()


CHOICES = [row for row in variables() if "choice" in row.type]


@pytest.mark.parametrize("row", CHOICES, ids=lambda row: row.name)
def test_the_meaning_of_a_choice_names_every_choice(row: Variable) -> None:
    accepted = problems_of({row.name: "?"})[row.name].partition("accepted: ")[2]
    choices = accepted.rpartition("each ")[2].replace(" or ", ", ").split(", ")
    assert len(choices) >= 2
    assert all(choice in row.meaning for choice in choices)


def test_the_markdown_table_is_aligned_and_whole() -> None:
    lines = variables_markdown().splitlines()
    assert len(lines) == len(variables()) + 2
    bars = {tuple(index for index, letter in enumerate(line) if letter == "|") for line in lines}
    assert [len(bar) for bar in bars] == [5]
    assert set(lines[1]) == set("| -")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", "auto"), ("text", "text"), ("json", "json"), ("JSON", "auto"), (" json", "auto"), ("", "auto")],
)
def test_the_log_format_is_known_before_the_settings_are_right(text: str, expected: str) -> None:
    assert log_format({"TRANSFER_LOG_FORMAT": text, "TRANSFER_XLA": "maybe", "TRANSFER_EPOCS": "3"}) == expected


def test_the_log_format_is_read_from_the_process_environment_when_none_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert log_format({}) == "auto"
    monkeypatch.setenv("TRANSFER_LOG_FORMAT", "json")
    assert log_format() == "json"


def test_tensorflow_is_quietened_unless_told_otherwise() -> None:
    unset: dict[str, str] = {}
    told = {"TF_CPP_MIN_LOG_LEVEL": "0"}
    prepare_tensorflow(unset)
    prepare_tensorflow(told)
    assert unset["TF_CPP_MIN_LOG_LEVEL"] == "2"
    assert told == unset | {"TF_CPP_MIN_LOG_LEVEL": "0"}


def test_pools_have_as_many_threads_as_there_are_cpus_unless_told_otherwise() -> None:
    environ = {"OMP_NUM_THREADS": "7"}
    bound_threads(3, environ)
    three = dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OPENBLAS_NUM_THREADS"), "3")
    assert environ == three | {"OMP_NUM_THREADS": "7"}


def test_a_settings_error_and_the_table_need_neither_tensorflow_nor_keras() -> None:
    program = (
        "import sys, job.settings.environment as s; s.variables_markdown()\n"
        "try: s.load({'TRANSFER_EPOCHS': 'x'})\n"
        "except s.ConfigError: print(sorted({'tensorflow', 'keras', 'google.cloud.storage', 'job.settings.environment'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "['job.settings.environment']\n"


@pytest.mark.parametrize(
    "name", ["TRANSFER_EPOCHS", "TRANSFER_HEAD_EPOCHS", "TRANSFER_HEAD_UNITS", "TRANSFER_COST_PER_HOUR"]
)
def test_a_number_that_cannot_be_computed_with_is_refused(name: str) -> None:
    with refused(name, "and at most 1000000000") as caught:
        load({name: "9" * 400})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["TRANSFER_X\n12:00:00 published", "TRANSFER_\udcff", "TRANSFER_" + "A" * 100_000])
def test_an_unknown_name_is_shown_so_that_it_writes_no_line_of_the_log(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({name: "1"})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
