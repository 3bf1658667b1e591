"""Whether two published runs are the same but for times and places: what proves that a change changes no result.

    python -m tests.measure.same_results FOLDER FOLDER    seconds; ends with 0 where they are, else names what differs

Publish one run before the change and one after it, on one machine, with TRANSFER_DETERMINISTIC=true.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMES = {"created", "seconds", "examples_per_second", "energy_joules", "cost"}
PLACES = {"output_uri", "data_dir", "cache_dir", "checkpoint_uri"}
# Files that tell of times, or into which TensorFlow writes the names of its functions in no fixed order.
VARYING = ("report.html", "model_card.md", "events.out.tfevents.0.result", "saved_model.pb", "fingerprint.pb")


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Yield where the two differ, as JSON pointers, but for times and places."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted((one.keys() | other.keys()) - TIMES - PLACES):
            if (name in one) != (name in other):
                yield f"{where}/{name}: in one only"
            else:
                yield from differences(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{where}/{index}")
    elif one != other or type(one) is not type(other):
        yield f"{where}: {one!r} and {other!r}"


def compared(folder: Path) -> dict[str, Any]:
    """Return a run's manifest, its artifacts by path; of those that vary, the path alone."""
    manifest = dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    files = {each["path"]: None if each["path"].endswith(VARYING) else each for each in manifest.pop("artifacts")}
    return manifest | {"artifacts": files, "order": list(manifest)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.same_results", description="two published runs")
    parser.add_argument("folders", nargs=2, type=Path)
    one, other = map(compared, parser.parse_args().folders)
    found = list(differences(one, other))
    for line in found:
        sys.stdout.write(f"{line}\n")
    fixed = sum(each is not None for each in one["artifacts"].values())
    sys.stdout.write(f"{len(found)} differences; {fixed} of {len(one['artifacts'])} files compared by checksum\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
