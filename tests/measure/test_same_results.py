"""What tells two runs apart finds a changed figure, and nothing in times and places."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.measure.same_results import compared, differences
from tests.support.running import Published


@pytest.fixture
def runs(published: Published, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    (tmp_path / "manifest.json").write_text(json.dumps(published.manifest))
    return compared(published.folder), compared(tmp_path)


def test_times_and_places_are_no_difference(runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, other = runs
    other["created"] = other["results"][0]["seconds"] = other["settings"]["output_uri"] = "elsewhere"
    assert list(differences(one, other)) == []


def test_a_figure_a_file_and_a_part_that_is_gone_are(runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, other = runs[0], copy.deepcopy(runs[1])
    path = next(path for path in other["artifacts"] if path.endswith("predictions.csv"))
    other["results"][0]["metrics"]["test"]["accuracy"] += 1e-9
    other["artifacts"][path]["sha256"] = "0" * 64
    del other["verdict"]
    found = [line.partition(": ")[0] for line in differences(one, other)]
    assert found == [f"/artifacts/{path}/sha256", "/results/0/metrics/test/accuracy", "/verdict"]
