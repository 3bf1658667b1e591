"""Tests of job/experiment."""
