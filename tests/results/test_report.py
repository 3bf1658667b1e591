from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import html5lib
import pytest

from job.manifest import Manifest, Result
from job.results import charts
from job.results.formatting import rounded
from job.results.report import PHOTOS_PER_ARM, render, wanted_photos
from tests.support.report_example import example, photos
from tests.support.running import ROOT
from tests.support.small_runs import manifest as smallest

Element = ElementTree.Element
SVG = "{http://www.w3.org/2000/svg}"
# Numbers that are words of the page, not figures of a run.
FIXED = re.compile(
    r"95%|90%|F1|95 of 100|SHA-256|AUC is .* 1 is best|0 is best|the 20 that|TRANSFER_\w+|one test photo in a hundred"
)
HOSTILE = ("<script>alert(1)</script>", 'a"b', "c&amp;d", "</style>", "{{ 7 * 7 }}", "x' onerror='y")
SHAPES: dict[str, Callable[[], Manifest]] = {
    "experiment": lambda: example(arms=("scratch", "fine_tune"), fractions=(0.1, 1.0), seeds=(0, 1)),
    "quickstart": lambda: example(fractions=(1.0,), seeds=(0,), epochs=3, price=None),
    "older": lambda: smallest([]),
    "many classes": lambda: example(
        arms=("scratch", "frozen"),
        fractions=(1.0,),
        seeds=(0,),
        classes=[f"breed {n:03}" for n in range(120)],
        epochs=0,
    ),
    "hostile": lambda: hostile(),
    "no results": lambda: smallest([], results=[]),
}


@dataclass(frozen=True)
class Page:
    """A rendered page: its manifest as published, its HTML, and the tree that a browser makes of it."""

    manifest: dict[str, Any]
    html: str
    tree: Element

    def __post_init__(self) -> None:
        for parent in self.tree.iter():
            for child in parent:
                PARENTS[child] = parent


PARENTS: dict[Element, Element] = {}


def hostile() -> Manifest:
    found = example(arms=("frozen",), fractions=(1.0,), seeds=(0, 1), classes=HOSTILE, epochs=1)
    fields = found.model_dump()
    fields["dataset"] |= {"name": HOSTILE[0], "homepage": "javascript:alert(1)", "licence": HOSTILE[1]}
    fields["settings"] |= {"dataset": HOSTILE[5], "a/b~c": HOSTILE[0]}
    for result in fields["results"]:
        for wrong in result["most_wrong"]:
            wrong["example_id"] += HOSTILE[5] + HOSTILE[0]
    return Manifest.model_validate(fields)


@cache
def page(shape: str) -> Page:
    record = SHAPES[shape]()
    html = render(record, photos(record, 48))
    parser = html5lib.HTMLParser(html5lib.getTreeBuilder("etree"), strict=True, namespaceHTMLElements=False)
    return Page(json.loads(record.to_json()), html, parser.parse(html))


# Learning curves take most of the time, and the experiment's are drawn already.
_QUICKSTART = pytest.param("quickstart", marks=pytest.mark.slow)


@pytest.fixture(params=[_QUICKSTART if shape == "quickstart" else shape for shape in SHAPES])
def shown(request: pytest.FixtureRequest) -> Page:
    return page(request.param)


def ancestors(element: Element) -> Iterator[Element]:
    """Yield the element itself and all around it, the innermost first."""
    while element is not None:
        yield element
        element = PARENTS.get(element)


def text_of(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def at(document: Any, pointer: str) -> Any:
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        document = document[int(key) if isinstance(document, list) else key]
    return document


# --- the numbers are the manifest's ------------------------------------------------------------------------------


def shows(text: str, value: Any) -> bool:
    """Tell whether ``text`` is ``value``, rounded at its last digit; as a percentage or in points too."""
    if value is None or value == []:
        return text == "\N{EN DASH}"
    if isinstance(value, bool):
        return text in (("yes", "true") if value else ("no", "false"))
    if isinstance(value, str):
        return text in (value, value[:10])
    if text.startswith("< "):
        return bool(value < float(text[2:]))
    digits = re.fullmatch(r"([+-]?)([\d,]+(?:\.(\d+))?)(%| s)?", text.replace("\N{MINUS SIGN}", "-"))
    if digits is None:
        return text == f"{value:g}"
    shown = float((digits[1] + digits[2]).replace(",", ""))
    half = 0.5 * 10.0 ** -len(digits[3] or "") * 1.000001
    scale = 100 if digits[4] == "%" or (digits[1] and abs(value) <= 1) else 1
    return abs(shown - scale * value) <= half


def test_a_figure_that_was_rounded_otherwise_would_be_noticed() -> None:
    assert shows("84.8%", 0.84756)
    assert not shows("84.7%", 0.84756)
    assert shows("\N{MINUS SIGN}1.3", -0.01304)
    assert not shows("+1.3", -0.01304)
    assert shows("1,903", 1903.4)
    assert not shows("1,904", 1903.4)
    assert not shows("0.848", 0.84)


def test_every_quoted_value_is_the_manifests(shown: Page) -> None:
    quoted = [element for element in shown.tree.iter() if "data-path" in element.attrib]
    assert len(quoted) > (20 if shown.manifest["results"] else 10)
    for element in quoted:
        value = at(shown.manifest, element.attrib["data-path"])
        exact = element.attrib.get("data-value")
        text = "".join(element.itertext())
        if exact is None:
            assert text == value
            continue
        assert json.loads(exact) == value, element.attrib
        assert shows(text, value) or (text == str(value)[:10] and "created" in element.attrib["data-path"]), (
            text,
            value,
        )


def test_every_computed_figure_is_what_its_words_define(shown: Page) -> None:
    computed = [element for element in shown.tree.iter() if "data-how" in element.attrib]
    for element in computed:
        value = json.loads(element.attrib["data-value"])
        places = next((e.attrib["data-of"] for e in ancestors(element) if "data-of" in e.attrib), "").split()
        expected = recomputed(shown.manifest, element.attrib, places)
        assert value == (None if expected is None else pytest.approx(expected, rel=1e-9, abs=1e-12)), element.attrib
        text = "".join(element.itertext())
        per = element.attrib["data-how"].startswith("gain-per-")
        assert text == rounded(value, "rate") if per else shows(text, value), (text, value)
    assert computed or not shown.manifest["results"]


def recomputed(manifest: dict[str, Any], named: dict[str, str], places: list[str]) -> float | None:
    """Return a computed figure anew, from its definition on the page."""
    results = manifest["results"]
    tests = [at(manifest, place)["metrics"]["test"] for place in places]
    commonest = max(row["support"] for row in results[0]["metrics"]["test"]["per_class"])
    baseline = commonest / results[0]["metrics"]["test"]["examples"]
    how = named["data-how"]
    if how in ("mean", "sum"):
        try:
            values = [at(manifest, place + named["data-at"]) for place in places]
        except KeyError:
            return None
        return None if None in values else (fmean(values) if how == "mean" else sum(values))
    if how in ("commonest", "results", "classes"):
        return {"commonest": baseline, "results": len(results), "classes": len(manifest["dataset"]["classes"])}[how]
    if how == "seeds":
        return len(places)
    if how == "times-most-wrong":
        lists = [at(manifest, place)["most_wrong"] for place in places]
        return sum(any(wrong["example_id"] == named["data-example"] for wrong in wrongs) for wrongs in lists)
    if how.endswith("-of-bin"):
        number = int(named["data-bin"])
        bins = [part for test in tests for part in test["reliability"] if int(15 * part["confidence"]) == number]
        total = sum(part["examples"] for part in bins)
        name = how.removesuffix("-of-bin")
        return total if name == "examples" else sum(part["examples"] * part[name] for part in bins) / total
    seconds = [at(manifest, place)["seconds"] for place in places]
    alone = fmean(part["training"] + part["evaluation"] + part["export"] for part in seconds)
    alone += sum(result["seconds"]["data"] for result in results)
    if at(manifest, places[0])["arm"] != "scratch":
        alone += sum(result["seconds"]["features"] for result in results)
    gain = fmean(test["accuracy"] for test in tests) - baseline
    price = manifest["settings"].get("cost_per_hour")
    own = [max(0.0, part["total"] - part["data"] - part["features"]) for part in seconds]
    costs = [at(manifest, place).get("cost") for place in places]
    if how == "own-cost":
        return fmean(cost * mine / part["total"] for cost, mine, part in zip(costs, own, seconds, strict=True))
    figures = {"own": fmean(own), "alone": alone, "gain": gain, "gain-per-minute": 100 * gain / (alone / 60)}
    return 100 * gain / (alone / 3600 * price) if how == "gain-per-money" else figures[how]


def test_no_number_stands_on_the_page_that_is_not_one_of_the_runs(shown: Page) -> None:
    strange = []
    for element in shown.tree.iter():
        around = list(ancestors(element))
        if any("data-path" in e.attrib or "data-how" in e.attrib or e.tag in ("head", f"{SVG}svg") for e in around):
            tails = [element.tail] if element is around[0] and element.tag != f"{SVG}svg" else []
            tails = [] if any("data-path" in e.attrib or "data-how" in e.attrib for e in around[1:]) else tails
            tails = [] if any(e.tag in ("head", f"{SVG}svg") for e in around[1:]) or element.tag == "head" else tails
        else:
            tails = [element.text, element.tail]
        strange += [text for text in tails if text and re.search(r"\d", FIXED.sub("", " ".join(text.split())))]
    names = [f"fraction {result['train_fraction']:g}" for result in shown.manifest["results"]]
    names += [shown.manifest["dataset"]["name"]]
    assert [text for text in strange if not any(name in text for name in names)] == []


# --- what it says --------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first() -> None:
    shown = page("experiment")
    first = next(element for element in shown.tree.iter() if element.attrib.get("class") == "verdict")
    assert text_of(first) == shown.manifest["verdict"]
    headings = [text_of(e) for e in shown.tree.iter() if e.tag in ("h1", "h2")]
    assert headings[:2] == ["How much does transfer learning help on tf_flowers?", "The answer"]


def test_what_speaks_against_the_figures_stands_above_them() -> None:
    warnings = next(e for e in page("experiment").tree.iter() if e.attrib.get("class") == "warnings")
    text = text_of(warnings)
    assert "3 photos lie in more than one split" in text
    assert "2 could not be decoded" in text
    assert "one model's accuracy is known no better than" in text
    assert "One seed" not in text
    assert "Every arm was trained once." in page("many classes").html
    assert "Trained once" not in page("many classes").html


def test_an_arm_with_one_seed_beside_others_with_several_is_named() -> None:
    fields = example(arms=("scratch", "frozen"), fractions=(1.0,), seeds=(0, 1), epochs=0).model_dump()
    fields["results"] = [r for r in fields["results"] if r["arm"] == "frozen" or r["seed"] == 0]
    fields |= {"summaries": [], "comparisons": [], "verdict": ""}
    html = render(Manifest.model_validate(fields), {})
    assert re.search(r"Trained once\s+was\s+scratch", html)
    assert "No two arms were compared." in html


def test_nothing_is_warned_of_where_nothing_is_wrong() -> None:
    fields = example(arms=("frozen",), fractions=(1.0,), seeds=(0, 1), epochs=0).model_dump()
    fields["dataset"] |= {"skipped_examples": 0, "duplicates_across_splits": 0, "duplicates": []}
    for result in fields["results"]:
        accuracy = result["metrics"]["test"]["accuracy"]
        result["metrics"]["test"]["accuracy_interval"] = (accuracy, accuracy)
    assert 'class="warnings"' not in render(Manifest.model_validate(fields), {})


def test_many_classes_are_cut_to_those_that_need_a_look() -> None:
    html = page("many classes").html
    confusions = re.search(r"The most frequent confusions of frozen.*?</table>", html, flags=re.DOTALL)
    assert confusions is not None
    assert confusions[0].count("<tr>") == 21
    assert len(html) < 1_000_000


def test_what_users_chose_is_text_and_nothing_else() -> None:
    shown = page("hostile")
    assert [e for e in shown.tree.iter() if e.tag in ("script", "iframe", "object")] == []
    assert [e for e in shown.tree.iter() if any(name.startswith("on") for name in e.attrib)] == []
    assert [e.attrib["href"] for e in shown.tree.iter() if e.attrib.get("href", "").startswith("javascript")] == []
    texts = {"".join(e.itertext()) for e in shown.tree.iter() if "data-path" in e.attrib}
    assert set(HOSTILE) <= texts


# --- the photos --------------------------------------------------------------------------------------------------


def test_the_photos_that_most_seeds_get_wrong_come_first_at_each_arms_largest_fraction() -> None:
    def result(arm: str, fraction: float, seed: int, wrong: dict[str, float]) -> Result:
        base = smallest([]).results[0].model_dump()
        listed = [
            {
                "example_id": n,
                "label": "cat",
                "predicted": "dog",
                "label_probability": p,
                "predicted_probability": 1 - p,
            }
            for n, p in wrong.items()
        ]
        return Result.model_validate(
            base | {"arm": arm, "train_fraction": fraction, "seed": seed, "most_wrong": listed}
        )

    results = [
        result("frozen", 0.5, 0, {"small": 0.0}),
        result("frozen", 1.0, 0, {"a": 0.3, "once": 0.01, "b": 0.2}),
        result("frozen", 1.0, 1, {"a": 0.4, "b": 0.1}),
        result("scratch", 0.5, 0, {"own": 0.2, "a": 0.1}),
    ]
    # scratch's row stands above frozen's in the table of arms
    assert wanted_photos(results) == ("a", "own", "b", "once")
    many = result("frozen", 1.0, 0, {f"p{n}": n / 100 for n in range(40)})
    assert wanted_photos([many]) == tuple(f"p{n}" for n in range(PHOTOS_PER_ARM))


def test_photos_stand_on_the_page_as_they_were_given_and_where_one_is_missing_words_do() -> None:
    record = example(arms=("frozen",), fractions=(1.0,), seeds=(0,), epochs=0)
    given = photos(record, 48)
    missing = next(iter(given))
    kept = {name: encoded for name, encoded in given.items() if name != missing}
    html = render(record, kept)
    shown = [base64.b64decode(found) for found in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)]
    assert shown == list(kept.values())
    assert html.count("no picture") == 1
    assert missing in html
    wrong = record.results[0].most_wrong[1]
    assert f'alt="{wrong.label}, taken for {wrong.predicted}"' in html


# --- how it is made ------------------------------------------------------------------------------------------------


def test_the_page_asks_nothing_of_anywhere(shown: Page) -> None:
    for element in shown.tree.iter():
        assert element.tag not in ("script", "link") or element.attrib.get("href") == "data:,"
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            value = element.attrib.get(name, "")
            local = value == "" or value.startswith(("data:", "#"))
            assert local or (element.tag == "a" and value.startswith("https://")), (element.tag, name, value[:80])
    css = "".join(e.text or "" for e in shown.tree.iter("style"))
    assert "url(" not in css
    assert "@import" not in css


def test_ids_are_unique_and_every_reference_leads_somewhere(shown: Page) -> None:
    ids = [e.attrib["id"] for e in shown.tree.iter() if "id" in e.attrib]
    assert len(ids) == len(set(ids))
    for element in shown.tree.iter():
        named = element.attrib.get("aria-labelledby", "").split()
        named += [element.attrib["href"][1:]] if element.attrib.get("href", "").startswith("#") else []
        named += re.findall(r"url\(#([^)]+)\)", element.attrib.get("clip-path", ""))
        assert set(named) <= set(ids), element.attrib


def test_headings_go_down_one_level_at_a_time(shown: Page) -> None:
    levels = [int(e.tag[1]) for e in shown.tree.iter() if re.fullmatch(r"h[1-6]", str(e.tag))]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))


def test_tables_have_captions_and_their_headers_a_direction(shown: Page) -> None:
    tables = list(shown.tree.iter("table"))
    assert tables
    for table in tables:
        assert table.find("caption") is not None
        assert all(header.attrib.get("scope") in ("col", "row") for header in table.iter("th"))
        region = next(e for e in ancestors(table) if e.attrib.get("role") == "region")
        assert region.attrib["tabindex"] == "0"
        columns = len(table.findall("thead/tr/th"))
        assert {len(row) for row in table.findall("tbody/tr")} <= {columns}


def test_charts_are_named_and_their_letters_are_letters(shown: Page) -> None:
    drawn = list(shown.tree.iter(f"{SVG}svg"))
    for svg in drawn:
        assert svg.attrib["role"] == "img"
        assert text_of(svg.find(f"{SVG}title"))
        assert text_of(svg.find(f"{SVG}desc"))
        assert list(svg.iter(f"{SVG}text"))
        assert "DejaVu" not in ElementTree.tostring(svg, encoding="unicode")
        colours = re.findall(r"#[0-9a-f]{6}\b", ElementTree.tostring(svg, encoding="unicode"))
        assert colours == [], "a colour that does not follow the page's"
    assert drawn or not shown.manifest["results"]


def test_marks_stand_where_the_accuracies_are() -> None:
    accuracy = [0.5, 0.6, 0.85]
    points = charts.Points("frozen", 1, [10, 100, 1000], accuracy, [None, (0.55, 0.7), None])
    svg = charts.accuracy([points], None, charts.Words("key", "title", "text"))
    places = re.findall(r'<use href="#key-[^"]+" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--arm-1\)', svg)
    # the last is the legend's
    x, y = zip(*[(float(left), float(down)) for left, down in places[:3]], strict=True)
    assert (y[0] - y[1]) / (y[0] - y[2]) == pytest.approx(0.1 / 0.35, abs=0.01)
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.1)


def test_equal_manifests_give_equal_pages() -> None:
    record = SHAPES["hostile"]()
    assert render(record, photos(record, 48)) == page("hostile").html


@pytest.mark.slow
def test_equal_manifests_give_equal_pages_in_every_process() -> None:
    program = (
        "import hashlib; from tests.results.test_report import page;"
        "print(hashlib.sha256(page('hostile').html.encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT), "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == hashlib.sha256(page("hostile").html.encode()).hexdigest()


@pytest.mark.parametrize(("baseline", "seen"), [(0.5, False), (0.93, True), (0.88, False), (0.97, True)])
def test_a_baseline_far_below_the_arms_does_not_flatten_what_is_between_them(baseline: float, seen: bool) -> None:
    arm = charts.Points("frozen", 0, [20, 100], [0.94, 0.96], [(0.93, 0.95), (0.95, 0.97)])
    assert charts.in_view(baseline, [arm]) is seen
