"""Benchmarks: `python -m tests.bench.NAME`. Each prints a table and ends with one JSON line."""
