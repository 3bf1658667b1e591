from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from job.manifest import Manifest
from job.results.model_card import render
from tests.support.report_example import example, photos
from tests.support.running import Published
from tests.support.small_runs import manifest as smallest

HOSTILE = ("<script>alert(1)</script>", "a|b", "*c* `d` [e](f)", "# g\n- h", "snake_case", "1. i", "- j", "&lt;")


def html(card: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(card)


def rows(card: str) -> list[list[str]]:
    """Return the cells of all tables, as a reader of Markdown sees them."""
    found = re.findall(r"<tr>(.*?)</tr>", html(card), flags=re.DOTALL)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, flags=re.DOTALL) for row in found]


@pytest.fixture(scope="module")
def record() -> Manifest:
    return example(fractions=(0.1, 1.0), seeds=(0, 1), epochs=5)


def test_the_card_has_the_results_figures_on_the_three_splits_and_per_class(record: Manifest) -> None:
    for result in record.results[::5]:
        shown = rows(render(record, result))
        for name in ("train", "validation", "test"):
            split = getattr(result.metrics, name)
            low, high = split.accuracy_interval
            expected = [
                name,
                f"{split.examples:,}",
                f"{100 * split.accuracy:.1f}%",
                f"{100 * low:.1f}% to {100 * high:.1f}%",
                f"{split.loss:.3f}",
                f"{split.auc:.3f}",
                f"{split.calibration_error:.3f}",
            ]
            assert expected in shown
        for index, row in enumerate(result.metrics.test.per_class):
            figures = [f"{100 * value:.1f}%" for value in (row.precision, row.recall, row.f1)]
            assert [row.name, *figures, str(row.support)] in shown
            assert [row.name, *map(str, result.metrics.test.confusion[index])] in shown


def test_the_card_tells_its_own_arm_and_no_other(record: Manifest) -> None:
    cards = {result.arm: render(record, result) for result in record.results if result.seed == 1}
    assert "BatchNorm" in cards["scratch"]
    assert "BatchNorm" not in cards["frozen"]
    assert "| starts from | random values |" in cards["scratch"]
    assert "| starts from | imagenet, SHA-256 " in cards["fine_tune"]
    assert "1. head: 2 epochs\n2. tail: 3 epochs" in cards["fine_tune"]
    assert "learning rate of fine-tuning" not in cards["frozen"]
    assert "One of 2 seeds (this is 1)" in cards["frozen"]
    own = [row.verdict for row in record.comparisons if row.train_fraction == 1 and len(row.seeds) == 2]
    shown = [sentence for sentence in own if sentence in cards["frozen"]]
    assert len(own) == 3
    assert len(shown) == 2
    assert all("frozen" in sentence for sentence in shown)


def test_limits_and_licences_are_told(record: Manifest) -> None:
    card = render(record, record.results[-1])
    assert "3 photos lie in more than one split" in card
    assert "| data | CC BY 2.0 |" in card
    assert "| pretrained weights | Apache-2.0 |" in card
    assert "@ONLINE {tfflowers," in card
    bare = render(smallest([]), smallest([]).results[0])
    assert "| data | not stated by the data set |" in bare
    assert "One seed: how far another would move the figures is not known." in bare
    assert "more than one split" not in bare


def test_what_users_chose_is_text_in_the_card() -> None:
    record = example(arms=("frozen",), fractions=(1.0,), seeds=(0,), classes=HOSTILE)
    fields = record.model_dump()
    fields["dataset"] |= {"name": HOSTILE[0], "licence": HOSTILE[1], "citation": "```\n# not a heading\n```"}
    record = Manifest.model_validate(fields)
    card = render(record, record.results[0])
    page = html(card)
    assert "<script>" not in page
    assert "<em>" not in page
    assert re.findall(r"<h1>(.*?)</h1>", page) == ["MobileNetV2 on &lt;script&gt;alert(1)&lt;/script&gt;: frozen"]
    widths = [len(row) for row in rows(card)]
    assert widths.count(1 + len(HOSTILE)) >= 1 + len(HOSTILE)
    assert ["data", "a|b"] in rows(card)
    assert "snake_case" in card
    cells = [row[0] for row in rows(card)]
    assert {"1. i", "- j", "&amp;lt;", "# g - h", "*c* `d` [e](f)"} <= set(cells)
    items = re.findall(r"<li>(.*?)</li>", page)
    assert {"1. i", "- j", "&amp;lt;", "# g - h"} <= set(items)


def test_of_many_classes_those_with_the_lowest_recall_are_shown() -> None:
    names = [f"breed {number:03}" for number in range(120)]
    record = example(arms=("frozen",), fractions=(1.0,), seeds=(0,), classes=names)
    card = render(record, record.results[0])
    per_class = card[card.index("### Per class") : card.index("### Confusion")]
    tested = [row for row in record.results[0].metrics.test.per_class if row.support]
    worst = sorted(tested, key=lambda row: row.recall)[:20]
    assert {row[0] for row in rows(per_class)[1:]} == {row.name for row in worst}
    assert len(card) < 20_000


def test_equal_records_give_equal_cards(record: Manifest) -> None:
    assert render(record, record.results[0]) == render(record, record.results[0])


@pytest.mark.slow
def test_the_cards_program_runs_on_the_published_model(published: Published, tmp_path: Path) -> None:
    record = Manifest.model_validate(published.manifest)
    (program,) = re.findall(r"```python\n(.*?)```", render(record, record.results[0]), flags=re.DOTALL)
    picture = next(iter(photos(example(arms=("frozen",), fractions=(1.0,), seeds=(0,), epochs=0), 48).values()))
    (tmp_path / "photo.jpg").write_bytes(picture)
    (tmp_path / "arms").symlink_to(published.folder / "arms")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=True
    )
    name, _, probabilities = done.stdout.strip().partition(" ")
    assert name in record.dataset.classes
    values = [float(value) for value in probabilities.strip("[]").split()]
    assert sum(values) == pytest.approx(1, abs=1e-4)
    assert name == record.dataset.classes[values.index(max(values))]
