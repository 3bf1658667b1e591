"""TFDS builders of our own: importing the package registers them under their TFDS names."""

from job.datasets.solar_cells import SolarCells

__all__ = ["SolarCells"]
