"""The presets in deploy/env: accepted by the job, and read alike by everything that reads them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.settings.environment import load
from tests.support.real import read_env_file
from tests.support.running import ROOT
from tests.support.servers import Handler, serving

FOLDER = ROOT / "deploy" / "env"
NAMES = sorted(path.stem for path in FOLDER.glob("*.env"))

# What depends on the machine, the bucket or the moment is no part of an experiment. TRANSFER_DATA_DIR is in some
# presets for `make`, and every container is given another one.
PLACES = {
    "TRANSFER_OUTPUT_URI",
    "TRANSFER_CHECKPOINT_URI",
    "TRANSFER_CACHE_DIR",
    "TRANSFER_RUN_ID",
    "TRANSFER_COST_PER_HOUR",
    "TRANSFER_MAX_SECONDS",
    "TRANSFER_MAX_COST",
    "TRANSFER_LOG_FORMAT",
}

_SECRETS = (
    r"(?i)(password|passwd|secret|token|api_?key|private_?key|credentials?)\s*[=:]\s*['\"]?[^\s'\"]",
    r"-----BEGIN",
    r"\bAIza[\w-]{30,}",
    r"\bya29\.",
    r"\bgh[pousr]_\w{20,}",
    r"://[^/\s:@]+:[^/\s@]+@",
    r"[?&](X-Goog-Signature|Signature|sig)=",
    r"(?=\S*[A-Z])(?=\S*\d)\b[A-Za-z0-9+/]{60,}",
)
# Names of Kubernetes' own fields that hold no secret.
_HARMLESS = r"automountServiceAccountToken: (false|true)"


def secrets_in(text: str) -> list[str]:
    """Return what looks like a secret in the text of a file."""
    text = re.sub(_HARMLESS, "", text)
    return [found.group() for pattern in _SECRETS for found in re.finditer(pattern, text)]


def as_a_shell_reads(path: Path) -> dict[str, str]:
    done = subprocess.run(
        ["/bin/sh", "-ec", 'set -a; . "$1"; exec env -0', "sh", str(path)],
        env={"PATH": os.environ["PATH"], "HOME": "/home/someone"},
        capture_output=True,
        text=True,
        check=True,
    )
    pairs = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    return {name: value for name, value in pairs.items() if name not in ("PATH", "HOME", "PWD", "_", "SHLVL", "OLDPWD")}


def kustomized(folder: Path) -> list[dict[str, Any]]:
    """Return the objects that ``kubectl kustomize`` makes of a folder."""
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def as_kustomize_reads(path: Path) -> dict[str, str]:
    found = [
        data["data"]
        for data in kustomized(path.parent)
        if re.fullmatch(rf"preset-{path.stem}-[a-z0-9]{{10}}", data["metadata"]["name"])
    ]
    assert len(found) == 1, f"deploy/env/kustomization.yaml makes no ConfigMap preset-{path.stem}"
    return dict(found[0])


class Engine(Handler):
    """As much of a Docker engine as `docker create` talks to: it keeps the environment that it is sent."""

    received: list[list[str]]

    def respond(self) -> None:
        if self.command == "POST":
            self.received.append(json.loads(self.content())["Env"])
            self.answer_json(201, {"Id": "0" * 64, "Warnings": []}, Api_Version="1.43")
        else:
            self.answer_json(200, {"ApiVersion": "1.43"}, Api_Version="1.43")


def as_docker_reads(path: Path, folder: Path) -> dict[str, str]:
    received: list[list[str]] = []
    handler = type("Listening", (Engine,), {"received": received})
    with serving(handler) as port:
        host = f"tcp://127.0.0.1:{port}"
        subprocess.run(
            ["docker", "create", "--env-file", str(path), "image"],  # noqa: S607
            env={"PATH": os.environ["PATH"], "DOCKER_HOST": host, "DOCKER_CONFIG": str(folder)},
            capture_output=True,
            check=True,
        )
    (environment,) = received
    return dict(entry.split("=", 1) for entry in environment)


def test_every_preset_is_there() -> None:
    assert set(NAMES) == {"article", "flowers-xception", "solar-demo", "solar-paper"}


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_accepted_by_the_job(name: str) -> None:
    load(read_env_file(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_has_each_variable_once_and_only_settings_of_the_experiment(name: str) -> None:
    lines = [line for line in (FOLDER / f"{name}.env").read_text().splitlines() if line and not line.startswith("#")]
    counted = Counter(line.split("=", 1)[0] for line in lines)
    assert [variable for variable, times in counted.items() if times > 1] == []
    assert all(variable.startswith("TRANSFER_") for variable in counted)
    assert PLACES.isdisjoint(counted)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_has_no_secret(name: str) -> None:
    assert secrets_in((FOLDER / f"{name}.env").read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "TRANSFER_TOKEN=abc",
        "password: hunter2",
        '"private_key": "-----BEGIN PRIVATE KEY-----',
        "gs://bucket/x?X-Goog-Signature=00ff",
        "TRANSFER_DATA_DIR=https://user:word@host/x",
        "x: ya29.a0AfH6SMB",
        "data: " + "QUJD09" * 20,
    ],
)
def test_what_looks_like_a_secret_is_seen(text: str) -> None:
    assert secrets_in(text)


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_reads_a_preset_as_it_is_written(name: str) -> None:
    assert as_a_shell_reads(FOLDER / f"{name}.env") == read_env_file(name)


@pytest.mark.skipif(shutil.which("docker") is None, reason="not compared with docker's reading: install the docker CLI")
@pytest.mark.parametrize("name", NAMES)
def test_docker_reads_a_preset_as_it_is_written(name: str, tmp_path: Path) -> None:
    assert as_docker_reads(FOLDER / f"{name}.env", tmp_path) == read_env_file(name)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="not compared with kustomize's reading: install kubectl")
@pytest.mark.parametrize("name", NAMES)
def test_kustomize_reads_a_preset_as_it_is_written(name: str) -> None:
    assert as_kustomize_reads(FOLDER / f"{name}.env") == read_env_file(name)


# Each of these means another thing to a shell than to docker and kustomize, which take it as it is.
DIFFERENT = ["A='b'", 'A="b"', "A=$HOME", "A=b # c", "A=`id`", "A=b c", "A=~/x", "A=b;c", "A=b\\c"]


@pytest.mark.parametrize("line", DIFFERENT)
def test_a_line_that_a_shell_reads_differently_is_seen(line: str, tmp_path: Path) -> None:
    path = tmp_path / "differs.env"
    path.write_text(f"{line}\n")
    try:
        read = as_a_shell_reads(path)
    except subprocess.CalledProcessError as error:
        read = {"failed": error.stderr}
    assert read != dict([line.split("=", 1)])


def test_the_article_is_the_jobs_defaults() -> None:
    assert load(read_env_file("article")).deciding() == load({}).deciding()
    assert load(read_env_file("article")).data == load({}).data


def test_flowers_xception_trains_the_head_first_and_then_everything_at_a_much_lower_rate() -> None:
    settings = load(read_env_file("flowers-xception"))
    data, model, training = settings.data, settings.model, settings.training
    assert (data.dataset, model.backbone, model.image_size) == ("tf_flowers", "Xception", 224)
    assert [data.train_split, data.validation_split, data.test_split] == [
        "train[:80%]",
        "train[80%:90%]",
        "train[90%:]",
    ]
    assert (training.optimizer, training.fine_tune_from, training.resolved_head_epochs) == ("sgd", "all", 5)
    assert training.fine_tune_learning_rate <= training.learning_rate / 10
