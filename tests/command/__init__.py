"""Tests of the whole command as a process: killed, stopped, cut off, starved, and on real photos."""
