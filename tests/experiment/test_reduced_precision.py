"""Kernels that round by the size of the batch, as a GPU's do: what such a run trains is published and verified."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.kernels import answers_depend_on_the_batch
from tests.support.real import WEIGHTS, Real, read_env_file
from tests.support.reduced_precision import MODES
from tests.support.running import ROOT, Published, environment_of, places, published_in, run_job

PRECISIONS = {"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}
# Where ONEDNN_MAX_CPU_ISA=AVX2 stands for another machine, TensorFlow asks oneDNN for bfloat16 all the same, by what
# the CPU has, and is refused.
KERNELS = {"bfloat16": {"TF_ENABLE_ONEDNN_OPTS": "0"}}
# What was accepted in probability, of any arithmetic, before logits were compared.
EARLIER = 1e-4
QUICKSTART = Real(read_env_file("solar-demo") | {"TRANSFER_WEIGHTS": str(WEIGHTS)}, WEIGHTS)


def published_in_mode(mode: str, environment: Mapping[str, str], folder: Path) -> tuple[Path, dict[str, Any]]:
    """Let a run be published by such kernels; return its folder and its manifest."""
    changes = places(folder) | {"TRANSFER_PRECISION": PRECISIONS.get(mode, "float32")} | KERNELS.get(mode, {})
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.reduced_precision", mode],
        cwd=ROOT,
        env=environment_of(dict(environment) | changes),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return published_in(folder / "output")


def check(mode: str, folder: Path, manifest: Mapping[str, Any]) -> None:
    assert run_job({}, "verify", str(folder)).code == 0
    assert [result["arm"] for result in manifest["results"]] == ["scratch", "frozen", "fine_tune"]
    for result in manifest["results"]:
        proof = result["export_proof"]
        sys.stderr.write(f"{mode}, {result['arm']}: {proof}\n")
        assert proof["examples"] == 24
        assert 0 < proof["largest_logit_difference"] <= proof["tolerance"]
        assert (proof["largest_probability_difference"] > EARLIER) == (mode != "float32")


@pytest.mark.parametrize("mode", [pytest.param("float32", marks=pytest.mark.slow), *MODES[1:]])
def test_a_run_is_published_and_verified_where_kernels_round_by_the_batch(
    mode: str, small: dict[str, str], tmp_path: Path
) -> None:
    folder, manifest = published_in_mode(mode, small, tmp_path)
    check(mode, folder, manifest)
    model = folder / manifest["results"][1]["saved_model"]
    assert answers_depend_on_the_batch(model, 32, **KERNELS.get(mode, {})), "the kernels are published with it"


def test_the_cpus_own_kernels_are_far_from_the_tolerance(published: Published) -> None:
    for result in published.manifest["results"]:
        assert result["export_proof"]["largest_logit_difference"] < result["export_proof"]["tolerance"] / 10


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_quickstart_is_published_and_verified_where_kernels_round_by_the_batch(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("elpv_dataset", reason="the quickstart's photos come with the extra [demo]")
    check(mode, *published_in_mode(mode, QUICKSTART.required().environment, tmp_path))
