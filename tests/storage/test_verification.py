"""Every kind of damage to a published run is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.storage.store import Store
from job.storage.verification import verify
from tests.support.small_runs import MODEL, publish


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
    publish(store, tree)
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


def test_unfinished_work_beside_a_published_run_is_no_damage(published: Store) -> None:
    published.put_bytes("checkpoints/frozen-fraction-1-seed-0-step-000000001-0123456789abcdef.ckpt", b"x")
    assert verify(published.uri) == []
