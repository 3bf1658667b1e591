"""Ask a database of known faults about every package of the locks: `make audit`.

    python docker/audit.py [pip-audit's own arguments, such as --ignore-vuln ID or --osv-url URL]

It ends with 0 where none is known, with 1 where one is, and with 69 where the database could not be asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = [ROOT / "requirements-dev.lock", *sorted((ROOT / "docker").glob("requirements-*.lock"))]
FAULTS, USAGE, UNAVAILABLE = 1, 2, 69


def main() -> int:
    """Audit the locks, and say what was found."""
    command = [Path(sysconfig.get_path("scripts")) / "pip-audit", "--vulnerability-service", "osv", "--require-hashes"]
    command += ["--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command += [word for lock in LOCKS for word in ("--requirement", lock)]
    done = subprocess.run([*command, *sys.argv[1:]], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode == USAGE:
        sys.stderr.write(done.stderr)
        return USAGE
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        why = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        sys.stderr.write(f"not audited: the database of known faults could not be asked: {why}\n")
        sys.stderr.write("try again where it can be reached, or name another by --osv-url URL\n")
        return UNAVAILABLE
    faults = 0
    for package in packages:
        for fault in package["vulns"]:
            fixed = ", ".join(fault["fix_versions"]) or "no release"
            print(f"{package['name']} {package['version']}: {fault['id']}, fixed in {fixed}")  # noqa: T201
            faults += 1
    names = ", ".join(str(lock.relative_to(ROOT)) for lock in LOCKS)
    print(f"{faults} known faults in {len(packages)} packages of {names}")  # noqa: T201
    return FAULTS if faults else 0


if __name__ == "__main__":
    sys.exit(main())
