"""Predicts, without running anything, whether a recipe fits on given GPUs, how long it takes, and what limits it.

catalogue      GPUs and links, with sources
communication  how long a collective takes, and what it costs that ranks wait for each other at it
traffic        the collectives of a step
prediction     one step, stage by stage, with the constants that benchmarks/scaling fits to published runs
plan           the answer for a recipe and machines: what launch/plan.py prints

Memory is `engine.memory_model`, which also chooses the chunk of a run.
"""
