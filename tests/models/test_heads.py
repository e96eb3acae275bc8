"""The structure of the heads, and the parameter counts of whole models."""

import pytest
import torch
from torch import nn

from crossbatch.models.backbones import build_backbone, family
from crossbatch.models.heads import build_mlp, build_predictor, build_projector
from crossbatch.models.norm import ViewBatchNorm


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def structure(head):
    """Return one word per layer: sizes of a Linear, "norm" with or without affine, "relu"."""
    words = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            assert layer.bias is None
            words.append(f"{layer.in_features}-{layer.out_features}")
        elif isinstance(layer, ViewBatchNorm):
            words.append(f"norm {layer.num_features}" + ("" if layer.affine else " plain"))
        else:
            assert isinstance(layer, nn.ReLU)
            words.append("relu")
    return words


def test_structure():
    assert structure(build_projector("resnet", 8, 6, 4)) == ["8-6", "norm 6", "relu", "6-4", "norm 4 plain"]
    assert structure(build_predictor("resnet", 6, 4)) == ["4-6", "norm 6", "relu", "6-4"]
    assert structure(build_projector("vit", 8, 6, 4)) == [
        *["8-6", "norm 6", "relu", "6-6", "norm 6", "relu"],
        *["6-4", "norm 4 plain"],
    ]
    assert structure(build_predictor("vit", 6, 4)) == ["4-6", "norm 6", "relu", "6-4", "norm 4 plain"]


def test_keys_are_those_of_the_original():
    keys = {name for name, _ in build_projector("resnet", 8, 6, 4).named_parameters()}
    assert keys == {"0.weight", "1.weight", "1.bias", "3.weight"}
    buffers = [name for name, _ in build_projector("resnet", 8, 6, 4).named_buffers() if name.startswith("4.")]
    assert buffers == ["4.running_mean", "4.running_var", "4.num_batches_tracked"]


def test_output_is_normalised_per_view():
    torch.manual_seed(0)
    head = build_mlp(3, 8, 16, 4, last_norm=True)
    x = torch.randn(64, 8)
    x[32:] = 3 * x[32:] + 1
    for view in head(x).chunk(2):
        torch.testing.assert_close(view.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(view.var(0, correction=0), torch.ones(4), rtol=0, atol=1e-2)


def test_predictor_count():
    with torch.device("meta"):
        assert num_parameters(build_predictor("resnet", 4096, 256)) == 2_105_344


@pytest.mark.parametrize(
    ("arch", "count"),
    [
        ("resnet50", 68_012_160),
        ("vit_small", 84_266_752),
        ("vit_base", 215_678_464),
        ("vit_conv_small", 82_170_208),
        ("vit_conv_base", 208_480_960),
    ],
)
def test_count_of_the_whole_model(arch, count):
    """Both encoders and the predictor count, momentum and frozen parameters included."""
    with torch.device("meta"):
        backbone = build_backbone(arch)
        projector = build_projector(family(arch), backbone.num_features, 4096, 256)
        predictor = build_predictor(family(arch), 4096, 256)
    assert 2 * (num_parameters(backbone) + num_parameters(projector)) + num_parameters(predictor) == count
