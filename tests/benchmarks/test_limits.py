"""Compares counted bytes with formulas, and the layers that are timed alone with those of the network."""

import pytest
import torch
from torch import nn

from benchmarks import limits
from benchmarks.stages import recipe
from crossbatch.engine.tasks.build import build_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        (lambda a, b: a + b, 3),
        (lambda a, b: a.add_(b), 3),
        (lambda a, b: torch._foreach_add_([a], [b]), 3),
        (lambda a, b: a.copy_(b), 2),  # what was there is not read
        (lambda a, b: a.zero_(), 1),
        (lambda a, b: torch.empty_like(a), 0),
        (lambda a, b: a.view(50, 20).t()[3:], 0),
        (lambda a, b: a[:1].expand(1000) + b, 2 + 1 / 1000),  # what is expanded lies in memory once
    ],
)
def test_bytes_that_operators_read_and_write(call, numbers):
    a, b = torch.ones(1000), torch.ones(1000)
    assert limits.bytes_moved(lambda: call(a, b), CPU) == 4 * 1000 * numbers


def test_bytes_of_a_backward_pass_and_of_another_device():
    layer, x = nn.Linear(20, 30, bias=False), torch.randn(10, 20)
    forward = 4 * (10 * 20 + 20 * 30 + 10 * 30)
    assert limits.bytes_moved(lambda: layer(x), CPU) == forward
    assert limits.bytes_moved(lambda: layer(x), torch.device("cuda")) == 0
    y = layer(x)
    # Of a gradient of ones [10, 30] and x: that of the weight, which is then kept as it is.
    moved = limits.bytes_moved(lambda: y.backward(torch.ones_like(y)), CPU)
    assert moved == 4 * (10 * 30 + 10 * 30 + 10 * 20 + 20 * 30)


@pytest.mark.parametrize("arch", ["resnet18", "vit_small"])
def test_every_convolution_and_linear_layer_of_the_backbone_is_timed_once(arch, monkeypatch):
    overrides = [f"crossbatch.model.arch={arch}", "crossbatch.data.image_size=32"]
    overrides += ['crossbatch.model.backbone_args={"depth": 2}'] * (arch == "vit_small")
    cfg = recipe.load("bs4096", overrides)
    timed = []

    def layer_ms(kind, shape, has_input_gradient, dtype, device):
        timed.append((kind[0], shape[0], has_input_gradient))
        return 1.0, 2.0

    monkeypatch.setattr(limits, "_layer_ms", layer_ms)
    monkeypatch.setattr(limits, "_measured", {})
    found = limits.products(cfg, images=3)
    with torch.device("meta"):
        backbone = build_model(cfg).online.backbone
    layers = [layer for layer in backbone.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert (found.forward_ms, found.backward_ms) == (len(layers), 2 * len(layers))
    assert {shape for shape, *_ in timed} == {tuple(layer.weight.shape) for layer in layers}
    assert all(rows == 2 * 3 for _, rows, _ in timed)  # both views
    assert [shape for shape, _, has_gradient in timed if not has_gradient] == [tuple(layers[0].weight.shape)]
    assert found.of_step(chunks=2, passes=2.5) == 2 * (2.5 + 2) * len(layers)


def test_a_layer_runs_forward_and_backward():
    convolution = ((8, 4, 3, 3), (2, 2), (1, 1), 1)
    for kind, shape in ((convolution, (2, 4, 8, 8)), (((6, 4),), (2, 5, 4))):
        assert all(ms > 0 for ms in limits._layer_ms(kind, shape, True, torch.float32, "cpu"))
