"""Rebuilds a step of a run and says what went wrong in it first: which layer, and which image brought it.

rebuild   makes the step again from the nearest checkpoint, with the trainer's own step
probe     watches it: statistics of layers, gradients and weights, image by image
verdict   finds the first value that is not finite or jumps, and the image
report    writes views, loss terms and statistics, and prints the verdict
compare   finds where two runs part

Hooks watch the trainer's own step on every rank of the replay; no part of the step is implemented a second time.
"""
