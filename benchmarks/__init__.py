"""Measures every stage beside what people would otherwise use: `python -m benchmarks STAGE...`"""
