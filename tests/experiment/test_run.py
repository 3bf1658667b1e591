"""The whole comparison by the real command: environment in, published manifest out."""

from __future__ import annotations

import csv
import html
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import job
from job.experiment.source_code import digest_of
from tests.support.kernels import answers_depend_on_the_batch
from tests.support.kills import started, variables_of
from tests.support.running import CLASSES, ROOT, Published, completed, published_by, run_job
from tests.support.servers import faulty_proxy, gcs_server, stored

ARMS = ["scratch", "frozen", "fine_tune"]
# how far a training on rows that are equal to rounding may end from another: 100 times what was seen of Eigen's kernels
ROUNDING = 1e-4
# of predictions.csv: example, label and probabilities
Row = tuple[str, int, list[float]]


def by_arm(published: Published) -> dict[str, dict[str, Any]]:
    return {result["arm"]: result for result in published.manifest["results"]}


def predictions_of(published: Published) -> Iterator[tuple[dict[str, Any], tuple[list[str], list[Row]]]]:
    """Yield each result with the header and the rows of its ``predictions.csv``."""
    for result in published.manifest["results"]:
        path = published.folder / Path(result["saved_model"]).parent / "predictions.csv"
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        yield result, (header, [(row[0], int(row[1]), [float(value) for value in row[2:]]) for row in rows])


def test_every_log_line_is_json_with_severity_message_and_time(published: Published) -> None:
    assert published.process.lines
    assert all({"severity", "message", "time"} <= set(line) for line in published.process.lines)
    epochs = [line for line in published.process.lines if "epoch" in line]
    assert {(line["arm"], line["epoch"]) for line in epochs} == {(arm, epoch) for arm in ARMS for epoch in (1, 2)}


def test_the_run_holds_what_the_contract_lists_and_nothing_else(published: Published) -> None:
    listed = {artifact["path"] for artifact in published.manifest["artifacts"]} | {"manifest.json"}
    there = {path.relative_to(published.folder).as_posix() for path in published.folder.rglob("*") if path.is_file()}
    assert there == listed
    top = {"manifest.json", "manifest.schema.json", "report.html", "arms", "tensorboard"}
    assert {path.partition("/")[0] for path in listed} == top
    for arm in ARMS:
        place = f"{arm}/fraction-1/seed-0"
        files = {f"arms/{place}/{name}" for name in ("predictions.csv", "model_card.md", "saved_model/saved_model.pb")}
        assert files | {f"tensorboard/{place}/events.out.tfevents.0.result"} <= listed


def test_the_report_answers_first_and_shows_the_photos_that_each_arm_got_wrong(published: Published) -> None:
    page = (published.folder / "report.html").read_text(encoding="utf-8")
    assert published.manifest["verdict"] in html.unescape(page)
    wrong = {one["example_id"] for result in published.manifest["results"] for one in result["most_wrong"]}
    assert wrong
    assert page.count("data:image/jpeg;base64,") == sum(
        len(result["most_wrong"]) for result in published.manifest["results"]
    )


def test_what_a_model_got_most_wrong_is_what_its_predictions_say(published: Published) -> None:
    for result, (_, rows) in predictions_of(published):
        wrong = [row for row in rows if max(row[2]) != row[2][row[1]]]
        wrong.sort(key=lambda row: row[2][row[1]])
        told = [(one["example_id"], one["label"], one["label_probability"]) for one in result["most_wrong"]]
        assert told == [(name, CLASSES[label], pytest.approx(p[label])) for name, label, p in wrong[:12]]


def test_the_manifest_says_which_code_ran(published: Published, tmp_path: Path) -> None:
    package = tmp_path / "job"
    shutil.copytree(ROOT / "job", package)
    code = published.manifest["code"]
    assert code == {"version": job.__version__, "digest": digest_of(package)}
    (package / ".DS_Store").touch()
    shutil.rmtree(package / "__pycache__", ignore_errors=True)
    assert digest_of(package) == code["digest"]
    (package / "arms.py").write_bytes((package / "arms.py").read_bytes() + b"\n")
    assert digest_of(package) != code["digest"]


def test_the_manifest_says_what_was_run(published: Published) -> None:
    manifest = published.manifest
    assert published.folder.name == manifest["run_id"]
    assert manifest["run_id"].endswith(manifest["fingerprint"][:12])
    assert manifest["dataset"]["classes"] == list(CLASSES)
    assert manifest["dataset"]["skipped_examples"] == 1
    splits = manifest["dataset"]["splits"]
    assert [splits[name]["examples"] for name in ("train", "validation", "test")] == [71, 24, 24]
    assert manifest["settings"]["head_epochs"] == 1
    assert manifest["settings"]["run_id"] == manifest["run_id"]
    assert manifest["environment"]["deterministic"] is True
    assert len(manifest["backbone"]["weights"]["sha256"]) == 64
    assert [result["arm"] for result in manifest["results"]] == ARMS
    assert {(c["better"], c["worse"]) for c in manifest["comparisons"]} | {
        (c["worse"], c["better"]) for c in manifest["comparisons"]
    } == {(a, b) for a in ARMS for b in ARMS if a != b}


def test_each_arm_trains_what_it_should(published: Published) -> None:
    results = by_arm(published)
    parameters = {arm: result["parameters"] for arm, result in results.items()}
    whole = parameters["scratch"]["backbone_trainable"]
    assert parameters["frozen"]["backbone_trainable"] == 0
    assert 0 < parameters["fine_tune"]["backbone_trainable"] < whole
    assert parameters["frozen"]["trainable"] == 1024 * 3 + 3
    assert len({values["total"] for values in parameters.values()}) == 1
    assert [epoch["phase"] for epoch in results["fine_tune"]["history"]] == ["head", "tail"]
    assert all([epoch["epoch"] for epoch in result["history"]] == [1, 2] for result in results.values())


def test_only_the_arm_whose_batch_norm_trains_reports_it(published: Published) -> None:
    results = by_arm(published)
    assert "batch_norm" not in results["frozen"]
    assert "batch_norm" not in results["fine_tune"]
    scratch = results["scratch"]
    assert set(scratch["batch_norm"]) == {"test_accuracy_raw", "test_accuracy_recalibrated"}
    assert scratch["batch_norm"]["test_accuracy_recalibrated"] == scratch["metrics"]["test"]["accuracy"]


def test_predictions_are_those_behind_the_metrics(published: Published) -> None:
    for result, (header, rows) in predictions_of(published):
        assert header == ["example_id", "label", *(f"probability_{name}" for name in CLASSES)]
        assert all(abs(sum(probabilities) - 1) < 1e-5 for _, _, probabilities in rows)
        hits = sum(probabilities.index(max(probabilities)) == label for _, label, probabilities in rows)
        assert hits / len(rows) == result["metrics"]["test"]["accuracy"]
        assert len({row[0] for row in rows}) == len(rows) == 24


def test_costs_follow_from_the_price_and_the_seconds(published: Published) -> None:
    for result in published.manifest["results"]:
        assert result["cost"] == pytest.approx(result["seconds"]["total"] / 3600 * 3.6)
        parts = sum(result["seconds"][name] for name in ("data", "features", "training", "evaluation", "export"))
        assert parts <= result["seconds"]["total"] + 0.01


def test_what_results_share_is_told_beside_what_each_took(published: Published) -> None:
    results, summaries = published.manifest["results"], published.manifest["summaries"]
    assert results[0]["seconds"]["data"] > 0
    for result, summary in zip(results, summaries, strict=True):
        seconds = result["seconds"]
        own = seconds["total"] - seconds["data"] - seconds["features"]
        assert (summary["arm"], summary["own_seconds"]) == (result["arm"], pytest.approx(own))
        assert summary["own_cost"] == pytest.approx(own / 3600 * 3.6)
    decoding, frozen, whole = (
        sum(result["seconds"][name] for result in results) for name in ("data", "features", "total")
    )
    told = f"results share {decoding:.0f} s of decoding and {frozen:.0f} s of frozen layers: {whole:.0f} s in all"
    assert told in published.process.text


def test_verify_accepts_the_run_and_finds_a_changed_byte(published: Published, tmp_path: Path) -> None:
    assert run_job({}, "verify", str(published.folder)).code == 0
    copy = tmp_path / "copy"
    shutil.copytree(published.folder, copy)
    victim = copy / "arms/frozen/fraction-1/seed-0/predictions.csv"
    victim.write_bytes(victim.read_bytes().replace(b"0", b"1", 1))
    damaged = run_job({}, "verify", str(copy))
    assert damaged.code == 1
    assert "predictions.csv" in damaged.text


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_repeat_of_a_finished_run_trains_nothing_and_fills_the_platforms_place_for_the_model(
    published: Published, small: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    shutil.copytree(published.folder.parent, output)
    (output / published.folder.name / ".DS_Store").touch()
    before = files_below(output)
    changes = {"TRANSFER_COST_PER_HOUR": "1", "AIP_MODEL_DIR": str(tmp_path / "model")}
    again = completed(small | {"TRANSFER_OUTPUT_URI": str(output)} | changes)
    assert not [line for line in again.lines if "epoch" in line]
    assert files_below(output) == before
    best = max(published.manifest["results"], key=lambda result: result["metrics"]["validation"]["accuracy"])
    assert files_below(tmp_path / "model") == files_below(published.folder / best["saved_model"])


def test_another_experiment_under_a_taken_id_is_refused(published: Published, small: dict[str, str]) -> None:
    taken = {
        "TRANSFER_OUTPUT_URI": str(published.folder.parent),
        "TRANSFER_RUN_ID": published.folder.name,
        "TRANSFER_EPOCHS": "3",
    }
    refused = run_job(small | taken)
    assert refused.code == 78
    assert "TRANSFER_RUN_ID" in refused.text


def test_another_experiment_under_an_id_that_another_has_begun_with_is_refused_before_it_decodes(
    small: dict[str, str], tmp_path: Path
) -> None:
    same_id = {"TRANSFER_OUTPUT_URI": str(tmp_path / "output"), "TRANSFER_RUN_ID": "mine"}
    with started(small | same_id) as running:
        assert running.until("scratch: fraction")
        running.send(signal.SIGKILL)
        running.process.wait()
    for verb in ("run", "plan"):
        refused = run_job(small | same_id | {"TRANSFER_EPOCHS": "3"}, verb)
        assert refused.code == 78
        assert "has begun at" in refused.text
        assert not [line for line in refused.lines if "decoding" in line["message"]]
    assert run_job(small | same_id, "plan").code == 0


def test_results_are_the_same_without_the_cache_and_in_another_order(
    published: Published, small: dict[str, str], tmp_path: Path
) -> None:
    """Bit for bit where kernels make the same of a photo whatever else is in its batch, elsewhere to rounding."""
    changes = {"TRANSFER_FEATURE_CACHE": "off", "TRANSFER_ARMS": "fine_tune,frozen", "TRANSFER_RUN_ID": "uncached"}
    other = published_by(small | changes, tmp_path)
    for arm in ("fine_tune", "frozen"):
        places = [run.folder / f"arms/{arm}/fraction-1/seed-0" for run in (other, published)]
        exact = not answers_depend_on_the_batch(places[0] / "saved_model", 32)
        predictions = [(place / "predictions.csv").read_bytes() for place in places]
        assert predictions[0] == predictions[1] or not exact, arm
        uncached, cached = (variables_of(place / "saved_model") for place in places)
        assert uncached.keys() == cached.keys()
        assert len(cached) > 100
        for name, value in uncached.items():
            close = 0.0 if exact else ROUNDING * max(1.0, np.abs(value).max())
            np.testing.assert_allclose(value, cached[name], rtol=0, atol=close, err_msg=f"{arm}: {name}")
    answers = [{result["arm"]: rows for result, (_, rows) in predictions_of(run)} for run in (other, published)]
    for arm, rows in answers[0].items():
        for (name, label, one), (*same, another) in zip(rows, answers[1][arm], strict=True):
            assert [name, label] == same
            np.testing.assert_allclose(one, another, rtol=0, atol=ROUNDING)
    assert other.folder.name == "uncached"
    assert {arm: result["rows"]["kept"] for arm, result in by_arm(other).items()} == {"fine_tune": "no", "frozen": "no"}
    assert not any("features of" in line["message"] for line in other.process.lines)


def test_the_manifest_says_what_was_read_in_each_epoch(published: Published) -> None:
    rows = {arm: result["rows"] for arm, result in by_arm(published).items()}
    assert rows == {
        "scratch": {"cut": "pixels", "row_bytes": 32 * 32 * 3, "kept": "disk"},
        "frozen": {"cut": "pooled", "row_bytes": 1024 * 4, "kept": "memory"},
        "fine_tune": {"cut": "conv_dw_12_relu", "row_bytes": 1 * 1 * 512 * 4, "kept": "disk"},
    }


def comparable(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest without what may differ between places: times, costs, paths and what hangs on them."""
    kept = json.loads(json.dumps(manifest))
    for name in ("created", "artifacts"):
        del kept[name]
    for name in ("dataset", "data_dir", "output_uri", "weights"):
        del kept["settings"][name]
    del kept["backbone"]["weights"]["source"]
    for result in kept["results"]:
        for name in ("seconds", "examples_per_second", "energy_joules", "cost"):
            result.pop(name, None)
        for epoch in result["history"]:
            del epoch["seconds"]
    for summary in kept["summaries"]:
        for name in ("seconds", "cost", "own_seconds", "own_cost"):
            summary.pop(name, None)
    kept["settings"].pop("cost_per_hour")
    return dict(kept)


def test_from_bucket_to_bucket_gives_the_same_manifest(
    published: Published, small: dict[str, str], photos: Path, weights: Path, tmp_path: Path
) -> None:
    for name in ("data", "results", "models"):
        (tmp_path / "buckets" / name).mkdir(parents=True)
    shutil.copytree(photos, tmp_path / "buckets" / "data" / "tfds" / "pets" / "1.0.0")
    shutil.copy(weights, tmp_path / "buckets" / "data" / "mobilenet.weights.h5")
    with gcs_server(tmp_path / "buckets") as server, faulty_proxy(server) as proxy:
        changes = {
            "STORAGE_EMULATOR_HOST": proxy.url,
            "TRANSFER_DATASET": "gs://data/tfds/pets/1.0.0",
            "TRANSFER_WEIGHTS": "gs://data/mobilenet.weights.h5",
            "TRANSFER_OUTPUT_URI": "gs://results/some/prefix",
            "AIP_MODEL_DIR": "gs://models/best",
            "AIP_TENSORBOARD_LOG_DIR": "gs://models/logs",
        }
        completed(small | proxy.tensorflow | changes)
        run_id = published.manifest["run_id"]
        completed({"STORAGE_EMULATOR_HOST": proxy.url}, "verify", f"gs://results/some/prefix/{run_id}")
        fetched = json.loads(stored(server, "results", f"some/prefix/{run_id}/manifest.json"))
        assert stored(server, "models", "best/saved_model.pb")
        watched = f"logs/{run_id}/fine_tune/fraction-1/seed-0/events.out.tfevents.0.result"
        assert b"test/accuracy" in stored(server, "models", watched)
    assert comparable(fetched) == comparable(published.manifest)
    ours, theirs = (
        [each["sha256"] for each in manifest["artifacts"] if each["path"].endswith("predictions.csv")]
        for manifest in (published.manifest, fetched)
    )
    assert ours == theirs


def test_sigterm_ends_the_run_with_143_and_publishes_nothing(small: dict[str, str], tmp_path: Path) -> None:
    places = {"TRANSFER_OUTPUT_URI": str(tmp_path / "output"), "TRANSFER_CACHE_DIR": str(tmp_path / "scratch")}
    with started(small | places) as running:
        assert running.until("scratch: fraction")
        running.send(signal.SIGTERM)
        process = running.end()
    assert process.code == 143
    assert "asked to stop" in process.text
    assert not list((tmp_path / "output").rglob("manifest.json"))
    # rows of frozen layers are kept for the next run, the workspace is not
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["features"]


def test_env_prints_the_table_of_the_page_of_settings() -> None:
    printed = completed({}, "env").errors
    assert "TRANSFER_DATASET" in printed
    assert printed.strip() in (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def test_an_unknown_verb_is_answered_with_the_usage() -> None:
    done = run_job({}, "train")
    assert done.code == 78
    assert "python -m job" in done.errors
