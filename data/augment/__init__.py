"""What is done to an image: parameters drawn by position (`parameters`), and the backends that apply them.

pil is the reference, opencv the fast one for CPUs, dali decodes with NVIDIA DALI, and triton_colours colours on a GPU.
`backends` chooses. A new backend takes its parameters from `parameters.draw` and is compared with pil in the tests.
"""
