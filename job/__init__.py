"""A batch job that measures how much transfer learning helps on a set of photos."""

__version__ = "0.1.0"
