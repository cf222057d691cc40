"""Measurements, not tests: ``python -m tests.benchmarks.turn`` and its neighbours print them.

docs/performance.md says what each of them measures and what it gave.
"""
