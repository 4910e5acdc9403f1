"""Benchmarks: each module measures one thing in one process and writes a dated result (see harness.py)."""
