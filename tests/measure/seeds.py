"""How far the test accuracy of each arm moves from seed to seed, from the manifest of a published run.

python -m tests.measure.seeds output/RUN_ID    prints a Markdown table; takes a second
"""

from __future__ import annotations

import sys
from pathlib import Path

from job.manifest import Manifest


def table(manifest: Manifest) -> str:
    """Return a row for each arm and fraction: mean and 95% interval over seeds and photos, and single seeds' range."""
    lines = ["| arm | training photos | seeds | test accuracy, 95% interval | least and largest of a seed |"]
    lines.append("| --- | ---: | ---: | --- | --- |")
    for one in manifest.summaries:
        accuracies = [
            result.metrics.test.accuracy
            for result in manifest.results
            if (result.arm, result.train_fraction) == (one.arm, one.train_fraction)
        ]
        low, high = one.interval
        cells = [one.arm, f"{one.train_examples:,}", str(len(one.seeds))]
        cells += [f"{one.test_accuracy:.3f} ({low:.3f} - {high:.3f})", f"{min(accuracies):.3f} - {max(accuracies):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "".join(f"{line}\n" for line in lines)


def main(folder: str) -> None:
    manifest = Manifest.model_validate_json((Path(folder) / "manifest.json").read_bytes())
    dataset, backbone = manifest.dataset, manifest.backbone
    photos = f"{dataset.splits.test.examples:,} test photos"
    sys.stdout.write(f"{dataset.name} {dataset.version}, {photos}, {backbone.name} at {backbone.image_size} px\n\n")
    sys.stdout.write(table(manifest))


if __name__ == "__main__":
    main(sys.argv[1])
