"""Tests of job/models."""
