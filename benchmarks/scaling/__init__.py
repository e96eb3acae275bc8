"""How training scales: predicted, checked against published runs, and measured.

catalogue       GPUs and links, with sources
activations     what autograd keeps, from shapes       memory       what a step needs, part by part
compute         FLOPs, roofline                        traffic      every collective of a step (fsdp: those of FSDP2)
communication   how long a collective takes            stragglers   what waiting for each other costs
calibration     the fitted constants, and their error on published runs (published)
prediction      one step, stage by stage               (launch/plan.py asks this)
study           runs a step on 1, 2, 4, ... ranks (rank), and counts its collectives (counting)
command         python -m benchmarks scaling ...
"""
