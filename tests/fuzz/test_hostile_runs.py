"""Whatever lies where a run should be, verify lists what is wrong, reads nothing outside of it, and ends."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.errors import ConfigError
from job.manifest import json_schema
from job.storage.locations import open_store
from job.storage.verification import verify
from tests.fuzz.inputs import changed, damaged, texts, written
from tests.support.bounds import ends_within
from tests.support.small_runs import FILES, publish, write_tree

SECRET = b"nobody reads this"
NAMES = (*FILES, "manifest.json")
NEVER = ("/etc", "/dev/zero", "/dev/stdin", "/proc/self/mem")
VERSION = {"schema_version": {"const": "1.0"}}
HOSTILE_SCHEMAS = (
    {"$ref": "#"},
    {"allOf": [{"$ref": "#"}]},
    {"$ref": "http://127.0.0.1:9/x"},
    {"$ref": "file:///etc/hostname"},
    {"$schema": "file:///etc/hostname"},
    {"patternProperties": {"^(a|a)*$": False}},
    json_schema() | {"properties": {**VERSION, "verdict": {"pattern": "^(a+)+$"}}},
    json_schema() | {"$dynamicRef": "#", "$defs": {"x": {"$ref": "#/$defs/x"}}},
)


class Watch:
    """What this process does with files while it is watched."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[Any, ...]]] = []
        self._on = False
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._on and (event == "open" or event.startswith(("os.", "shutil.", "socket.connect", "subprocess."))):
            self.seen.append((event, arguments))

    @contextmanager
    def on(self) -> Iterator[None]:
        self.seen.clear()
        self._on = True
        try:
            yield
        finally:
            self._on = False


@dataclass(frozen=True)
class Scene:
    """The files of a sound run, the folder where hostile ones are made of them, and one beside it."""

    base: Path
    files: dict[str, bytes] = field(repr=False)
    watch: Watch = field(default_factory=Watch)

    @property
    def run(self) -> Path:
        return self.base / "run"

    @property
    def outside(self) -> Path:
        return self.base / "outside"

    def fresh(self, **changed: bytes) -> None:
        """Lay down the sound run; ``changed``: other contents for ``manifest`` and ``schema``."""
        shutil.rmtree(self.run, ignore_errors=True)
        other = {"manifest.json": changed.get("manifest"), "manifest.schema.json": changed.get("schema")}
        for name, data in self.files.items():
            path = self.run / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data if other.get(name) is None else other[name])

    def verify(self) -> list[str]:
        """Verify what is there, and see to it that nothing else was read and nothing written."""
        before = self.left()
        with ends_within(120), self.watch.on():
            try:
                problems = verify(str(self.run))
            except ConfigError as error:  # the folder cannot be read
                problems = [problem.message for problem in error.problems]
        for event, (place, *more) in self.watch.seen:
            if isinstance(place, int):  # it was opened before
                continue
            assert event in ("open", "os.scandir", "os.listdir", "os.walk"), (event, place)
            where = Path(os.path.realpath(place))
            assert not str(place).startswith(NEVER), place
            if self.base in (where, *where.parents):  # what is imported on the way lies elsewhere
                assert self.run in (where, *where.parents), (event, place)
                assert event != "open" or not int(more[1]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), (event, place)
        assert self.left() == before
        for problem in problems:
            assert problem.isprintable()
            assert 0 < len(problem) < 6000
        return problems

    def left(self) -> list[tuple[str, bytes, int, int]]:
        files = [(str(path), path.read_bytes(), path.stat()) for path in sorted(self.outside.iterdir())]
        folders = [(str(path), b"", path.stat()) for path in (self.base, self.outside)]
        return [(name, data, status.st_mtime_ns, status.st_mode) for name, data, status in (*files, *folders)]


@pytest.fixture(scope="module")
def scene(base: Path) -> Scene:
    publish(open_store(str(base / "sound"), "URI"), write_tree(base / "tree"))
    files = {name: (base / "sound" / name).read_bytes() for name in NAMES}
    shutil.rmtree(base / "sound")
    shutil.rmtree(base / "tree")
    (base / "outside").mkdir()
    for name in ("file", *(Path(name).name for name in FILES)):
        (base / "outside" / name).write_bytes(SECRET)
    found = Scene(base, files)
    found.fresh()
    assert found.verify() == []
    return found


@given(data=st.data())
def test_any_manifest(scene: Scene, data: st.DataObject) -> None:
    scene.fresh(manifest=written(data.draw(changed(json.loads(scene.files["manifest.json"])))))
    scene.verify()


@given(data=st.data())
def test_any_bytes_for_a_manifest(scene: Scene, data: st.DataObject) -> None:
    content = data.draw(damaged(scene.files["manifest.json"]))
    encoding = data.draw(st.sampled_from(("utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig", "utf-32", "utf-7")))
    scene.fresh(manifest=content.decode("utf-8", "surrogateescape").encode(encoding, "surrogatepass"))
    scene.verify()


@given(data=st.data())
def test_any_schema(scene: Scene, data: st.DataObject) -> None:
    sound = scene.files["manifest.schema.json"]
    hostile = st.sampled_from(HOSTILE_SCHEMAS)
    other = st.one_of(changed(json.loads(sound)), hostile, hostile.flatmap(changed)).map(written)
    schema = data.draw(st.one_of(other, damaged(sound)))
    manifest = json.loads(scene.files["manifest.json"])
    manifest["verdict"] = "a" * 40 + "!"
    (entry,) = [each for each in manifest["artifacts"] if each["path"] == "manifest.schema.json"]
    entry |= {"bytes": len(schema), "sha256": hashlib.sha256(schema).hexdigest()}
    scene.fresh(manifest=json.dumps(manifest).encode(), schema=schema)
    assert bool(scene.verify()) == (schema != sound)


@given(paths=st.lists(texts, max_size=3), model=texts)
def test_any_path_of_an_artifact(scene: Scene, paths: list[str], model: str) -> None:
    manifest = json.loads(scene.files["manifest.json"])
    entry = {"bytes": len(SECRET), "sha256": hashlib.sha256(SECRET).hexdigest(), "crc32c": "AAAAAA=="}
    manifest["artifacts"] += [{"path": path, **entry} for path in (*paths, str(scene.outside / "file"))]
    manifest["results"][0]["saved_model"] = model
    scene.fresh(manifest=written(manifest))
    assert scene.verify()


# --- what may be done to a file or folder of the run -------------------------------------------------------------

Change = Callable[[Path], object]


def gone(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def made(make: Change) -> Change:
    def replace(path: Path) -> None:
        gone(path)
        make(path)

    return replace


def linked(target: str) -> Change:
    return made(lambda path: path.symlink_to(target.format(name=path.name)))


def of_a_file(change: Change) -> Change:
    return lambda path: change(path) if path.is_file() and not path.is_symlink() else None


CHANGES: tuple[Change, ...] = (
    gone,
    made(Path.mkdir),
    made(os.mkfifo),
    made(lambda path: path.write_bytes(b"x")),
    made(lambda path: (path.mkdir(), (path / "below").write_bytes(b"x"))),
    *map(linked, ("../outside/{name}", "../../../../../outside/{name}", "../outside", "{name}", ".", "..", "/nowhere")),
    *map(linked, ("/dev/zero", "/dev/stdin", "/etc/hostname", "/etc", "/proc/self/mem", "manifest.json")),
    *(of_a_file(lambda path, size=size: os.truncate(path, size)) for size in (0, 12, 1 << 40)),
    of_a_file(lambda path: path.chmod(0)),
    of_a_file(lambda path: path.rename(path.with_name("moved"))),
    of_a_file(lambda path: path.with_name(uuid.uuid4().hex).hardlink_to(path)),
)


def file_name(text: str) -> str:
    name = os.fsdecode(os.fsencode(text.encode("utf-8", "replace")).replace(b"/", b"").replace(b"\0", b"")[:200])
    return name if name not in ("", ".", "..") else "x"


inside = st.sampled_from((*NAMES, "arms", "arms/frozen", "new", ".part-new", "checkpoints", "arms/new"))
names = st.one_of(
    inside, texts.map(file_name), st.binary(max_size=9).map(lambda name: file_name(name.decode("latin-1")))
)
raw_names = st.binary(min_size=1, max_size=9).filter(lambda name: not {0, 47} & set(name) and name not in (b".", b".."))


@given(changes=st.lists(st.tuples(st.one_of(names, raw_names.map(os.fsdecode)), st.sampled_from(CHANGES)), max_size=4))
def test_anything_in_the_folder(scene: Scene, changes: list[tuple[str, Change]]) -> None:
    scene.fresh()
    for name, change in changes:
        path = scene.run / name
        if path.parent.is_dir() and scene.run in (path.parent.resolve(), *path.parent.resolve().parents):
            change(path)
    scene.verify()
