"""The TFDS data set ``solar_cells``: electroluminescence photos of solar cells, from an installed package."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from job.errors import ConfigError

_DESCRIPTION = """\
2,624 photos of solar cells cut out of electroluminescence images of 44 photovoltaic modules (18 monocrystalline, 26
polycrystalline), 300 x 300 pixels, 8-bit grey. Experts gave each cell a probability of being defective: 0, 1/3, 2/3 or
1. `label` calls a cell defective from 0.5 on: 821 of the 2,624. The data are licensed CC BY-NC-SA 4.0.
"""

_CITATION = """\
@article{deitsch2019,
  author = {Deitsch, Sergiu and Christlein, Vincent and Berger, Stephan and Buerhop-Lutz, Claudia and Maier, Andreas
            and Gallwitz, Florian and Riess, Christian},
  title = {Automatic classification of defective photovoltaic module cells in electroluminescence images},
  journal = {Solar Energy}, volume = {185}, pages = {455--468}, year = {2019}, doi = {10.1016/j.solener.2019.02.067}
}
@inproceedings{buerhop2018,
  author = {Buerhop-Lutz, Claudia and Deitsch, Sergiu and Maier, Andreas and Gallwitz, Florian and Berger, Stephan
            and Doll, Bernd and Hauch, Jens and Camus, Christian and Brabec, Christoph J.},
  title = {A benchmark for visual identification of defective solar cells in electroluminescence imagery},
  booktitle = {35th European PV Solar Energy Conference and Exhibition}, year = {2018},
  doi = {10.4229/35thEUPVSEC20182018-5CV.3.15}
}
"""


class SolarCells(tfds.core.GeneratorBasedBuilder):
    """ELPV as a TFDS data set with the one split ``train``; needs the package elpv-dataset, and no network."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "All cells of elpv-dataset 1.0."}

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(300, 300, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=["functional", "defective"]),
                    "probability": np.float32,
                    "type": tfds.features.ClassLabel(names=["mono", "poly"]),
                    "filename": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://github.com/zae-bayern/elpv-dataset",
            citation=_CITATION,
            license="CC BY-NC-SA 4.0",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        # The package's own loader decodes every photo into one array; its files are all that is needed here.
        spec = importlib.util.find_spec("elpv_dataset")
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError.of(
                "TRANSFER_DATASET",
                "solar_cells is made from the Python package elpv-dataset, which is not installed; "
                "run: pip install '.[demo]'",
            )
        return {"train": self._generate_examples(Path(spec.submodule_search_locations[0]) / "data")}

    def _generate_examples(self, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        for line in (folder / "labels.csv").read_text().splitlines():
            path, probability, cell_type = line.split()
            yield (
                path,
                {
                    "image": (folder / path).read_bytes(),
                    "label": int(float(probability) >= 0.5),
                    "probability": float(probability),
                    "type": cell_type,
                    "filename": Path(path).name,
                },
            )
