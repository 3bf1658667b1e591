"""What was asked for: the environment as checked, frozen values. No TensorFlow, no I/O."""
