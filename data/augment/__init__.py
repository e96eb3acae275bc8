"""Augments images: `parameters` draws what happens to an image, and the backends apply it.

`pil` is the reference, `opencv` the fast one for CPUs, `dali` decodes with NVIDIA DALI, and `triton_colours` does its colours
on a GPU. `backends` chooses. A new backend takes its parameters from `draw_parameters`, and the tests compare it with `pil`.
"""
