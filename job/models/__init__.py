"""Backbones, taken apart and put together: what runs frozen, what trains, what is exported."""
