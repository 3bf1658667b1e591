"""The container image, really built and run as clusters run it: no rights, no network, stopped, short of memory.

CONTAINER is the tool, docker (default) or one with its arguments, such as podman; CONTAINER_BUILD_FLAGS and
CONTAINER_RUN_FLAGS are added to its ``build`` and ``run``. `make test-image` sets all three.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from job.settings.environment import variables_markdown
from tests.support.running import ROOT

pytestmark = pytest.mark.slow

TOOL = shlex.split(os.environ.get("CONTAINER", "docker"))
BUILD_FLAGS = shlex.split(os.environ.get("CONTAINER_BUILD_FLAGS", ""))
RUN_FLAGS = shlex.split(os.environ.get("CONTAINER_RUN_FLAGS", ""))
TAG = "transfer-learning-job:test"
# A user whom the image does not know; files in mounted folders must stay removable for the one who runs the tests.
USER = os.getuid() or 123456
LOCKED = ["--user", f"{USER}:{USER}", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
SCRATCH = "/tmp"  # noqa: S108  (the container's own)
LOCKED += ["--network", "none", "--tmpfs", SCRATCH]
SOLAR = ROOT / "deploy/env/solar-demo.env"


def tool(*arguments: str | Path, seconds: float = 600) -> subprocess.CompletedProcess[str]:
    command = [*TOOL, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)


def build(tag: str, **arguments: str) -> subprocess.CompletedProcess[str]:
    flags = [flag for name, value in arguments.items() for flag in ("--build-arg", f"{name}={value}")]
    return tool("build", *BUILD_FLAGS, *flags, "--tag", tag, "--file", "docker/Dockerfile", ".", seconds=3000)


@pytest.fixture(scope="module")
def image() -> str:
    """The CPU image with the demo's photos and weights."""
    try:
        version = tool("version")
    except FileNotFoundError:
        pytest.skip(f"no container tool {TOOL[0]!r}: install Docker or podman, or name another in CONTAINER")
    if version.returncode:
        pytest.skip(f"{shlex.join(TOOL)} reaches no engine: start one, or name another tool in CONTAINER")
    done = build(TAG, DEVICE="cpu", EXTRAS="demo", WEIGHTS="MobileNetV2:96", REVISION="0123abc")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return TAG


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that mount an empty output and a cache, which keeps the prepared photos from one container to the next."""
    flags = ["--workdir", "/cache", "--env", "TRANSFER_CACHE_DIR=/cache"]
    for name in ("output", "cache"):
        folder = tmp_path_factory.mktemp(name)
        folder.chmod(0o777)
        flags += ["--volume", f"{folder}:/{name}"]
    return flags


def output_of(folders: list[str]) -> Path:
    return Path(next(flag for flag in folders if flag.endswith(":/output")).removesuffix(":/output"))


def run(image: str, *arguments: str, flags: list[str] | None = None, **variables: str) -> tuple[int, str]:
    """Run the image with no rights and no network; return the exit code and what it printed."""
    chosen = [flag for name, value in variables.items() for flag in ("--env", f"{name}={value}")]
    done = tool("run", "--rm", *RUN_FLAGS, *LOCKED, *(flags or []), *chosen, image, *arguments)
    return done.returncode, done.stdout + done.stderr


def seen_inside(image: str, look: str) -> Any:
    """Return the JSON that Python code prints in the image."""
    code, text = run(image, "-c", look, flags=["--entrypoint", "python"])
    assert code == 0, text
    return json.loads(text)


@contextmanager
def started(image: str, flags: list[str]) -> Iterator[str]:
    """The name of a running container, which is removed at the end."""
    name = f"transfer-test-{uuid.uuid4().hex[:12]}"
    done = tool("run", "--detach", "--name", name, *RUN_FLAGS, *LOCKED, *flags, image)
    assert done.returncode == 0, done.stderr
    try:
        yield name
    finally:
        tool("rm", "--force", name)


def wait_for(name: str, words: str) -> None:
    end = time.monotonic() + 240
    while words not in (log := tool("logs", name).stdout):
        assert time.monotonic() < end, log
        time.sleep(0.3)


def manifests(folders: list[str]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(output_of(folders).glob("*/manifest.json"))]


def test_the_container_has_no_rights_no_network_and_no_name(image: str) -> None:
    look = (
        "import json, os, re\n"
        "status = open('/proc/self/status').read()\n"
        "print(json.dumps({'user': os.getuid(), 'rights': re.findall(r'Cap(?:Eff|Bnd):\\s*0*(\\w*)', status),\n"
        "    'networks': os.listdir('/sys/class/net'), 'writable': [f for f in ('/', '/opt/keras', '/cache', '/tmp')\n"
        "    if os.access(f, os.W_OK)], 'home': os.path.expanduser('~')}))"
    )
    assert seen_inside(image, look) == {
        "user": USER,
        "rights": ["", ""],
        "networks": ["lo"],
        "writable": [SCRATCH],
        "home": SCRATCH,
    }


def test_the_quickstart_publishes_to_a_mounted_folder_and_another_container_verifies_it(
    image: str, folders: list[str]
) -> None:
    flags = [*folders, "--env-file", str(SOLAR)]
    code, text = run(image, flags=flags, TRANSFER_EPOCHS="2", TRANSFER_ARMS="frozen,fine_tune")
    assert code == 0, text
    (manifest,) = manifests(folders)
    assert [result["arm"] for result in manifest["results"]] == ["frozen", "fine_tune"]
    assert manifest["dataset"]["name"] == "solar_cells"
    assert len(manifest["backbone"]["weights"]["sha256"]) == 64
    code, text = run(image, "verify", f"/output/{manifest['run_id']}", flags=folders)
    assert code == 0, text
    assert "verified" in text


def test_sigterm_to_the_container_ends_it_with_143_and_the_next_one_goes_on(image: str, folders: list[str]) -> None:
    chosen = {"TRANSFER_ARMS": "scratch", "TRANSFER_EPOCHS": "3"}
    flags = [*folders, "--env-file", str(SOLAR), *(f"--env={name}={value}" for name, value in chosen.items())]
    with started(image, flags) as name:
        wait_for(name, "scratch: epoch 1/3")
        begin = time.monotonic()
        assert tool("stop", "-t", "30", name).returncode == 0
        assert time.monotonic() - begin < 28
        assert tool("wait", name).stdout.strip() == "143"
    code, text = run(image, flags=flags)
    assert code == 0, text
    (result,) = next(each for each in manifests(folders) if len(each["results"]) == 1)["results"]
    assert (result["arm"], result["resumed"]) == ("scratch", 1)


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_too_little_memory_is_refused_before_the_kernel_kills(image: str, folders: list[str], verb: str) -> None:
    limits = ["--memory", "600m", "--memory-swap", "600m"]
    code, text = run(image, verb, flags=[*folders, "--env-file", str(SOLAR), *limits])
    assert code == 78, text
    assert "629 MB may be used" in text


def test_without_a_mounted_output_the_run_is_refused(image: str) -> None:
    code, text = run(image, "plan", flags=["--env-file", str(SOLAR)])
    assert code == 78, text
    assert "TRANSFER_OUTPUT_URI" in text


def test_a_wrong_setting_is_refused_and_env_prints_the_table(image: str) -> None:
    code, text = run(image, TRANSFER_EPOCHS="many")
    assert code == 78
    assert "TRANSFER_EPOCHS: received 'many'" in text
    assert run(image, "env") == (0, variables_markdown())


def test_the_image_says_what_it_is(image: str) -> None:
    (found,) = json.loads(tool("image", "inspect", image).stdout)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    labels = {name.removeprefix("org.opencontainers.image."): each for name, each in found["Config"]["Labels"].items()}
    assert labels["version"] == version
    assert labels["revision"] == "0123abc"
    assert labels["licenses"] == "Apache-2.0 AND CC-BY-NC-SA-4.0"
    assert found["Config"]["User"] == "10001:10001"
    assert "JOB_REVISION=0123abc" in found["Config"]["Env"]
    assert found["Config"]["Entrypoint"] == ["python", "-m", "job"]
    assert not found["Config"].get("Cmd")
    assert not any(variable.startswith("NVIDIA_") for variable in found["Config"]["Env"])


def test_the_image_holds_no_installer_no_source_tree_and_every_package_that_the_job_needs(image: str) -> None:
    look = (
        "import importlib.metadata as m, re, sys, json\n"
        "from packaging.requirements import Requirement as R\n"
        "have = {re.sub('[-_.]+', '-', d.metadata['Name']).lower() for d in m.distributions()}\n"
        "need = {R(r) for d in m.distributions() for r in d.requires or []}\n"
        "gone = {r.name for r in need if (not r.marker or r.marker.evaluate({'extra': ''}))}\n"
        "gone = {n for n in gone if re.sub('[-_.]+', '-', n).lower() not in have}\n"
        "print(json.dumps([sorted(gone), 'pip' in have]))"
    )
    # tensorflow-cpu is in its place
    assert seen_inside(image, look) == [["tensorflow"], False]


@pytest.mark.parametrize(("name", "value", "accepted"), [("DEVICE", "tpu", "gpu, cpu"), ("EXTRAS", "dev", "demo")])
def test_an_unknown_build_argument_fails_the_build(image: str, name: str, value: str, accepted: str) -> None:
    done = build(f"{image}-not", **{"DEVICE": "cpu", name: value})
    assert done.returncode != 0
    text = done.stdout + done.stderr
    # BuildKit looks for all stages first, and so names the missing one only
    assert re.search(f"received '{value}'; accepted: {accepted}|device-{value}", text), text
