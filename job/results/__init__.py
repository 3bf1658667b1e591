"""Figures, and what people read of them: statistics, report, model cards, event files. No TensorFlow."""
