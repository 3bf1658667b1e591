"""The tiers and fences of ARCHITECTURE.md, held against the imports in the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
JOB = ROOT / "job"
MODULES = sorted(path for path in JOB.rglob("*.py") if path.name != "__init__.py")
DOCUMENT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def tiers() -> dict[str, int]:
    rows = re.findall(r"^\| (\d+) \| `([\w/]+)\.py` \|", DOCUMENT, flags=re.MULTILINE)
    return {module.replace("/", "."): int(tier) for tier, module in rows}


def fences() -> list[tuple[str, set[str]]]:
    rows = re.findall(r"^\| `([\w.]+)` only in \| (.+) \|$", DOCUMENT, flags=re.MULTILINE)
    assert rows
    return [(name, set(re.findall(r"`([\w/]+)\.py`", places))) for name, places in rows]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(JOB).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Return every dotted name that the module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_tier_and_every_tier_a_module() -> None:
    assert {name_of(path) for path in MODULES} == set(tiers())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_tiers_above_it(path: Path) -> None:
    tier_of = tiers()
    own = tier_of[name_of(path)]
    for imported in imports_of(path):
        if not imported.startswith("job."):
            continue
        name = imported.removeprefix("job.")
        module = next((known for known in (name, name.rpartition(".")[0]) if known in tier_of), None)
        if module is not None:
            assert tier_of[module] < own, f"{name_of(path)} (tier {own}) imports {module} (tier {tier_of[module]})"


@pytest.mark.parametrize(("name", "places"), fences())
def test_a_fenced_name_is_used_only_where_it_may_be(name: str, places: set[str]) -> None:
    users = {
        "/".join(path.relative_to(JOB).with_suffix("").parts)
        for path in MODULES
        if any(used == name or used.startswith(f"{name}.") for used in imports_of(path) | attributes_of(path))
    }
    assert users <= places
    assert users, f"nothing uses {name}: the fence guards nothing"


def attributes_of(path: Path) -> set[str]:
    """Return every dotted expression of the module, such as ``os.environ``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize(
    "module",
    [
        *("settings", "manifest", "arms", "statistics", "storage", "publishing", "console"),
        *("report", "model_card", "event_files", "energy", "verification", "checkpoints"),
    ],
)
def test_tensorflow_is_not_imported_by(module: str) -> None:
    code = f"import sys, job.{module}; sys.exit(bool({{'tensorflow', 'keras'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_module_is_longer_than_400_lines() -> None:
    long = {name_of(path): length for path in MODULES if (length := len(path.read_text().splitlines())) > 400}
    assert not long
