"""Formulas of communication and waiting, the fit, and how it does on published runs."""

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scaling.calibration import (
    MANY_GPUS,
    ONE_GPU,
    ROWS,
    SINGLE,
    START,
    fit,
    leave_out,
    linear_scaling,
    predict,
)
from crossbatch import InputError
from crossbatch.engine.planning import plan, prediction
from crossbatch.engine.planning.catalogue import GPUS, LINKS, NETWORKS, Link, machines
from crossbatch.engine.planning.communication import LAUNCH_US, collective_ms, largest_of, wait_ms
from crossbatch.engine.planning.prediction import Work, work_of


def layout(ranks, nodes):
    """100 GB/s inside of a node, 10 between nodes."""
    link, network = Link(100.0, 0.5, 0.6, "made up"), Link(10.0, 3.0, 5.0, "made up")
    return replace(machines("v100-32g", ranks, nodes), link=link, network=network)


def test_a_ring_within_a_node():
    size, n = 1e9, 8
    want_us = LAUNCH_US + 3.6 + 7 * 0.5 + (n - 1) / n * size / 100e3
    assert collective_ms("all-gather", size, layout(n, 1)) == pytest.approx(want_us / 1e3)
    assert collective_ms("reduce-scatter", size, layout(n, 1)) == pytest.approx(want_us / 1e3)
    assert collective_ms("all-reduce", size, layout(1, 1)) == 0


def test_an_all_reduce_takes_the_fastest_way():
    n, k, size = 16, 4, 1e9
    ring = 2 * (n - 1) / n * size / 10e9
    hierarchical = 2 * (3 / 4) * size / 100e9 + 2 * (3 / 4) * size / 10e9
    tree = 2 * size / 10e9
    assert collective_ms("all-reduce", size, layout(n, k)) == pytest.approx(
        1e3 * min(ring, hierarchical, tree), rel=1e-3
    )
    # A few bytes: the tree's log2 k beats k - 1 hops.
    tree_us = 4.4 + 2 * (3 * 0.6 * 1.8 + math.log2(16) * 5)
    assert collective_ms("all-reduce", 0, layout(64, 16)) == pytest.approx((LAUNCH_US + tree_us) / 1e3)


def test_waiting_is_that_of_random_pauses():
    """The expected largest of N Poisson numbers, against drawing them; alone, nobody waits."""
    draws = np.random.default_rng(0)
    for ranks, expected in ((8, 0.05), (64, 0.3), (16, 4.0)):
        sample = draws.poisson(expected, (20_000, ranks)).max(axis=1)
        assert largest_of(ranks, expected) == pytest.approx(sample.mean(), abs=4 * sample.std() / 141)
    assert wait_ms(1, 100, 500.0, 0.03) == pytest.approx(0.0, abs=1e-9)
    # Few pauses, many synchronisations: all ranks' pauses add up. Many ranks: a pause at every synchronisation.
    assert wait_ms(4, 10_000, 500.0, 0.01) == pytest.approx(3 * 500 * 0.01, rel=0.01)
    assert wait_ms(100_000, 50, 500.0, 0.01) > 3.0 * 50
    assert wait_ms(16, 200, 500.0, 0.03) > 3 * wait_ms(16, 1, 500.0, 0.03)


def test_the_roofline():
    v100, factors = GPUS["v100-32g"], {"of_peak": 0.5, "moves": 20.0}
    assert Work(1e12, 1e6).seconds(v100, "fp16", **factors) == (pytest.approx(1e12 / (125e12 * 0.5)), "arithmetic")
    assert Work(1e9, 1e9).seconds(v100, "fp16", **factors) == (pytest.approx(20e9 / 900e9), "memory bandwidth")


def test_resnet50_is_counted_as_everywhere():
    work = work_of("fp16", "resnet50", 224)
    assert work.flops / 3 / 2 == pytest.approx(4.09e9, rel=0.01)  # multiply-adds, without the classifier


@pytest.mark.long
def test_published_runs_left_out_of_the_fit():
    """The targets of the model: median error at most 5 %, worst at most 25 %, and far better than linear scaling."""
    errors, linear = np.abs(leave_out(*MANY_GPUS)), np.abs(linear_scaling(ROWS))
    assert len({row.name for row in ROWS}) == len(ROWS) == len(errors) == 44
    assert np.median(errors) < 0.05 and errors.max() < 0.25
    several = [row.wanted.nodes > 1 for row in ROWS]
    assert errors[several].mean() < 0.25 * linear[several].mean()
    worst = errors[[row.wanted.norms_over > 0 for row in ROWS]].max()
    assert pytest.approx(worst, abs=0.005) == prediction.ERROR_MANY_GPUS


@pytest.mark.long
def test_one_gpu_left_out_of_the_fit():
    errors = np.abs(leave_out(*ONE_GPU))
    assert len(errors) == len(SINGLE) == 11 and np.median(errors) < 0.08 and errors.max() < 0.15
    assert pytest.approx(errors.max(), abs=0.005) == prediction.ERROR_ONE_GPU


@pytest.mark.long
def test_plans_are_made_with_what_the_fit_finds():
    """The package ships the constants, this folder the runs that they are fitted to."""
    found = fit(*MANY_GPUS) | fit(*ONE_GPU)
    found |= {"contention_ms": found["pytorch"], "share": found["eager"]}
    for name, value in vars(prediction.FITTED).items():
        assert value == pytest.approx(found[name], rel=0.01)
    assert set(plan.FITTED_ON_ONE) == {row.gpu for row in SINGLE}


def test_a_fit_finds_the_constants_that_made_the_rows():
    made = {"fixed_ms": 6.0, "pytorch": 0.01, "tensorflow": 0.008, "mxnet": 0.003, "paddle": 0.002}
    made |= {"eager": 0.03, "graph": 0.01}
    rows = [replace(row, wanted=replace(row.wanted, images_per_s=predict(row, made))) for row in ROWS]
    found = fit(rows, predict, START)
    for name in ("eager", "pytorch", "fixed_ms"):
        assert found[name] == pytest.approx(made[name], rel=0.1)


def test_predicting_the_known_run_gives_it_back():
    for row in ROWS:
        same = replace(row, wanted=row.known)
        assert predict(same, START) == pytest.approx(row.known.images_per_s, rel=1e-9)


def test_every_number_has_a_source():
    for name, thing in {**GPUS, **LINKS, **NETWORKS}.items():
        assert thing.source, name
    for name, gpu in GPUS.items():
        assert gpu.link in LINKS and gpu.network in NETWORKS, name
    assert all(row.source and row.gpu in GPUS for row in [*ROWS, *SINGLE])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("v100", 8, 1), "did you mean v100-32g"),
        (("h200x", 8, 1), "did you mean h200"),
        (("v100-32g", -4, 1), "--gpus: given -4; allowed: a whole number >= 1"),
        (("v100-32g", 8, 0), "--nodes: given 0; allowed: a whole number >= 1"),
        (("v100-32g", 9, 2), "a multiple of --nodes; take 8"),
        (("v100-32g", 16, 2, "4xedx"), "--interconnect: given edx"),
        (("memory_gib=24,bandwidth=900,fp32=30", 1, 1), "missing: fp16"),
        (("memory_gib=24,bandwith=900", 1, 1), "did you mean bandwidth"),
        (("memory_gib=24,bandwidth=fast", 1, 1), "allowed: a number"),
        (("memory_gib=24,bandwidth=-1,fp32=30,fp16=60", 1, 1), "bandwidth=-1; allowed: > 0"),
    ],
)
def test_machines_that_cannot_be(arguments, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        machines(*arguments)


def test_machines_by_name_and_by_hand():
    at = machines("V100-32G", 16, 2, "4xedr")
    assert (at.gpus_per_node, at.adapters, at.network) == (8, 4, NETWORKS["edr"])
    assert machines("memory_gib=24,bandwidth=936,fp32=35.6,fp16=71", 2).gpu.peak("fp16") == 71e12
