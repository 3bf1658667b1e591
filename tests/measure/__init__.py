"""Programs that measure instead of test; README.md says what each measures, and which page shows its figures."""
