"""The locks: what is installed for development and in the images, by name, version and hash."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.support.running import ROOT

READ = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, EXTRAS = READ["project"], READ["project"]["optional-dependencies"]
LOCKS = {"dev": ROOT / "requirements-dev.lock"}
LOCKS |= {name: ROOT / "docker" / f"requirements-{name}.lock" for name in ("gpu", "cpu", "demo")}
ASKED = {
    "dev": [*READ["build-system"]["requires"], *PROJECT["dependencies"], *EXTRAS["demo"], *EXTRAS["dev"]],
    "gpu": [*PROJECT["dependencies"], *EXTRAS["gpu"]],
    "cpu": PROJECT["dependencies"],
    "demo": EXTRAS["demo"],
}
X86, ARM, MAC = "linux x86_64", "linux aarch64", "darwin arm64"
UV_PLATFORMS = {X86: "x86_64-unknown-linux-gnu", ARM: "aarch64-unknown-linux-gnu", MAC: "aarch64-apple-darwin"}
MACHINES = {"dev": [X86, ARM, MAC], "gpu": [X86], "cpu": [X86, ARM], "demo": [X86, ARM]}
PYTHONS = [f"3.{minor}" for minor in range(99) if f"3.{minor}" in SpecifierSet(PROJECT["requires-python"])]


@dataclass(frozen=True)
class Pinned:
    """One package of a lock."""

    requirement: Requirement

    @property
    def version(self) -> str:
        (specifier,) = self.requirement.specifier
        return specifier.version

    def on(self, machine: str) -> bool:
        platform, _, architecture = machine.partition(" ")
        marker = self.requirement.marker
        return marker is None or marker.evaluate({"sys_platform": platform, "platform_machine": architecture})


def locked(name: str) -> list[Pinned]:
    lines = LOCKS[name].read_text().replace("\\\n", "").splitlines()
    return [Pinned(Requirement(line.split(" --hash=")[0].strip())) for line in lines]


def versions(name: str, machine: str) -> dict[str, str]:
    return {canonicalize_name(each.requirement.name): each.version for each in locked(name) if each.on(machine)}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_names_versions_and_hashes_and_nothing_else(name: str) -> None:
    text = LOCKS[name].read_text()
    marker = r" ; (platform_machine|sys_platform) == '\w+'"
    assert re.fullmatch(rf"([a-z0-9-]+==[\w.]+({marker})?( \\\n    --hash=sha256:[0-9a-f]{{64}})+\n)+", text)
    assert len(text) < 2**20


@pytest.mark.parametrize(
    ("name", "machine"), [(name, each) for name, machines in MACHINES.items() for each in machines]
)
def test_a_lock_holds_what_pyproject_asks_for_within_its_bounds(name: str, machine: str) -> None:
    pinned = versions(name, machine)
    assert len(pinned) == sum(each.on(machine) for each in locked(name))
    if name == "cpu" and machine == X86:
        assert "tensorflow" not in pinned  # both would lie in one folder
        pinned["tensorflow"] = pinned["tensorflow-cpu"]
    for requirement in map(Requirement, ASKED[name]):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in the lock: make lock"
        assert requirement.specifier.contains(version), f"{requirement}: the lock has {version}: make lock"


def test_the_images_hold_the_versions_that_are_tested_and_cuda() -> None:
    tested = versions("dev", X86)
    gpu, cpu, demo = versions("gpu", X86), versions("cpu", X86), versions("demo", X86)
    assert cpu.pop("tensorflow-cpu") == gpu.pop("tensorflow") == tested["tensorflow"]
    cuda = {name for name in gpu.keys() - cpu.keys() if name.startswith("nvidia-")}
    assert {"nvidia-cudnn-cu12", "nvidia-cuda-nvcc-cu12", "nvidia-nccl-cu12"} <= cuda
    assert cpu == {name: version for name, version in gpu.items() if name not in cuda}
    assert (cpu | demo).items() <= tested.items()


def test_the_lock_serves_every_python_that_the_project_takes() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert f"PYTHONS := {' '.join(PYTHONS)}\n" in makefile
    told = f"Python {PYTHONS[0]} to {PYTHONS[-1]}"
    assert told in (ROOT / "README.md").read_text()
    assert told in (ROOT / "CONTRIBUTING.md").read_text()


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # `make test` tells the makes below it to print the folders that they enter
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", ["installed", "installed-gpu"])
def test_make_installs_nothing_that_the_lock_does_not_name(target: str, tmp_path: Path) -> None:
    done = make("--dry-run", f"VENV={tmp_path}", str(tmp_path / target))
    assert done.returncode == 0, done.stderr
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert len(installs) == (3 if target == "installed" else 4)
    for line in installs:
        assert {"--no-deps", "--no-build-isolation"} <= set(line.split())
        assert line.endswith("--editable .") or "--require-hashes --requirement" in line


@pytest.mark.parametrize(("target", "part"), [("installed", "setuptools"), ("installed-gpu", "nvidia-nccl-cu12")])
def test_a_part_of_a_lock_has_all_its_hashes(target: str, part: str, tmp_path: Path) -> None:
    lines = make("--dry-run", f"VENV={tmp_path}", str(tmp_path / target)).stdout.splitlines()
    subprocess.run(["sh", "-c", [line for line in lines if line.startswith("awk")][-1]], cwd=ROOT, check=True)  # noqa: S607
    text = (tmp_path / "part.lock").read_text()
    (whole,) = re.findall(rf"^{part}==.*(?:\n .*)+\n", text, flags=re.MULTILINE)
    source = "dev" if target == "installed" else "gpu"
    assert whole in LOCKS[source].read_text()
    assert len(re.findall("^[a-z]", text, flags=re.MULTILINE)) < len(locked(source))


def test_make_refuses_a_python_that_tensorflow_is_not_published_for(tmp_path: Path) -> None:
    python = tmp_path / "python"
    newer = "import sys; sys.version_info = (3, 99, 0, 'final', 0); exec(sys.argv[1])"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{newer}" "$2"\n')
    python.chmod(0o755)
    venv = tmp_path / "venv"
    done = make(f"VENV={venv}", f"PYTHON={python}", str(venv / "installed"))
    assert done.returncode != 0
    assert f"received Python 3.99; accepted: {' '.join(PYTHONS)}" in done.stderr
    assert not venv.exists()


# --- audit and SBOM --------------------------------------------------------------------------------------------------

AUDIT = ROOT / "docker" / "audit.py"


def tool(name: str) -> Path:
    path = Path(sys.executable).parent / name
    return path if path.exists() else pytest.skip(f"{name} is not there: make install")


class Database(BaseHTTPRequestHandler):
    """A database of known faults, which speaks as OSV does: one is known, of protobuf."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        package = asked["package"]
        ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}]
        fault = {"id": "PYSEC-1", "modified": "2020-01-01T00:00:00Z", "published": "2020-01-01T00:00:00Z"}
        fault |= {"summary": "-", "affected": [{"package": package, "ranges": ranges}]}
        known = self.path == "/faulty" and package["name"] == "protobuf"
        answer = json.dumps({"vulns": [fault]} if known else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Database) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def audited(url: str) -> subprocess.CompletedProcess[str]:
    tool("pip-audit")
    return subprocess.run([sys.executable, AUDIT, "--osv-url", url], capture_output=True, text=True, check=False)


def test_an_audit_asks_about_every_package_of_every_lock(database: str) -> None:
    done = audited(f"{database}/sound")
    assert done.returncode == 0, done.stderr
    here = f"{sys.platform} {platform.machine()}"
    packages = {pinned for name in LOCKS for pinned in versions(name, here).items()}
    assert f"0 known faults in {len(packages)} packages of requirements-dev.lock, docker/" in done.stdout


def test_an_audit_fails_where_a_fault_is_known(database: str) -> None:
    done = audited(f"{database}/faulty")
    assert done.returncode == 1, done.stderr
    version = versions("dev", X86)["protobuf"]
    assert f"protobuf {version}: PYSEC-1, fixed in 99.1\n1 known faults in " in done.stdout


def test_an_audit_that_reaches_no_database_says_so_and_ends_otherwise() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        done = audited(f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert done.returncode == 69
    assert "not audited: the database of known faults could not be asked" in done.stderr
    assert not done.stdout


def test_an_audit_with_a_wrong_argument_is_no_outage() -> None:
    tool("pip-audit")
    done = subprocess.run([sys.executable, AUDIT, "--unknown"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unrecognized arguments: --unknown" in done.stderr


def test_the_sbom_names_what_the_image_installs(tmp_path: Path) -> None:
    tool("cyclonedx-py")
    lines = make("--dry-run", "sbom", "DEVICE=cpu", "EXTRAS=demo", f"SBOM={tmp_path}/sbom.json").stdout
    (command,) = re.findall(r"^cat (?:.*\\\n)*.*", lines, flags=re.MULTILINE)
    command = command.replace(".venv/bin", str(Path(sys.executable).parent))
    subprocess.run(["sh", "-c", command], cwd=ROOT, check=True)  # noqa: S607
    sbom = json.loads((tmp_path / "sbom.json").read_text())
    assert sbom["bomFormat"] == "CycloneDX"
    assert (sbom["metadata"]["component"]["name"], sbom["metadata"]["component"]["version"]) == (
        PROJECT["name"],
        PROJECT["version"],
    )
    expected = {(each.requirement.name, each.version) for name in ("cpu", "demo") for each in locked(name)}
    assert {(each["name"], each["version"]) for each in sbom["components"]} == expected
    text = LOCKS["cpu"].read_text()
    for component in sbom["components"]:
        (reference,) = component["externalReferences"]
        assert all(each["content"] in text or component["name"] == "elpv-dataset" for each in reference["hashes"])
        assert reference["hashes"]


# --- installable -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES["dev"])
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_can_be_installed(python: str, machine: str, tmp_path: Path) -> None:
    """What uv would download for the machine: it asks the package index, and downloads nothing."""
    command = [Path(sys.executable).parent / "uv", "pip", "install", "--dry-run", "--no-deps", "--require-hashes"]
    command += ["--target", tmp_path, "--python-version", python, "--python-platform", UV_PLATFORMS[machine]]
    done = subprocess.run([*command, "--requirement", LOCKS["dev"]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Would install {len(versions('dev', machine))} packages" in done.stderr
