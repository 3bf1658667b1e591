"""Write the locks: names, versions and hashes of all that is installed for development and in the images.

requirements-dev.lock serves every Python and machine that TensorFlow is published for, with one version of each
package. docker/requirements-{gpu,cpu,demo}.lock follow it, so that the images hold what was tested. The bounds are
those of pyproject.toml. Two things differ from ``pip install .``:

- On x86-64 the CPU image takes tensorflow-cpu, the same code without the CUDA kernels (274 MB to download instead of
  572, 1.3 GB on disk instead of 1.9). It is not published for aarch64, where tensorflow has no CUDA kernels anyway.
- The demo's lock is elpv-dataset alone: the job reads the photos out of its folder and never imports it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
DEV = ROOT / "requirements-dev.lock"
# TensorFlow has no wheels for others.
X86, ARM = (
    {"sys_platform": "linux", "platform_machine": "x86_64"},
    {"sys_platform": "linux", "platform_machine": "aarch64"},
)
MAC = {"sys_platform": "darwin", "platform_machine": "arm64"}
CPYTHON = {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
IMAGES = ["3.11"]


def main() -> None:
    """Write the four locks; newer versions come in only with ``--upgrade``."""
    read = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, needed = read["project"], read["project"]["dependencies"]
    extras = project["optional-dependencies"]
    pythons = [f"3.{minor}" for minor in range(99) if f"3.{minor}" in SpecifierSet(project["requires-python"])]
    development = [*read["build-system"]["requires"], *needed, *extras["demo"], *extras["dev"]]
    # pip-audit asks for pip, which every environment has: it is not replaced while it installs
    lock(DEV, development, [X86, ARM, MAC], pythons, "--fork-strategy", "fewest", "--no-emit-package", "pip")
    tested = ["--constraint", str(DEV)]
    lock(image("gpu"), [*needed, *extras["gpu"]], [X86], IMAGES, *tested)
    lock(
        image("cpu"),
        [line for requirement in needed for line in without_cuda(requirement)],
        [X86, ARM],
        IMAGES,
        *tested,
    )
    lock(image("demo"), extras["demo"], [X86, ARM], IMAGES, "--no-deps", *tested)


def image(name: str) -> Path:
    """Return where the lock of that kind of image is."""
    return FOLDER / f"requirements-{name}.lock"


def without_cuda(requirement: str) -> list[str]:
    """Return the requirement as the CPU image has it."""
    parsed = Requirement(requirement)
    if parsed.name != "tensorflow":
        return [requirement]
    return [
        f"tensorflow-cpu{parsed.specifier}; platform_machine == '{X86['platform_machine']}'",
        f"tensorflow{parsed.specifier}; platform_machine != '{X86['platform_machine']}'",
    ]


def lock(
    target: Path, requirements: list[str], machines: list[dict[str, str]], pythons: list[str], *options: str
) -> None:
    """Resolve the requirements for the machines and Pythons, and write the lock.

    What the lock holds already is kept as long as it fits, so that a change of one bound does not move all the rest.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # uv takes the platforms to resolve for from the pyproject.toml of its project only
        source = Path(scratch) / "pyproject.toml"
        bounds = f"python_version >= '{pythons[0]}' and python_version <= '{pythons[-1]}'"
        source.write_text(
            "[project]\nname = 'locked'\nversion = '0'\n"
            f"dependencies = {json.dumps(requirements)}\n[tool.uv]\nenvironments = "
            + json.dumps(
                [" and ".join([bounds, *(f"{name} == '{value}'" for name, value in each.items())]) for each in machines]
            )
        )
        uv = Path(sysconfig.get_path("scripts")) / "uv"
        command = [str(uv), "--quiet", "--project", scratch, "pip", "compile", str(source), "--universal"]
        # without header and notes, no address enters the lock, whatever index this machine uses
        command += ["--generate-hashes", "--no-header", "--no-annotate"]
        command += ["--python-version", pythons[0], "--output-file", str(target), *options, *sys.argv[1:]]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    # uv repeats the platforms in the marker of every line; what is left of it tells one machine from the other
    every = [{**CPYTHON, **machine, **versions} for machine in machines for versions in map(python, pythons)]
    text = re.sub(r" ; (.+?)(?= \\$)", lambda found: shortened(found[1], every), target.read_text(), flags=re.M)
    target.write_text(text)
    print(f"{target.relative_to(ROOT)}: {len(re.findall('^[a-z]', text, re.M))} packages")  # noqa: T201


def python(version: str) -> dict[str, str]:
    """Return what markers may ask about a version of Python."""
    return {"python_version": version, "python_full_version": f"{version}.0"}


def shortened(marker: str, environments: list[dict[str, str]]) -> str:
    """Return the shortest marker that says the same of these environments."""

    def holds(text: str) -> list[bool]:
        return [Marker(text).evaluate(each) for each in environments]

    if all(holds(marker)):
        return ""
    parts = dict.fromkeys(f"{name} == '{each[name]}'" for name in X86 for each in environments)
    return " ; " + next((part for part in parts if holds(part) == holds(marker)), marker)


if __name__ == "__main__":
    main()
