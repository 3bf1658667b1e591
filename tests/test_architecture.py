"""The rooms, tiers and fences of ARCHITECTURE.md, held against the imports in the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.running import ROOT

JOB = ROOT / "job"
PACKAGES = {path.parent for path in JOB.rglob("__init__.py")}
MODULES = sorted(path for path in JOB.rglob("*.py") if path.name != "__init__.py")
DOCUMENT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def rooms() -> dict[str, tuple[int, set[str], str]]:
    """Return level, what it imports from, and the word on TensorFlow of every folder, and of ``__main__``."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \|([`/\w ]*)\| ?(\w*) ?\|", DOCUMENT, flags=re.MULTILINE)
    return {name: (int(level), set(re.findall(r"`(\w+)/`", imports)), word) for level, name, imports, word in rows}


def tiers() -> dict[str, int]:
    """Return the tier of every module within its folder, by ``folder.module``."""
    found = {}
    for folder, table in re.findall(r"^\*\*`(\w+)/`\*\*\n\n((?:\|.*\n)+)", DOCUMENT, flags=re.MULTILINE):
        for tier, module in re.findall(r"^\| (\d+) \| `(\w+)\.py` \|", table, flags=re.MULTILINE):
            found[f"{folder}.{module}"] = int(tier)
    return found


def fences() -> list[tuple[str, set[str]]]:
    rows = re.findall(r"^\| `([\w.]+)` only in \| (.+) \|$", DOCUMENT, flags=re.MULTILINE)
    assert rows
    return [(name, set(re.findall(r"`([\w/]+)\.py`", places))) for name, places in rows]


def name_of(path: Path) -> str:
    """Return ``folder.module``; the folder of what lies in none is ``job``."""
    return f"{path.parent.name}.{path.stem}"


def room_of(module: str) -> str:
    return "__main__" if module == "job.__main__" else module.partition(".")[0]


def imports_of(path: Path) -> set[str]:
    """Return every dotted name that the module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules_imported_by(path: Path) -> set[str]:
    """Return the modules of the job that the module imports, as ``name_of`` names them."""
    found = set()
    for imported in imports_of(path):
        parts = imported.split(".")
        for depth in (3, 2):
            module = JOB.joinpath(*parts[1:depth]).with_suffix(".py")
            if parts[0] == "job" and len(parts) >= depth and module in MODULES:
                found.add(name_of(module))
                break
    return found


def attributes_of(path: Path) -> set[str]:
    """Return every dotted expression of the module, such as ``os.environ``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_folder_and_every_module_has_its_row_and_every_row_what_it_names() -> None:
    assert {path.name for path in PACKAGES} | {"__main__"} == set(rooms())
    assert {name_of(path) for path in MODULES} == set(tiers()) | {"job.__main__"}


def test_a_newcomer_has_few_folders_to_tell_apart_and_no_folder_is_a_drawer() -> None:
    at_root = [path for path in MODULES if path.parent == JOB]
    assert len(at_root) <= 8
    assert 5 <= len(PACKAGES - {JOB}) <= 10
    assert all(path.parent == JOB for path in PACKAGES - {JOB})


@pytest.mark.parametrize("folder", sorted(rooms()))
def test_a_folder_imports_from_the_folders_that_its_row_names_and_all_are_above_it(folder: str) -> None:
    level, named, _ = rooms()[folder]
    inside = [path for path in MODULES if room_of(name_of(path)) == folder]
    used = {room_of(module) for path in inside for module in modules_imported_by(path)} - {folder}
    assert used == named
    assert all(rooms()[other][0] < level for other in used)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_from_its_own_folder_only_what_is_in_a_lower_tier(path: Path) -> None:
    own, tier_of = name_of(path), tiers()
    for module in modules_imported_by(path):
        if room_of(module) == room_of(own):
            assert tier_of[module] < tier_of[own], f"{own} imports {module}"


@pytest.mark.parametrize(("name", "places"), fences())
def test_a_fenced_name_is_used_only_where_it_may_be(name: str, places: set[str]) -> None:
    users = {
        "/".join(path.relative_to(JOB).with_suffix("").parts)
        for path in MODULES
        if any(used == name or used.startswith(f"{name}.") for used in imports_of(path) | attributes_of(path))
    }
    assert users <= places
    assert users, f"nothing uses {name}: the fence guards nothing"


def test_folders_that_never_import_tensorflow_do_not() -> None:
    without = {folder for folder, (_, _, word) in rooms().items() if word == "never"}
    assert without == {"job", "settings", "storage", "results"}
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if room_of(name_of(path)) in without
    ]
    assert loaded(names) == set()


@pytest.mark.parametrize("module", ["machine.console", "machine.limits", "training.checkpoints"])
def test_tensorflow_is_not_imported_either_by(module: str) -> None:
    assert loaded([f"job.{module}"]) == set()


def loaded(modules: list[str]) -> set[str]:
    """Return which of TensorFlow and Keras are there after the import of ``modules``."""
    code = f"import sys, {', '.join(modules)}; print(*{{'tensorflow', 'keras'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("package", sorted(PACKAGES - {JOB}), ids=lambda path: path.name)
def test_a_folder_says_in_one_docstring_what_it_is_and_imports_nothing(package: Path) -> None:
    (only,) = ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)


def test_the_tests_mirror_the_folders() -> None:
    for package in PACKAGES - {JOB}:
        assert list((ROOT / "tests" / package.name).glob("test_*.py")), package


def test_no_module_is_longer_than_400_lines() -> None:
    long = {name_of(path): length for path in MODULES if (length := len(path.read_text().splitlines())) > 400}
    assert not long
