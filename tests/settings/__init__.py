"""Tests of job/settings."""
