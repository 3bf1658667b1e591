"""Tests of job/machine."""
