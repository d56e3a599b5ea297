"""Measurements: suites of cells, each in processes of its own; run from the root of the repository with `python -m`."""
