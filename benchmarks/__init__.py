"""Measures every stage beside what people would otherwise use: `python -m benchmarks STAGE...`

__main__    the commands
stages/     one module a stage, and the baselines that several share
measure     times and weighs the cases of a stage in turns; writes rows
rows        what a row of results says; reads rows and shows them as tables
report, comparison      rows as a page with pictures; two results side by side
flops, limits       count what a stage computes and moves, and compare it with what the machine can do
range_server    a web server with latency, for the stage remote
processes, gpu      run stages in processes of their own; `make bench-gpu`
instant_failures    prints failures of tests when they happen
scaling/    how training scales: measured and predicted
results/    rows that we measured
"""

import argparse


def parser_of(command: str | None, description: str | None) -> argparse.ArgumentParser:
    """Return a parser that takes no abbreviations and shows `description` as it is written."""
    as_it_is = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(command, description=description, formatter_class=as_it_is, allow_abbrev=False)
