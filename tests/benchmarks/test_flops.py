"""Compares counted operations with formulas, and checks rates on cards that are and are not known."""

import pytest
import torch
from torch import nn

from benchmarks import flops
from benchmarks.rows import Row
from benchmarks.stages.step import Setup
from crossbatch.models.batchformer import BatchFormer, DropoutKey


def test_a_linear_layer_forward_and_backward():
    layer, x = nn.Linear(24, 40), torch.randn(16, 24, requires_grad=True)
    assert flops.count(lambda: layer(x)) == 2 * 16 * 24 * 40
    assert flops.count(lambda: layer(x).sum().backward()) == 3 * 2 * 16 * 24 * 40


def test_attention_over_the_batch_counts_though_it_is_an_operator_of_ours():
    G, C = 12, 16
    layer = BatchFormer(C, G, dropout=0.5, kernel="fused")
    x = torch.randn(2, 2 * G, C, requires_grad=True)  # two views of two groups
    seeds = DropoutKey(0, 0).dropout_seeds(2, x.device)
    rows = x.shape[0] * x.shape[1]
    linear = 2 * rows * C * (3 * C + C + C + C)  # q k v, out, and the two of the hidden layer, all C wide
    attention = 2 * 2 * rows * G * C  # scores and their product with the values, whatever the number of heads
    assert flops.count(lambda: layer(x, dropout_seeds=seeds)) == linear + attention
    assert flops.count(lambda: layer(x, dropout_seeds=seeds).sum().backward()) == 3 * (linear + attention)


@pytest.mark.long
def test_a_step_by_its_shapes_is_a_step_that_was_counted(one_rank):
    counted, by_shapes = one_rank.run(_count_a_step)[0]
    assert by_shapes == pytest.approx(counted, rel=0.03)


def _count_a_step() -> tuple[float, float]:
    setup = Setup("ResNet-18, 64 px", 16, 16)
    views = torch.zeros(2, 16, 3, 64, 64, dtype=torch.uint8)
    step = setup.build(torch.device("cpu"))
    return flops.count(lambda: step(views)), flops.of_step(setup.config())


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("Tesla V100-SXM2-32GB", "fp16", 125e12),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7e12),
        ("Tesla V100-SXM2-32GB", "bf16", None),  # it has none
        ("NVIDIA H100 PCIe", "bf16", None),  # another card than the SXM one
        ("NVIDIA A100-SXM4-80GB", "fp32", None),  # some of it would run as TF32
        ("A card of tomorrow", "bf16", None),
    ],
)
def test_peaks_of_known_cards_only(name, precision, peak):
    assert flops.peak_of_card(name, precision) == peak


def test_rates_and_mfu(monkeypatch):
    shared = {"n": 1}
    rows = [Row.of_one("a", 500.0, "ms", shared), Row.of_one("b", 250.0, "ms", shared)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (unknown, _), settings = flops.with_rates(rows, 10**12, "fp32"), {"tflop": 1.0, "tflop_per_s": 2.0}
    assert unknown.settings == {"n": 1, **settings, "mfu": "unknown"} and shared == {"n": 1}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100-SXM2-32GB")
    found = flops.with_rates(rows, 125 * 10**11, "fp16")
    assert [row.settings["mfu"] for row in found] == pytest.approx([0.2, 0.4])
