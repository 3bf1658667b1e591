"""What can be said of the container image without building it: Dockerfile, .dockerignore, compose file."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from job import stopping
from job.settings.environment import load
from tests.support.running import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDER = ROOT / "docker"
DOCKERFILE = FOLDER / "Dockerfile"
COMPOSE = FOLDER / "compose.yaml"


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    return found[max(index for index, (name, _) in enumerate(found) if name == "FROM") :]


def only(name: str) -> str:
    (value,) = [rest for each, rest in last_stage() if each == name]
    return value


def pairs(name: str) -> dict[str, str]:
    text = " ".join(rest for each, rest in last_stage() if each == name)
    return {key: value.strip('"') for key, value in re.findall(r'([\w.]+)=("[^"]*"|\S+)', text)}


def let_in(path: str) -> bool:
    """Whether .dockerignore lets the file into the build: of the patterns for it or a folder above it, the last."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        above = [str(Path(*Path(path).parts[: depth + 1])) for depth in range(len(Path(path).parts))]
        names = above + [Path(each).name for each in above] if "**/" in line else above
        if line and not line.startswith("#") and any(fnmatch.fnmatchcase(name, pattern) for name in names):
            kept = line.startswith("!")
    return kept


def test_hadolint_finds_nothing_that_is_not_explained_beside_its_ignore() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint is not there: pip install '.[dev]'")
    done = subprocess.run([hadolint, "--format", "json", DOCKERFILE], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == []
    lines = DOCKERFILE.read_text().splitlines()
    ignores = [index for index, line in enumerate(lines) if "hadolint ignore" in line]
    assert ignores
    for index in ignores:
        assert re.fullmatch(r"# [A-Z].*\.", lines[index - 1]), f"line {index + 1}: an ignore without its reason"


def test_every_base_is_an_argument_or_a_stage_and_names_no_registry() -> None:
    found = instructions()
    base = dict(rest.partition("=")[::2] for name, rest in found if name == "ARG")["BASE_IMAGE"]
    assert re.fullmatch(r"python:3\.11-[\w.-]+@sha256:[0-9a-f]{64}", base)
    stages = {rest.split(" AS ")[1] for name, rest in found if name == "FROM"}
    for name, rest in found:
        if name == "FROM":
            image = rest.split(" AS ")[0]
            assert image in {"${BASE_IMAGE}", "scratch"} or image.replace("${DEVICE}", "gpu") in stages


def test_the_syntax_is_pinned_in_the_first_line_where_alone_it_counts() -> None:
    first = DOCKERFILE.read_text().splitlines()[0]
    assert re.fullmatch(r"# syntax=docker/dockerfile:1\.\d+\.\d+@sha256:[0-9a-f]{64}", first)


def test_the_entrypoint_gets_signals_and_no_arguments() -> None:
    assert json.loads(only("ENTRYPOINT")) == ["python", "-m", "job"]
    assert json.loads(only("CMD")) == []
    assert only("STOPSIGNAL") == "SIGTERM"


def test_user_and_group_are_numbers_that_are_not_root() -> None:
    assert only("USER") == "10001:10001"
    assert compose({})["services"]["job"]["user"] == "10001:10001"


def test_the_job_can_know_its_revision() -> None:
    assert pairs("ENV")["JOB_REVISION"] == pairs("LABEL")["org.opencontainers.image.revision"] == "${REVISION}"


def test_the_image_sets_only_what_the_job_accepts_and_an_output_that_it_does_not_have() -> None:
    chosen = load(pairs("ENV"))
    assert chosen.output.output_uri == "/output"
    assert chosen.platform.keras_home == "/opt/keras"
    assert not any("/output" in rest for name, rest in last_stage() if name != "ENV")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_only_the_gpu_variant_asks_for_gpus(device: str) -> None:
    found = instructions()
    (start,) = [index for index, each in enumerate(found) if each == ("FROM", f"${{BASE_IMAGE}} AS device-{device}")]
    asks = found[start + 1][0] == "ENV" and "NVIDIA_VISIBLE_DEVICES=all" in found[start + 1][1]
    assert asks == (device == "gpu")


def test_the_labels_agree_with_pyproject() -> None:
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in pairs("LABEL").items()}
    assert labels["title"] == PROJECT["name"]
    assert labels["description"] == PROJECT["description"]
    assert labels["version"] == PROJECT["version"]
    assert labels["licenses"] == PROJECT["license"] + "${EXTRAS:+ AND CC-BY-NC-SA-4.0}"
    assert {"source", "revision", "created"} <= set(labels)


def test_the_tag_is_the_version_wherever_it_stands() -> None:
    for file in (DOCKERFILE, COMPOSE, ROOT / "Makefile"):
        tags = re.findall(rf"{PROJECT['name']}:([\d.]+)", file.read_text())
        assert tags, file
        assert set(tags) == {PROJECT["version"]}, file


def test_the_dockerfile_takes_the_lock_of_its_device_with_its_hashes() -> None:
    runs = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    fetching = [rest for rest in runs if "/build/source" not in rest]
    assert len(fetching) == 2
    for command in re.findall(r"pip install[^&;]*", " ".join(fetching)):
        assert "--require-hashes" in command
        assert "--no-deps" in command
    assert 'lock="/build/requirements-${DEVICE}.lock"' in fetching[0]


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        "output/run/manifest.json",
        "tests/conftest.py",
        "deploy/env/solar-demo.env",
        "docker/compose.yaml",
        "docker/Dockerfile",
        "job/__pycache__/run.cpython-311.pyc",
        ".cache/tfds/photos",
        "Makefile",
    ],
)
def test_the_build_does_not_see(path: str) -> None:
    assert not let_in(path)


def test_the_build_sees_all_that_it_copies() -> None:
    copied = [rest for name, rest in instructions() if name == "COPY" and "--from=" not in rest]
    sources = [source for rest in copied for source in rest.split()[:-1]]
    assert "job" in sources
    for source in sources:
        source = source.replace("${DEVICE}", "cpu")
        assert (ROOT / source).exists()
        assert let_in(source)
    assert let_in("job/datasets/solar_cells.py")


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_make_runs_the_image_of_the_device_without_rights_and_as_the_caller(device: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "docker-run", f"DEVICE={device}", "DOCKER=podman", "VERB=plan"],  # noqa: S607
        cwd=ROOT,
        # `make test` tells the makes below it to print the folders that they enter
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.replace("\\\n", " ").split()
    assert words[words.index("podman") + 1] == "run"
    assert words[words.index("--user") + 1] == "$(id"  # -u):$(id -g), filled in by the shell
    assert words[-2:] == [f"{PROJECT['name']}:{PROJECT['version']}" + ("-cpu" if device == "cpu" else ""), "plan"]
    assert ("--gpus" in words) == (device == "gpu")
    assert {"--read-only", "--cap-drop", "no-new-privileges"} <= set(words)
    assert float(words[words.index("--stop-timeout") + 1]) > stopping.GRACE_SECONDS
    assert (ROOT / words[words.index("--env-file") + 1]).is_file()


def test_make_refuses_an_unknown_device() -> None:
    command = ["make", "--dry-run", "image", "DEVICE=tpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "received 'tpu'; accepted: gpu, cpu" in done.stderr


@pytest.mark.parametrize(
    ("buildx", "store", "attested"),
    [
        (True, "[[driver-type io.containerd.snapshotter.v1]]", True),
        (True, "[[Backing Filesystem extfs]]", False),
        (False, "", False),
    ],
)
def test_make_attests_the_image_where_docker_can_keep_it(
    buildx: bool, store: str, attested: bool, tmp_path: Path
) -> None:
    docker = tmp_path / "docker"
    docker.write_text(
        f'#!/bin/sh\ncase $1 in\nbuildx) {str(buildx).lower()} ;;\ninfo) echo "{store}" ;;\n'
        f'build) printf "%s\\n" "$@" >{tmp_path}/told ;;\nesac\n'
    )
    docker.chmod(0o755)
    command = ["make", "image", "DEVICE=cpu", f"DOCKER={docker}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    words = (tmp_path / "told").read_text().splitlines()
    assert words[0] == "build"
    assert ({"--sbom=true", "--provenance=mode=max"} <= set(words)) == attested
    assert not attested or "no SBOM" not in done.stdout
    assert attested or "the image has no SBOM and no provenance" in done.stdout


# --- compose ---------------------------------------------------------------------------------------------------------


def compose(environment: dict[str, str]) -> dict[str, Any]:
    """The compose file as the tool reads it: merge keys resolved, variables filled in."""

    def filled(found: re.Match[str]) -> str:
        return environment.get(found["name"]) or found["default"]

    text = re.sub(r"\$\{(?P<name>\w+):-(?P<default>[^}]*)\}", filled, COMPOSE.read_text())
    assert "${" not in text
    read = yaml.safe_load(text)
    return {key: value for key, value in read.items() if not key.startswith("x-")}


@pytest.mark.parametrize("environment", [{}, {"ENV_FILE": "/my.env", "JOB_USER": "1000:1000", "GPUS": "all"}])
def test_the_compose_file_is_a_valid_one(environment: dict[str, str]) -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="compose-spec is not there: pip install '.[dev]'")
    parsed = compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose(environment)))
    assert sorted(parsed.service_names()) == ["job", "job-cpu", "plan", "plan-cpu"]


@pytest.mark.parametrize(("run", "plan"), [("job", "plan"), ("job-cpu", "plan-cpu")])
def test_a_job_starts_only_after_its_plan_agreed(run: str, plan: str) -> None:
    services = compose({})["services"]
    assert services[run]["depends_on"] == {plan: {"condition": "service_completed_successfully"}}
    same = ("image", "env_file", "environment", "user", "volumes", "working_dir", "deploy", "profiles")
    assert [services[run].get(key) for key in same] == [services[plan].get(key) for key in same]
    assert services[plan]["command"] == ["plan"]
    assert "command" not in services[run]


@pytest.mark.parametrize("name", ["job", "job-cpu", "plan", "plan-cpu"])
def test_a_service_has_no_rights_and_time_to_save(name: str) -> None:
    service = compose({})["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == [pairs("ENV")["HOME"]]
    assert float(service["stop_grace_period"].removesuffix("s")) > stopping.GRACE_SECONDS
    assert service["build"]["args"]["DEVICE"] == ("cpu" if name.endswith("-cpu") else "gpu")
    gpus = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    assert [each["capabilities"] for each in gpus] == ([] if name.endswith("-cpu") else [["gpu"]])


def test_the_services_settings_are_the_jobs() -> None:
    service = compose({})["services"]["job"]
    (file,) = service["env_file"]
    lines = [line for line in (FOLDER / file).read_text().splitlines() if line and not line.startswith("#")]
    chosen = load(pairs("ENV") | dict(line.split("=", 1) for line in lines) | service["environment"])
    mounted = {volume.rsplit(":", 1)[1] for volume in service["volumes"]}
    assert {chosen.output.output_uri, chosen.runtime.cache_dir} == mounted
    assert service["working_dir"] in mounted  # where a relative TRANSFER_DATA_DIR lies


def test_every_variable_of_the_compose_file_is_explained_in_its_head() -> None:
    head, _, body = COMPOSE.read_text().partition("\nname:")
    for name in set(re.findall(r"\$\{(\w+)", body)):
        assert re.search(rf"^#   .*\b{name}\b.* {{2,}}", head, re.M), name
