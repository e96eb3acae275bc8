"""Measure how training scales: check `engine.planning` against published runs, and time a step on real ranks.

published*.csv  runs on one and many GPUs, with sources        calibration  fits the constants to them, and back-tests
rank            runs a step on one of several ranks            command      python -m benchmarks scaling ...
"""
