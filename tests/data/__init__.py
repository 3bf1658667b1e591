"""Tests of job/data."""
