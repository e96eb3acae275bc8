"""How training scales: `engine.planning` checked against published runs, and a step measured on real ranks.

published*.csv  runs on one and many GPUs, with sources        calibration  fits the constants to them, and back-tests
study           runs a step on 1, 2, 4, ... ranks (rank)       __main__     python -m benchmarks scaling ...
"""
