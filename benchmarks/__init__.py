"""Measures every stage beside what people would otherwise use: `python -m benchmarks STAGE...`

    __main__    the commands
    stages      which stages there are; each runs in a process of its own
    harness     how a case is measured, and what a row says
    decode augment data transfer index backbone batchformer heads collectives optimizer ema checkpoint step
                the stages: `run(effort)` yields rows
    plain, plain_step       the baselines that several stages share, or that are long
    recipe, flops           recipes of ds_configs/ as the stages build them; what they compute
    results, report, plots, comparison      rows read again: tables, pictures, two results side by side
    gpu         `make bench-gpu`: everything that a machine with a GPU can say, in minutes

A new stage is a module with `run`, and its name in stages.STAGES.
"""
