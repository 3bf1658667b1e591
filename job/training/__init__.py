"""The one loop: steps, epochs, checkpoints, evaluation."""
