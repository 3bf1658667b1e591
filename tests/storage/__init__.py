"""Tests of job/storage."""
