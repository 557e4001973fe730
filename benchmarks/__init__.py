"""Benchmarks: each runs with ``python -m benchmarks.NAME``, prints a table, writes a folder."""
