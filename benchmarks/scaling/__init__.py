"""How training scales: `engine.planning` checked against published runs, and a step measured on real ranks.

published*.csv  runs on one and many GPUs, with sources        calibration  fits the constants to them, and back-tests
rank            runs a step on one of several ranks            command      python -m benchmarks scaling ...
"""
