"""Augments images: `parameters` draws what happens to an image, and the backends apply it.

`pil` is the reference, `opencv` the fast one for CPUs, `dali` decodes with NVIDIA DALI, and `triton_colours` does its colours
on a GPU. `backends` chooses. A new backend applies what `draw_parameters` draws, and tests/data/test_backends.py compares it
with `pil` view by view.
"""
