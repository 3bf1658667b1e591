"""Tests of what surrounds the code: image, deploy manifests, README and docs."""
