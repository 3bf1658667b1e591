"""A run from its plan to its publication: the order of things."""
