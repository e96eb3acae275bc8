"""Formulas of communication and waiting, the fit, and how it does on published runs."""

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scaling import calibration, command
from benchmarks.scaling.calibration import Constants, fit, leave_one_out, predict
from benchmarks.scaling.catalogue import GPUS, LINKS, NETWORKS, find_gpu, machines
from benchmarks.scaling.communication import LAUNCH_US, Layout, latency_us, seconds
from benchmarks.scaling.compute import Efficiency, Work, work_of_arch
from benchmarks.scaling.published import ROWS, SINGLE
from benchmarks.scaling.stragglers import largest, wait_ms
from crossbatch import InputError


def layout(ranks, nodes, inside=100.0, between=10.0):
    return Layout(ranks, nodes, inside, between, (0.5, 0.6), (3.0, 5.0))


def test_a_ring_within_a_node():
    size, n = 1e9, 8
    want = LAUNCH_US * 1e-6 + (3.6 + 7 * 0.5) * 1e-6 + (n - 1) / n * size / 100e9
    assert seconds("all-gather", size, layout(n, 1)) == pytest.approx(want)
    assert seconds("reduce-scatter", size, layout(n, 1)) == pytest.approx(want)
    assert seconds("broadcast", size, layout(n, 1)) == pytest.approx(
        LAUNCH_US * 1e-6 + (3.6 + 7 * 0.5) * 1e-6 + size / 100e9
    )


def test_an_all_reduce_takes_the_fastest_way():
    n, k, size = 16, 4, 1e9
    ring = 2 * (n - 1) / n * size / 10e9
    hierarchical = 2 * (3 / 4) * size / 100e9 + 2 * (3 / 4) * size / 10e9
    tree = 2 * size / 10e9
    assert seconds("all-reduce", size, layout(n, k)) == pytest.approx(min(ring, hierarchical, tree), rel=1e-3)
    # A few bytes: the tree's log2 k beats k - 1 hops.
    tree_us = 4.4 + 2 * (3 * 0.6 * 1.8 + math.log2(16) * 5)
    assert latency_us("all-reduce", layout(64, 16)) == pytest.approx(LAUNCH_US + tree_us)
    assert seconds("all-reduce", 1e9, layout(1, 1)) == 0


def test_waiting_is_that_of_random_pauses():
    """The expected largest of N Poisson numbers, against drawing them; alone, nobody waits."""
    draws = np.random.default_rng(0)
    for ranks, expected in ((8, 0.05), (64, 0.3), (16, 4.0)):
        sample = draws.poisson(expected, (20_000, ranks)).max(axis=1)
        assert largest(ranks, expected) == pytest.approx(sample.mean(), abs=4 * sample.std() / 141)
    assert wait_ms(1, 100, 500.0, 0.03) == pytest.approx(0.0, abs=1e-9)
    # Few pauses, many synchronisations: all ranks' pauses add up. Many ranks: a pause at every synchronisation.
    assert wait_ms(4, 10_000, 500.0, 0.01) == pytest.approx(3 * 500 * 0.01, rel=0.01)
    assert wait_ms(100_000, 50, 500.0, 0.01) > 3.0 * 50
    assert wait_ms(16, 200, 500.0, 0.03) > 3 * wait_ms(16, 1, 500.0, 0.03)


def test_the_roofline():
    v100 = find_gpu("v100-32g")
    efficiency = Efficiency(of_peak=0.5, moves=20.0)
    assert Work(1e12, 1e6).seconds(v100, "fp16", efficiency) == (pytest.approx(1e12 / (125e12 * 0.5)), "arithmetic")
    assert Work(1e9, 1e9).seconds(v100, "fp16", efficiency) == (pytest.approx(20e9 / 900e9), "memory bandwidth")


def test_resnet50_is_counted_as_everywhere():
    work = work_of_arch("resnet50", 224, "fp16")
    assert work.flops / 3 / 2 == pytest.approx(4.09e9, rel=0.01)  # multiply-adds, without the classifier


def test_published_runs_left_out_of_the_fit():
    """The targets of the model: median error at most 10 %, worst at most 25 %."""
    tested = leave_one_out()
    assert [row.name for row in tested] == [row.name for row in ROWS]
    median, worst = calibration.typical(tested)
    assert median < 0.05 and worst < 0.25
    assert len({row.name for row in ROWS}) == len(ROWS) > 40
    linear = [row.known.images_per_s / row.known.gpus * row.wanted.gpus / row.wanted.images_per_s - 1 for row in ROWS]
    several = [i for i, row in enumerate(ROWS) if row.wanted.nodes > 1]
    mean = np.mean([abs(tested[i].error) for i in several]), np.mean([abs(linear[i]) for i in several])
    assert mean[0] < 0.25 * mean[1]


def test_one_gpu_left_out_of_the_fit():
    tested = calibration.leave_one_out_single()
    median, worst = calibration.typical(tested)
    assert len(tested) == len(SINGLE) and median < 0.08 and worst < 0.15


def test_a_fit_finds_the_constants_that_made_the_rows():
    made = Constants(
        6.0,
        {"pytorch": 0.01, "tensorflow": 0.008, "mxnet": 0.003, "paddle": 0.002},
        {"eager": 0.03, "graph": 0.01},
    )
    rows = [replace(row, wanted=replace(row.wanted, images_per_s=predict(row, made))) for row in ROWS]
    found = fit(rows)
    assert found.share["eager"] == pytest.approx(0.03, rel=0.1)
    assert found.contention_ms["pytorch"] == pytest.approx(0.01, rel=0.1)
    assert found.fixed_ms == pytest.approx(6.0, rel=0.1)


def test_predicting_the_known_run_gives_it_back():
    constants = fit()
    for row in ROWS:
        same = replace(row, wanted=row.known)
        assert predict(same, constants) == pytest.approx(row.known.images_per_s, rel=1e-9)


def test_every_number_of_the_catalogue_has_a_source():
    for name, thing in {**GPUS, **LINKS, **NETWORKS}.items():
        assert thing.source, name
    for name, gpu in GPUS.items():
        assert gpu.link in LINKS and gpu.network in NETWORKS, name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("v100", 8, 1), "did you mean v100-32g"),
        (("h200x", 8, 1), "did you mean h200"),
        (("v100-32g", -4, 1), "--gpus: given -4; allowed: >= 1"),
        (("v100-32g", 8, 0), "--nodes: given 0; allowed: >= 1"),
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


def test_backtest_says_what_it_missed(capsys, monkeypatch):
    missed = calibration.Tested("a run", 100.0, 150.0, 0.5, 0.4, "somewhere")
    for name in ("leave_one_out", "leave_publication_out"):
        monkeypatch.setattr(calibration, name, lambda: [missed] * len(ROWS))
    monkeypatch.setattr(calibration, "leave_one_out_single", lambda: [])
    monkeypatch.setattr(command, "_summary", lambda name, tested: name)
    command.main(["backtest"])
    said = capsys.readouterr().out
    assert "missed by more than 25 %: a run" in said and "[1] somewhere" in said
