"""Every kind of damage to a published run is found, and a hostile one is told of like a broken one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.manifest import json_schema
from job.storage.store import Store
from job.storage.verification import verify
from tests.support.bounds import ends_within
from tests.support.running import run_job
from tests.support.small_runs import MODEL, publish


def change_result(fields: dict[str, Any], split: str, name: str, value: Any) -> None:
    fields["results"][0]["metrics"][split][name] = value


def schema_bytes(**changes: Any) -> bytes:
    return json.dumps(json_schema() | changes).encode()


Damage = Callable[[Store], object]
Edit = Callable[[dict[str, Any]], object]

DAMAGES: dict[str, tuple[Damage, str]] = {
    "changed byte": (lambda store: store.put_bytes("report.html", b"<HTML></html>"), "report.html has another content"),
    "cut short": (lambda store: store.put_bytes("report.html", b"<html>"), "report.html has 6 bytes instead of 13"),
    "missing": (lambda store: store.delete("report.html"), "report.html is missing"),
    "extra": (lambda store: store.put_bytes("more/x", b"x"), "more/x is not in the manifest"),
    "no schema": (lambda store: store.delete("manifest.schema.json"), "manifest.schema.json is missing"),
    "no JSON": (lambda store: store.put_bytes("manifest.json", b"{"), "manifest.json is not JSON"),
    "schema is none": (lambda store: store.put_bytes("manifest.schema.json", b"{"), "manifest.schema.json is not JSON"),
    "schema is empty": (
        lambda store: store.put_bytes("manifest.schema.json", b"{}"),
        "is not the schema of version 1.0",
    ),
    "schema asks for more": (
        lambda store: store.put_bytes("manifest.schema.json", schema_bytes(required=["more"])),
        "manifest.schema.json is not the schema of version 1.0",
    ),
}

EDITS: dict[str, tuple[Edit, str]] = {
    "unknown field": (lambda fields: fields.update(more=1), "more: Extra inputs are not permitted"),
    "lost field": (lambda fields: fields.pop("created"), "manifest.json: created: Field required"),
    "another version": (lambda fields: fields.update(schema_version="2.0"), "manifest.json has schema version '2.0'"),
    "wrong type": (lambda fields: fields.update(run_id=7), "manifest.json: run_id: Input should be a valid string"),
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


def test_a_run_that_was_published_before_fields_were_added_to_its_version_is_sound(store: Store, tree: Path) -> None:
    older = json_schema()
    del older["properties"]["summaries"], older["$defs"]["Summary"], older["$defs"]["Result"]["properties"]["xla"]
    older["description"] = "What it was once called."
    older["$defs"]["Artifact"]["properties"]["path"] = {"title": "Path", "type": "string"}
    (tree / "manifest.schema.json").write_text(json.dumps(older, indent=1))
    publish(store, tree)
    assert verify(store.uri) == []


# --- hostile runs ------------------------------------------------------------------------------------------------


def rewritten(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def rewrite(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, new)

    return rewrite


SEED = b'"seed": 0'
EMPTY = b'"comparisons": []'

DOCUMENTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda _: b"", "manifest.json is not JSON: Expecting value"),
    "nested lists": (lambda _: b"[" * 100_000, "manifest.json is nested too deeply"),
    "nested objects": (lambda _: b'{"a":' * 100_000, "manifest.json is nested too deeply"),
    "nested settings": (
        rewritten(b'"cats_vs_dogs"\n  }', b'"cats_vs_dogs", "x": ' + b"[" * 400 + b"]" * 400 + b"}"),
        "manifest.json: : Invalid JSON: recursion limit exceeded",
    ),
    "many lists": (lambda _: b"[" + b"[]," * 1_000_001 + b"[]]", "manifest.json has more than 1,000,000 objects"),
    "many keys": (
        lambda _: b"{" + b",".join(b'"%d":0' % number for number in range(20_000)) + b"}",
        "manifest.json has an object with 20,000 keys",
    ),
    "many artifacts that are none": (
        rewritten(EMPTY, b'"comparisons": [' + b"0," * 1_000_000 + b"0]"),
        "manifest.json: comparisons/0: Input should be an object",
    ),
    "a key twice": (
        rewritten(b'"run_id": "run"', b'"run_id": "run", "run_id": "other"'),
        "manifest.json has an object with the key 'run_id' 2 times",
    ),
    "a list": (lambda _: b"[]", "manifest.json: : Input should be an object"),
    "NaN": (rewritten(SEED, b'"seed": NaN'), "manifest.json holds the number NaN"),
    "an infinite number": (rewritten(SEED, b'"seed": -Infinity'), "manifest.json holds the number -Infinity"),
    "a number too large": (rewritten(SEED, b'"seed": 1e999'), "manifest.json holds the number 1e999"),
    "a count too large": (
        rewritten(SEED, b'"seed": 1' + b"0" * 400),
        "manifest.json: results/0/seed: Input should be less than or equal to",
    ),
    "a number too long": (
        rewritten(SEED, b'"seed": ' + b"9" * 5000),
        "manifest.json holds a whole number with thousands of digits",
    ),
    "a text for a number": (rewritten(SEED, b'"seed": "0"'), "results/0/seed: Input should be a valid integer"),
    "no UTF-8": (rewritten(b'"run_id": "run"', b'"run_id": "\xff"'), "is not UTF-8"),
    "half of a character": (rewritten(b'"run_id": "run"', b'"run_id": "\\ud800"'), "Invalid JSON: "),
    "UTF-16": (lambda data: data.decode().encode("utf-16"), "manifest.json is not JSON: byte 0 is not UTF-8"),
    "a byte order mark": (lambda data: b"\xef\xbb\xbf" + data, "manifest.json is not JSON: Unexpected UTF-8 BOM"),
    "a key that ends the line": (
        rewritten(b'"run_id": "run"', b'"run_id": "run", "\\n12:00:00 verified": 1'),
        "manifest.json: \\n12:00:00 verified: Extra inputs are not permitted",
    ),
    "a key without end": (
        rewritten(b'"run_id": "run"', b'"run_id": "run", "%s": 1' % (b"k" * 5_000_000)),
        "kkkkk…",
    ),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_manifest_that_is_none_is_told_of_in_one_line(published: Store, kind: str) -> None:
    edit, sentence = DOCUMENTS[kind]
    published.put_bytes("manifest.json", edit(published.read("manifest.json") or b""))
    with ends_within(120):
        (problem,) = verify(published.uri)
    assert sentence in problem
    assert problem.isprintable()
    assert len(problem) < 1100


@pytest.mark.parametrize(
    "schema",
    [
        schema_bytes(properties={"schema_version": {"const": "1.0"}, "verdict": {"pattern": "^(a+)+$"}}),
        b'{"$ref": "#"}',
        b'{"$ref": "http://127.0.0.1:9/x"}',
        schema_bytes(properties={"schema_version": {"const": "1.0"}}, allOf=[{"$ref": "#"}]),
        b"[]",
        b"[" * 100_000,
        b'{"properties": ' * 100_000,
    ],
    ids=["regular expression", "loop", "elsewhere", "loop inside", "list", "nested lists", "nested objects"],
)
@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_schema_is_compared_and_never_carried_out(store: Store, tree: Path, schema: bytes) -> None:
    (tree / "manifest.schema.json").write_bytes(schema)
    publish(store, tree, verdict="a" * 40 + "!")
    with ends_within(120):
        (problem,) = verify(store.uri)
    assert problem in (
        "manifest.schema.json is not the schema of version 1.0",
        "manifest.schema.json is nested too deeply",
    )


@pytest.mark.parametrize(
    "path",
    [
        *("", ".", "..", "../outside", "/etc/hostname", "arms/../../outside", "arms//x", "arms/", "./x", "a\\b"),
        *("a\0b", "x\n", "x\ny", "\x1b[2J", "x\x85y", "x" * 1025),
    ],
)
@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_path_that_leads_out_of_the_run_or_hides_something_is_none(published: Store, path: str) -> None:
    fields = json.loads(published.read("manifest.json") or b"")
    fields["artifacts"].append(fields["artifacts"][0] | {"path": path})
    published.put_bytes("manifest.json", json.dumps(fields).encode())
    (problem,) = verify(published.uri)
    assert problem.startswith("manifest.json: artifacts/5/path: ")
    assert problem.isprintable()


def _link(path: Path) -> None:
    whole = path.rename(path.parents[1] / "outside")
    path.symlink_to(whole)


def _socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # its address may have 100 characters
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", ["report.html", "manifest.json", "manifest.schema.json"])
@pytest.mark.parametrize("replace", [_pipe, _link, _socket, _device])
@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_what_is_no_plain_file_is_never_opened(published: Store, name: str, replace: Callable[[Path], None]) -> None:
    replace(Path(published.uri, name))
    with ends_within(120):
        problems = verify(published.uri)
    assert problems
    assert all(name in problem and "is not a plain file" in problem for problem in problems), problems


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_linked_folder_is_not_followed(published: Store) -> None:
    arms = Path(published.uri, "arms")
    arms.symlink_to(arms.rename(arms.parents[1] / "arms"))
    problems = verify(published.uri)
    assert "arms is not a plain file" in problems
    assert f"{MODEL}/saved_model.pb is missing" in problems


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_run_may_be_named_by_a_link_to_it(published: Store, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(published.uri)
    assert verify(str(tmp_path / "latest")) == []


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_an_artifact_that_is_too_long_is_not_read_and_one_that_is_listed_often_is_read_once(published: Store) -> None:
    report = Path(published.uri, "report.html")
    fields = json.loads(published.read("manifest.json") or b"")
    (entry,) = [each for each in fields["artifacts"] if each["path"] == "report.html"]
    fields["artifacts"] += [entry] * 9_999
    published.put_bytes("manifest.json", json.dumps(fields).encode())
    with ends_within(300):
        assert verify(published.uri) == ["report.html is listed 10000 times"]
        os.truncate(report, 1 << 42)
        assert "report.html has 4398046511104 bytes instead of 13" in verify(published.uri)


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_folders_of_any_depth_are_looked_through(published: Store) -> None:
    folder = published.uri
    for _ in range(1100):
        folder += "/d"
        Path(folder).mkdir()
    Path(folder, "x").touch()
    (problem,) = verify(published.uri)
    published.delete_all()  # before pytest does, which does not go so deep
    assert problem.startswith("d/d/d/d/d/")
    assert not Path(published.uri).exists()


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_the_command_ends_with_1_and_no_name_can_write_a_line_of_the_log(published: Store, log_format: str) -> None:
    folder = Path(published.uri)
    names = [b"x\n12:00:00 verified: run", b"\xff", b"y\r\x1b[2Kz", "\u2028\x85".encode()]
    for name in names:
        (folder / os.fsdecode(name)).touch()
    _pipe(folder / "report.html")
    (folder / "manifest.schema.json").write_bytes(b"{" * 100_000)
    done = run_job({"TRANSFER_LOG_FORMAT": log_format, "PYTHONUTF8": "1"}, "verify", published.uri)
    assert done.code == 1
    assert "Traceback" not in done.errors
    assert len(done.errors.splitlines()) == 3 + len(names), done.errors
    assert "verified: run is not in the manifest" in done.errors
