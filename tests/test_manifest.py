from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError

from job import manifest
from job.manifest import SCHEMA_VERSION, Manifest, Record, json_schema
from tests.support.small_runs import fields

# The names that readers of a bucket depend on, in the order of the contract. The settings' own names are free here.
METRICS = [
    *("examples", "loss", "accuracy", "accuracy_interval", "auc", "calibration_error", "reliability"),
    *("confusion", "per_class"),
]
PER_CLASS = ["name", "precision", "recall", "f1", "support"]
SPLITS = ["train", "validation", "test"]
RESULT = [
    *("arm", "train_fraction", "seed", "train_examples", "resumed", "parameters", "history", "metrics", "batch_norm"),
    *("most_wrong", "rows", "seconds", "examples_per_second", "xla", "energy_joules", "cost", "saved_model"),
    "export_proof",
]
NAMES = {
    "": [
        *("schema_version", "run_id", "created", "fingerprint", "code", "settings", "environment", "dataset"),
        *("backbone", "results", "summaries", "verdict", "comparisons", "artifacts"),
    ],
    "code": ["version", "digest", "revision", "image"],
    "environment": [
        *("python", "tensorflow", "keras", "tensorflow_datasets", "job"),
        *("devices", "workers", "precision", "tf32", "xla", "deterministic"),
    ],
    "dataset": [
        *("name", "version", "classes", "skipped_examples", "duplicates_across_splits", "duplicates", "splits"),
        *("licence", "citation", "homepage"),
    ],
    "dataset.duplicates": ["kind", "examples"],
    "dataset.duplicates.examples": ["split", "example_id"],
    "dataset.splits": SPLITS,
    **{f"dataset.splits.{split}": ["expression", "examples"] for split in SPLITS},
    "backbone": ["name", "image_size", "layers", "parameters", "weights"],
    "backbone.weights": ["source", "sha256", "licence"],
    "results": RESULT,
    "results.rows": ["cut", "row_bytes", "kept"],
    "results.parameters": ["total", "trainable", "backbone_trainable"],
    "results.history": [
        *("epoch", "phase", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "seconds"),
    ],
    "results.metrics": SPLITS,
    **{f"results.metrics.{split}": METRICS for split in SPLITS},
    **{f"results.metrics.{split}.reliability": ["examples", "confidence", "accuracy"] for split in SPLITS},
    **{f"results.metrics.{split}.per_class": PER_CLASS for split in SPLITS},
    "results.most_wrong": ["example_id", "label", "predicted", "label_probability", "predicted_probability"],
    "results.batch_norm": ["test_accuracy_raw", "test_accuracy_recalibrated"],
    "results.export_proof": [
        *("examples", "logit_spread", "largest_logit_difference", "tolerance", "largest_probability_difference"),
        "same_class",
    ],
    "results.seconds": ["data", "features", "training", "evaluation", "export", "total"],
    "summaries": [
        *("arm", "train_fraction", "train_examples", "seeds", "test_accuracy", "interval", "method", "seconds", "cost"),
        *("own_seconds", "own_cost"),
    ],
    "comparisons": [
        *("train_fraction", "seeds", "better", "worse", "difference", "interval", "p_value", "method", "verdict"),
    ],
    "artifacts": ["path", "bytes", "sha256", "crc32c"],
}

Path = tuple[str | int, ...]


def complete() -> dict[str, Any]:
    """Return a manifest in which nothing is left out, as JSON values."""
    document = fields()
    document["dataset"] |= {
        "duplicates_across_splits": 1,
        "duplicates": [{"kind": "near", "examples": [{"split": "train", "example_id": "a__0"}]}],
        "licence": "CC BY 2.0",
        "citation": "A paper",
        "homepage": "https://example.com",
    }
    document["environment"]["tf32"] = True
    document["code"] = {"version": "0.1.0", "digest": "d" * 64, "revision": "5a0f", "image": "job@sha256:" + "e" * 64}
    document["backbone"]["weights"]["licence"] = "MIT"
    (result,) = document["results"]
    for metrics in result["metrics"].values():
        metrics["reliability"] = [{"examples": metrics["examples"], "confidence": 0.625, "accuracy": 0.5}]
    epoch = dict.fromkeys(("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "seconds"), 0.5)
    result["history"] = [{"epoch": 1, "phase": "all", **epoch}]
    wrong = {"example_id": "a__1", "label": "cat", "predicted": "dog"}
    result["most_wrong"] = [{**wrong, "label_probability": 0.25, "predicted_probability": 0.75}]
    result["batch_norm"] = {"test_accuracy_raw": 0.4, "test_accuracy_recalibrated": 0.5}
    result |= {"xla": True, "energy_joules": 12.5, "cost": 0.25}
    logits = {"logit_spread": 1.5, "largest_logit_difference": 0.25, "tolerance": 0.5}
    result["export_proof"] = {"examples": 24, **logits, "largest_probability_difference": 0.125, "same_class": 23}
    examples = {"train_fraction": 1.0, "train_examples": 30, "seeds": [0]}
    accuracy = {"test_accuracy": 0.5, "interval": [0.25, 0.75], "method": "Wilson", "seconds": 1.25, "cost": 0.25}
    accuracy |= {"own_seconds": 1.0, "own_cost": 0.2}
    difference = {"difference": 0.1, "interval": [-0.05, 0.25], "p_value": 0.3, "method": "McNemar"}
    arms = {"train_fraction": 1.0, "seeds": [0], "better": "fine_tune", "worse": "scratch"}
    return document | {
        "summaries": [{"arm": "scratch", **examples, **accuracy}],
        "verdict": "No difference shown.",
        "comparisons": [{**arms, **difference, "verdict": "No difference shown."}],
        "artifacts": [{"path": "report.html", "bytes": 5, "sha256": "f" * 64, "crc32c": "yZRlqg=="}],
    }


def places(value: Any, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every value in a document, but those inside the settings, with where it stands."""
    yield at, value
    if at != ("settings",):
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, each in inside:
            yield from places(each, (*at, key))


def changed(at: Path, *value: Any) -> dict[str, Any]:
    """Return the complete manifest with another value at one place, or without it if none is given."""
    document = complete()
    parent: Any = document
    for key in at[:-1]:
        parent = parent[key]
    if value:
        parent[at[-1]] = value[0]
    else:
        del parent[at[-1]]
    return document


def accepted(document: dict[str, Any]) -> bool:
    """Return whether a reader with the schema takes the document; the program must say the same."""
    by_schema = Draft202012Validator(json_schema()).is_valid(document)
    try:
        Manifest.model_validate_json(json.dumps(document))
    except ValidationError:
        assert not by_schema
        return False
    assert by_schema
    return True


def names(document: dict[str, Any]) -> dict[str, list[str]]:
    """Return the names in each object of a document, in order, under where it stands, whatever the entry of a list."""
    return {
        ".".join(key for key in at if isinstance(key, str)): list(value)
        for at, value in places(document)
        if isinstance(value, dict) and at != ("settings",)
    }


def shown(at: Path) -> str:
    return ".".join(map(str, at))


FIELDS = [at for at, _ in places(complete()) if at and isinstance(at[-1], str)]
OBJECTS = [at for at, value in places(complete()) if isinstance(value, dict) and at != ("settings",)]
FLOATS = [at for at, value in places(complete()) if isinstance(value, float)]
OPTIONAL = [("results", 0, name) for name in ("batch_norm", "energy_joules", "cost")] + [("summaries", 0, "cost")]
OPTIONAL += [("code", name) for name in ("revision", "image")]
# What runs were published without before it was kept.
LATER = [("environment", "tf32"), ("results", 0, "xla"), ("results", 0, "export_proof"), ("code",)]
LATER += [("summaries", 0, "own_seconds"), ("summaries", 0, "own_cost")]
# What the contract's list does not name; a reader finds it empty or null where it is missing.
ADDED = {"duplicates", "licence", "citation", "homepage", "reliability", "most_wrong", "summaries", "verdict", "seeds"}


def test_the_field_names_are_the_published_ones() -> None:
    dumped = json.loads(Manifest.model_validate(complete()).to_json())
    assert names(dumped) == NAMES


def test_the_schema_describes_the_same_names() -> None:
    schema = json_schema()
    objects = [schema, *schema["$defs"].values()]
    assert {tuple(each["properties"]) for each in objects} == {tuple(each) for each in NAMES.values()}


def test_a_complete_manifest_round_trips_through_json() -> None:
    record = Manifest.model_validate(complete())
    data = record.to_json()
    assert Manifest.model_validate_json(data) == record
    assert Manifest.model_validate_json(data).to_json() == data
    assert json.loads(data) == complete()


def test_the_published_form_is_indented_utf8_with_a_newline_at_its_end() -> None:
    document = changed(("dataset", "classes"), ["Käfer", "犬"])
    data = Manifest.model_validate(document).to_json()
    assert data.startswith(b'{\n  "schema_version": "1.0",\n')
    assert data.endswith(b"\n}\n")
    assert "Käfer" in data.decode("utf-8")


def test_the_time_is_rfc_3339_in_utc() -> None:
    record = Manifest.model_validate(changed(("created",), datetime(2025, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)))
    assert json.loads(record.to_json())["created"] == "2025-01-02T03:04:05.678000Z"


def test_the_schema_is_a_valid_draft_2020_12_schema() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema


def test_the_schema_accepts_what_is_published() -> None:
    validator = Draft202012Validator(json_schema())
    assert not list(validator.iter_errors(json.loads(Manifest.model_validate(complete()).to_json())))
    assert accepted(complete())


@pytest.mark.parametrize("at", OBJECTS, ids=shown)
def test_an_extra_field_is_refused(at: Path) -> None:
    assert not accepted(changed((*at, "extra"), 1))


def test_settings_may_have_any_name() -> None:
    assert accepted(changed(("settings", "extra"), 1))


@pytest.mark.parametrize("at", [at for at in FIELDS if at not in OPTIONAL + LATER and at[-1] not in ADDED], ids=shown)
def test_a_missing_field_is_refused(at: Path) -> None:
    assert not accepted(changed(at))


@pytest.mark.parametrize("at", OPTIONAL + LATER, ids=shown)
def test_what_applies_to_some_results_only_or_came_later_may_be_missing(at: Path) -> None:
    assert accepted(changed(at))


@pytest.mark.parametrize(
    "at", [("fingerprint",), ("backbone", "weights", "sha256"), ("artifacts", 0, "sha256")], ids=shown
)
@pytest.mark.parametrize("value", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, " " + "0" * 64])
def test_what_is_no_sha256_is_refused(at: Path, value: str) -> None:
    assert not accepted(changed(at, value))


@pytest.mark.parametrize("value", ["", "yZRlqg", "yZRlqg=", "yZRl_g==", "c99465aa", "yZRlqgAA=="])
def test_what_is_no_crc32c_is_refused(value: str) -> None:
    assert not accepted(changed(("artifacts", 0, "crc32c"), value))


@pytest.mark.parametrize("at", [("artifacts", 0, "path"), ("results", 0, "saved_model")], ids=shown)
@pytest.mark.parametrize(
    "value",
    ["", "/", "/a", "a/", "a//b", ".", "..", "./a", "../a", "a/..", "a/./b", "a\\b", "a\tb", "\0", "\x80", "a" * 1025],
)
def test_what_is_no_path_inside_the_run_is_refused(at: Path, value: str) -> None:
    assert not accepted(changed(at, value))


@pytest.mark.parametrize("value", ["a", ".a", "..a", "...", "a..", "a/.b/..c/...", "größe 1%/ä?#", "a" * 1024])
def test_any_other_path_is_taken(value: str) -> None:
    assert accepted(changed(("artifacts", 0, "path"), value))


def test_a_path_that_ends_with_a_line_break_is_refused() -> None:
    with pytest.raises(ValidationError):
        Manifest.model_validate(changed(("artifacts", 0, "path"), "a\n"))


def test_a_row_of_a_matrix_is_one_line_and_texts_stay_as_they_are() -> None:
    document = changed(("verdict",), "[\n  1,\n  2\n] [ 1, 2 ]")
    data = Manifest.model_validate(document).to_json()
    assert json.loads(data) == document
    assert data.count(b"[14,1],") == 1
    assert b'"seeds": [0]' in data


def test_every_number_is_looked_at() -> None:
    assert ("results", 0, "metrics", "test", "per_class", 1, "f1") in FLOATS
    assert len(FLOATS) > 50


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_everywhere(value: float) -> None:
    for at in FLOATS:
        with pytest.raises(ValidationError):
            Manifest.model_validate(changed(at, value))
        # as Python's parser takes it, though it is no JSON
        with pytest.raises(ValidationError):
            Manifest.model_validate_json(json.dumps(changed(at, value)))


def test_the_null_that_json_has_in_place_of_nan_is_refused() -> None:
    nullable = [at for at in FLOATS if at[-1] in ("auc", "cost", "energy_joules", "own_seconds", "own_cost")]
    for at in FLOATS:
        assert accepted(changed(at, None)) == (at in nullable), at


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("schema_version",), "1.1"),
        (("backbone", "image_size"), 0),
        (("environment", "workers"), 0),
        (("environment", "devices"), "CPU"),
        (("dataset", "skipped_examples"), -1),
        (("dataset", "skipped_examples"), 0.5),
        (("results", 0, "train_fraction"), 0),
        (("results", 0, "train_fraction"), 1.01),
        (("results", 0, "metrics", "test", "accuracy"), 1.01),
        (("results", 0, "metrics", "test", "accuracy_interval"), [0.5]),
        (("results", 0, "metrics", "test", "accuracy_interval"), [0.1, 0.2, 0.3]),
        (("results", 0, "metrics", "test", "confusion"), [[1, -1], [0, 1]]),
        (("results", 0, "history", 0, "epoch"), 0),
        (("results", 0, "seconds", "total"), -1),
        (("comparisons", 0, "p_value"), 1.5),
        (("artifacts", 0, "bytes"), -1),
    ],
    ids=lambda value: shown(value) if isinstance(value, tuple) else repr(value),
)
def test_a_value_that_cannot_be_is_refused(at: Path, value: Any) -> None:
    assert not accepted(changed(at, value))


@pytest.mark.parametrize("name", ["batch_norm", "energy_joules", "cost", "export_proof"])
def test_what_does_not_apply_is_absent_not_null(name: str) -> None:
    for document in (changed(("results", 0, name)), changed(("results", 0, name), None)):
        (result,) = json.loads(Manifest.model_validate(document).to_json())["results"]
        assert list(result) == [each for each in RESULT if each != name]


def test_a_cost_of_zero_stays() -> None:
    (result,) = json.loads(Manifest.model_validate(changed(("results", 0, "cost"), 0.0)).to_json())["results"]
    assert result["cost"] == 0


def test_an_auc_that_does_not_exist_is_null_not_absent() -> None:
    at = ("results", 0, "metrics", "test", "auc")
    assert json.loads(Manifest.model_validate(changed(at, None)).to_json()) == changed(at, None)
    assert accepted(changed(at, None))
    assert not accepted(changed(at))


def test_weights_are_null_where_none_were_loaded() -> None:
    document = changed(("backbone", "weights"), None)
    assert json.loads(Manifest.model_validate(document).to_json()) == document
    assert accepted(document)


def test_the_version_is_the_published_one() -> None:
    assert SCHEMA_VERSION == "1.0" == json_schema()["properties"]["schema_version"]["const"]


def records(value: object) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
        value = tuple(getattr(value, name) for name in type(value).model_fields)
    if isinstance(value, tuple):
        for each in value:
            yield from records(each)


def test_every_record_is_frozen() -> None:
    found = list(records(Manifest.model_validate(complete())))
    declared = {each for each in vars(manifest).values() if isinstance(each, type) and issubclass(each, Record)}
    assert {type(record) for record in found} == declared - {Record}
    for record in found:
        before = copy.deepcopy(record)
        for name in type(record).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(record, name, getattr(record, name))
        assert record == before


def test_no_list_in_a_record_can_grow() -> None:
    record = Manifest.model_validate(complete())
    test = record.results[0].metrics.test
    lists = (record.results, record.artifacts, record.dataset.classes, test.confusion, test.confusion[0])
    assert {type(each) for each in lists} == {tuple}
