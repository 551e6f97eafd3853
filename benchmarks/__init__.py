"""Studies whose tables stand in docs/benchmarks.md: each is run as `python -m benchmarks.NAME`."""
