"""Runs of several results, and in other precisions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiment.test_run import comparable
from tests.support.running import completed, published_by


def test_seeds_and_fractions_share_one_pass_over_the_photos(tiny: dict[str, str], tmp_path: Path) -> None:
    several = {"TRANSFER_SEEDS": "0,1", "TRANSFER_TRAIN_FRACTIONS": "0.5,1", "TRANSFER_CACHE_DIR": str(tmp_path / "c")}
    environment = tiny | several | {"TRANSFER_ARMS": "frozen,fine_tune"}
    outputs = [tmp_path / name for name in ("one", "two")]
    runs = [published_by(environment, output) for output in outputs]
    passes = [[line for line in run.process.lines if "computed" in line] for run in runs]
    assert [line["split"] for line in passes[0]] == ["train", "validation", "test"]
    # the first run makes the rows, once for eight results; the second finds them
    assert [{line["computed"] for line in lines} for lines in passes] == [{True}, {False}]
    manifests = [run.manifest for run in runs]
    order = [(result["train_fraction"], result["seed"], result["arm"]) for result in manifests[0]["results"]]
    assert order == [(f, s, arm) for f in (0.5, 1.0) for s in (0, 1) for arm in ("frozen", "fine_tune")]
    assert comparable(manifests[0]) == comparable(manifests[1])
    compared = [(each["train_fraction"], each["seeds"]) for each in manifests[0]["comparisons"]]
    assert compared == [(fraction, seeds) for fraction in (0.5, 1.0) for seeds in ([0, 1], [0], [1])]
    assert all("seed" in comparison["verdict"] for comparison in manifests[0]["comparisons"])
    assert [len(summary["seeds"]) for summary in manifests[0]["summaries"]] == [2] * 4
    assert "over 2 seeds" in manifests[0]["verdict"]
    # a result among many is the result alone
    completed(tiny | {"TRANSFER_ARMS": "fine_tune", "TRANSFER_SEEDS": "1", "TRANSFER_OUTPUT_URI": str(tmp_path)})
    where = "arms/fine_tune/fraction-1/seed-1/predictions.csv"
    (lonely,), (among,) = tmp_path.glob(f"*/{where}"), outputs[0].glob(f"*/{where}")
    assert lonely.read_bytes() == among.read_bytes()


@pytest.mark.parametrize(
    ("precision", "xla"),
    [
        ("mixed_float16", "off"),
        pytest.param("mixed_bfloat16", "off", marks=pytest.mark.slow),
        pytest.param("float32", "on", marks=pytest.mark.slow),
    ],
)
def test_other_precisions_and_xla_run_to_the_end(
    tiny: dict[str, str], tmp_path: Path, precision: str, xla: str
) -> None:
    changes = {"TRANSFER_PRECISION": precision, "TRANSFER_XLA": xla, "TRANSFER_ARMS": "frozen,fine_tune"}
    found = published_by(tiny | changes | {"TRANSFER_DETERMINISTIC": "false"}, tmp_path).manifest["environment"]
    assert found["precision"] == precision
    assert found["xla"] is (xla == "on")
