"""A run is published once and whole, or not at all; and every kind of damage is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from job.errors import ConfigError, UnavailableError
from job.manifest import Artifact, Manifest, json_schema
from job.publishing import Outcome, commit, existing, read_manifest, upload_tree, verify
from job.storage import Store, checksums, open_store

FINGERPRINT = "ab" * 32
MODEL = "arms/frozen/fraction-1.0/seed-0/saved_model"
FILES = {
    f"{MODEL}/saved_model.pb": b"graph",
    f"{MODEL}/variables/variables.index": b"index",
    "arms/frozen/fraction-1.0/seed-0/predictions.csv": b"id,label,cat,dog\r\n",
    "report.html": b"<html></html>",
    "manifest.schema.json": json.dumps(json_schema()).encode(),
}


def metrics(examples: int, correct: int) -> dict[str, Any]:
    half = examples // 2
    wrong = examples - correct
    names = [("cat", half), ("dog", examples - half)]
    return {
        "examples": examples,
        "loss": 0.5,
        "accuracy": correct / examples,
        "accuracy_interval": [0, 1],
        "auc": 0.9,
        "calibration_error": 0.1,
        "confusion": [[half - wrong, wrong], [0, examples - half]],
        "per_class": [{"name": name, "precision": 0.9, "recall": 0.9, "f1": 0.9, "support": n} for name, n in names],
    }


def manifest(artifacts: list[Artifact], **changes: Any) -> Manifest:
    names = ("data", "features", "training", "evaluation", "export", "total")
    sizes = {"train": 30, "validation": 10, "test": 12}
    fields = {
        "schema_version": "1.0",
        "run_id": "run",
        "created": datetime(2025, 1, 2, tzinfo=UTC),
        "fingerprint": FINGERPRINT,
        "settings": {"dataset": "cats_vs_dogs"},
        "environment": {
            **dict.fromkeys(("python", "tensorflow", "keras", "tensorflow_datasets", "job"), "1"),
            "devices": ["CPU"],
            "workers": 1,
            "precision": "float32",
            "xla": False,
            "deterministic": False,
        },
        "dataset": {
            "name": "cats_vs_dogs",
            "version": "4.0.1",
            "classes": ["cat", "dog"],
            "skipped_examples": 0,
            "duplicates_across_splits": 0,
            "splits": {split: {"expression": split, "examples": size} for split, size in sizes.items()},
        },
        "backbone": {
            "name": "MobileNetV2",
            "image_size": 160,
            "layers": 154,
            "parameters": 2257984,
            "weights": {"source": "imagenet", "sha256": "0" * 64},
        },
        "results": [
            {
                "arm": "frozen",
                "train_fraction": 1.0,
                "seed": 0,
                "train_examples": 30,
                "resumed": 0,
                "parameters": {"total": 10, "trainable": 5, "backbone_trainable": 0},
                "history": [],
                "metrics": {split: metrics(size, size - 1) for split, size in sizes.items()},
                "seconds": dict.fromkeys(names, 1.0),
                "rows": {"cut": "pooled", "row_bytes": 5120, "kept": "memory"},
                "examples_per_second": 10.0,
                "saved_model": MODEL,
            }
        ],
        "comparisons": [],
        "artifacts": artifacts,
    }
    return Manifest.model_validate(fields | changes)


@pytest.fixture(params=["local", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "store" / "run"), "TRANSFER_OUTPUT_URI")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("server"))
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    return open_store(f"gs://bucket/{name}/run", "TRANSFER_OUTPUT_URI", 30)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "tree" / MODEL / "assets").mkdir()
    return tmp_path / "tree"


def test_a_tree_is_uploaded_whole_under_its_prefix(store: Store, tree: Path) -> None:
    artifacts = upload_tree(store, tree, "some/prefix")
    assert [artifact.path for artifact in artifacts] == sorted(f"some/prefix/{name}" for name in FILES)
    for artifact in artifacts:
        measured = checksums(tree / artifact.path.removeprefix("some/prefix/"))
        assert (artifact.bytes, artifact.sha256, artifact.crc32c) == measured == store.checksums(artifact.path)


def test_a_tree_that_is_not_there_is_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError):
        upload_tree(store, tmp_path / "absent")


def test_a_published_run_is_sound(store: Store, tree: Path) -> None:
    artifacts = upload_tree(store, tree)
    assert not existing(store, FINGERPRINT)
    assert read_manifest(store) is None
    assert verify(store.uri) == [f"{store.uri} has no manifest.json: the run is not complete"]
    assert commit(store, manifest(artifacts)) is Outcome.PUBLISHED
    assert read_manifest(store) == manifest(artifacts)
    assert existing(store, FINGERPRINT)
    assert verify(store.uri) == []


def test_the_same_run_is_published_once(store: Store, tree: Path) -> None:
    artifacts = upload_tree(store, tree)
    assert commit(store, manifest(artifacts)) is Outcome.PUBLISHED
    later = manifest(artifacts, created=datetime(2025, 1, 3, tzinfo=UTC))
    assert commit(store, later) is Outcome.ALREADY_PUBLISHED
    assert read_manifest(store) == manifest(artifacts)


def test_of_runs_that_commit_at_once_one_publishes(store: Store, tree: Path) -> None:
    artifacts = upload_tree(store, tree)
    runs = [manifest(artifacts, created=datetime(2025, 1, day, tzinfo=UTC)) for day in range(1, 6)]
    with ThreadPoolExecutor(len(runs)) as pool:
        outcomes = list(pool.map(lambda run: commit(store, run), runs))
    assert sorted(outcome.name for outcome in outcomes) == ["ALREADY_PUBLISHED"] * 4 + ["PUBLISHED"]
    assert read_manifest(store) == runs[outcomes.index(Outcome.PUBLISHED)]
    assert verify(store.uri) == []


def test_another_experiment_under_this_id_is_a_wrong_setting(store: Store, tree: Path) -> None:
    commit(store, manifest(upload_tree(store, tree)))
    other = manifest(upload_tree(store, tree), fingerprint="cd" * 32)
    for attempt in (lambda: commit(store, other), lambda: existing(store, other.fingerprint)):
        with pytest.raises(ConfigError, match="another experiment") as caught:
            attempt()
        assert caught.value.problems[0].variable == "TRANSFER_RUN_ID"
    assert existing(store, FINGERPRINT)


def test_something_else_under_the_manifests_name_is_a_wrong_setting(store: Store, tree: Path) -> None:
    artifacts = upload_tree(store, tree)
    store.put_bytes("manifest.json", b"[]")
    for attempt in (lambda: commit(store, manifest(artifacts)), lambda: existing(store, FINGERPRINT)):
        with pytest.raises(ConfigError, match="no manifest") as caught:
            attempt()
        assert caught.value.problems[0].variable == "TRANSFER_RUN_ID"
    assert store.read("manifest.json") == b"[]"


def test_a_published_run_that_is_damaged_is_not_taken_for_done(store: Store, tree: Path) -> None:
    artifacts = upload_tree(store, tree)
    commit(store, manifest(artifacts))
    store.delete("report.html")
    for attempt in (lambda: commit(store, manifest(artifacts)), lambda: existing(store, FINGERPRINT)):
        with pytest.raises(ConfigError, match=r"damaged: report\.html is missing") as caught:
            attempt()
        assert caught.value.problems[0].variable == "TRANSFER_RUN_ID"


@pytest.mark.parametrize("content", [b"<html>?</html>", b"other", None])
def test_nothing_is_published_when_another_run_wrote_over_it(store: Store, tree: Path, content: bytes | None) -> None:
    artifacts = upload_tree(store, tree)
    store.delete("report.html")
    if content is not None:
        store.put_bytes("report.html", content)
    with pytest.raises(UnavailableError, match=r"report\.html"):
        commit(store, manifest(artifacts))
    assert store.read("manifest.json") is None


def change_result(fields: dict[str, Any], split: str, name: str, value: Any) -> None:
    fields["results"][0]["metrics"][split][name] = value


Damage = Callable[[Store], object]
Edit = Callable[[dict[str, Any]], object]

DAMAGES: dict[str, tuple[Damage, str]] = {
    "changed byte": (lambda store: store.put_bytes("report.html", b"<HTML></html>"), "report.html has another content"),
    "cut short": (lambda store: store.put_bytes("report.html", b"<html>"), "report.html has 6 bytes instead of 13"),
    "missing": (lambda store: store.delete("report.html"), "report.html is missing"),
    "extra": (lambda store: store.put_bytes("more/x", b"x"), "more/x is not in the manifest"),
    "no schema": (lambda store: store.delete("manifest.schema.json"), "manifest.schema.json is missing"),
    "no JSON": (lambda store: store.put_bytes("manifest.json", b"{"), "manifest.json is not JSON"),
    "schema is none": (lambda store: store.put_bytes("manifest.schema.json", b"{"), "is no JSON schema"),
    "schema elsewhere": (
        lambda store: store.put_bytes("manifest.schema.json", b'{"$ref": "http://127.0.0.1:9/x"}'),
        "is no JSON schema",
    ),
    "schema says otherwise": (
        lambda store: store.put_bytes("manifest.schema.json", b'{"required": ["more"]}'),
        "manifest.json does not satisfy manifest.schema.json: $: 'more' is a required property",
    ),
}

EDITS: dict[str, tuple[Edit, str]] = {
    "unknown field": (lambda fields: fields.update(more=1), "more: Extra inputs are not permitted"),
    "lost field": (lambda fields: fields.pop("created"), "'created' is a required property"),
    "another version": (lambda fields: fields.update(schema_version="2.0"), "does not satisfy manifest.schema.json"),
    "wrong type": (lambda fields: fields.update(run_id=7), "does not satisfy manifest.schema.json: $.run_id"),
    "listed twice": (lambda fields: fields["artifacts"].append(fields["artifacts"][0]), "is listed 2 times"),
    "another crc32c": (lambda fields: fields["artifacts"][0].update(crc32c="AAAAAA=="), "has crc32c"),
    "no model": (
        lambda fields: fields["results"][0].update(saved_model="arms/frozen/fraction-1.0/seed-0/saved"),
        "the SavedModel of frozen, is missing",
    ),
    "accuracy": (lambda fields: change_result(fields, "test", "accuracy", 0.5), "accuracy 0.5 is not 11 of 12"),
    "interval": (
        lambda fields: change_result(fields, "test", "accuracy_interval", [0, 0.5]),
        "is outside its interval",
    ),
    "confusion": (
        lambda fields: change_result(fields, "validation", "confusion", [[5, 0], [0, 4]]),
        "the confusion matrix counts 9 examples instead of 10",
    ),
    "confusion's shape": (
        lambda fields: change_result(fields, "train", "confusion", [[30]]),
        "the confusion matrix is not 2 by 2",
    ),
    "support": (
        lambda fields: fields["results"][0]["metrics"]["test"]["per_class"][0].update(support=1),
        "the support per class does not add up",
    ),
    "examples": (lambda fields: fields["results"][0].update(train_examples=29), "30 examples were measured of 29"),
}


@pytest.fixture
def published(store: Store, tree: Path) -> Store:
    commit(store, manifest(upload_tree(store, tree)))
    return store


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found(published: Store, kind: str) -> None:
    damage, sentence = DAMAGES[kind]
    damage(published)
    assert sentence in "\n".join(verify(published.uri))


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_manifest_that_contradicts_itself_is_found(published: Store, kind: str) -> None:
    edit, sentence = EDITS[kind]
    fields = json.loads(published.read("manifest.json") or b"")
    edit(fields)
    published.put_bytes("manifest.json", json.dumps(fields).encode())
    assert sentence in "\n".join(verify(published.uri))


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_all_damage_is_reported_together(published: Store) -> None:
    published.delete("report.html")
    published.put_bytes(f"{MODEL}/saved_model.pb", b"Graph")
    published.put_bytes("more", b"x")
    assert [problem.split(" (")[0] for problem in verify(published.uri)] == [
        "report.html is missing",
        "more is not in the manifest",
        f"{MODEL}/saved_model.pb has another content",
    ]


def test_verifying_writes_nothing(tmp_path: Path) -> None:
    assert len(verify(str(tmp_path / "absent"))) == 1
    assert list(tmp_path.iterdir()) == []
