"""Whether the kernels of this machine make the same of a photo whatever else is in its batch, and wherever it stands.

On a CPU with AVX-512 VNNI, TensorFlow takes oneDNN's, which do. On others it takes Eigen's, and on a GPU cuDNN's, which
round by place or by number; there, what is computed in other batches is equal to rounding only.
"""

from __future__ import annotations

from pathlib import Path

from tests.support.running import python

BATCH = 32  # of inference on a CPU


def answers_depend_on_the_batch(model: Path, size: int, **environment: str) -> bool:
    """Return whether a SavedModel gives photos of that size other probabilities in other batches."""
    code = """
        import sys
        import numpy as np
        import tensorflow as tf
        model, size, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        served = tf.saved_model.load(model).signatures["from_pixels"]
        generator = np.random.default_rng(0)
        pixels = generator.integers(0, 256, (batch, size, size, 3), np.uint8)
        def answers(order):
            return served(pixels=tf.constant(pixels[order]))["probabilities"].numpy()
        orders = [generator.permutation(batch)[:count] for count in (2, 7, batch // 2, batch - 1, batch, batch)]
        whole = answers(np.arange(batch))
        print(any((answers(order) != whole[order]).any() for order in orders))
    """
    return {"True": True, "False": False}[python(code, model, size, BATCH, **environment).stdout.split()[-1]]
