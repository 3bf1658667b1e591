"""Tests of job/results."""
