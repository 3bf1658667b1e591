"""Tests of job/training."""
