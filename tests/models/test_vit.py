"""ViTs against timm's, positions and initialisation written out again, and the checks of their arguments."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

from crossbatch.models.backbones import Layout, build_backbone, family
from crossbatch.models.vit import ViT

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 4, "patch_size": 8}
TINY_CONV = {"embed_dim": 48, "depth": 2, "num_heads": 4}


def build(arch, **arguments) -> Any:
    """Return a network as Any, since the tests look deep inside."""
    return build_backbone(arch, **arguments)


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("arch", "count"), [("vit_small", 21_665_664), ("vit_base", 85_798_656)])
def test_backbone_parameter_counts(arch, count):
    """MoCo v3 counts every parameter, the frozen position table (197 * C of them) included."""
    with torch.device("meta"):
        model = build(arch)
    assert family(arch) == "vit"
    assert num_parameters(model) == count
    assert all(block.attn.num_heads == 12 for block in model.blocks)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_loads_into_timm_with_the_same_features():
    ours = build("vit_small").eval()
    theirs: Any = timm.create_model("vit_small_patch16_224", num_heads=12).eval()
    report = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert report.missing_keys == ["head.weight", "head.bias"] and not report.unexpected_keys
    theirs.reset_classifier(0)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        features = ours(images)
        torch.testing.assert_close(features, theirs(images), rtol=1e-5, atol=1e-5)
        tokens = theirs.forward_features(images)
    assert features.shape == (2, ours.num_features) == (2, 384)
    torch.testing.assert_close(features, tokens[:, 0], rtol=1e-5, atol=1e-5)  # the class token
    assert {m.eps for m in ours.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("image_size", [(32, 32), (24, 40)])
def test_positions(image_size):
    dim = 24
    layout = Layout(embed_dim=dim, depth=1, num_heads=2, patch_size=8)
    table = ViT(layout, image_size).pos_embed  # pyright: ignore[reportArgumentType] (Layout by its two paths)
    assert table is not None and not table.requires_grad
    rows, columns, quarter = image_size[0] // 8, image_size[1] // 8, dim // 4
    wanted = [[0.0] * dim]
    for row in range(rows):
        for column in range(columns):
            omegas = [1 / 10000 ** (j / quarter) for j in range(quarter)]
            wanted.append(
                [math.sin(row * w) for w in omegas]
                + [math.cos(row * w) for w in omegas]
                + [math.sin(column * w) for w in omegas]
                + [math.cos(column * w) for w in omegas]
            )
    torch.testing.assert_close(table[0].double(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-7)


def assert_uniform(weight, bound):
    """Assert uniform values in +-bound: nothing outside, something close to it, and the right standard deviation."""
    assert 0.99 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(weight.numel()))


def test_initialisation():
    dim = 96
    model = build("vit_small", image_size=32, backbone_args={**TINY, "embed_dim": dim, "mlp_ratio": 2})
    for block in model.blocks:
        for matrix in block.attn.qkv.weight.chunk(3):
            assert_uniform(matrix, math.sqrt(6 / (dim + dim)))
        assert_uniform(block.attn.proj.weight, math.sqrt(6 / (dim + dim)))
        assert_uniform(block.mlp.fc1.weight, math.sqrt(6 / (dim + 2 * dim)))
        assert_uniform(block.mlp.fc2.weight, math.sqrt(6 / (dim + 2 * dim)))
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert torch.all(layer.bias == 0)
    assert_uniform(model.patch_embed.proj.weight, math.sqrt(6 / (3 * 8 * 8 + dim)))
    assert torch.all(model.patch_embed.proj.bias == 0)
    assert 0.5e-6 < model.cls_token.std() < 2e-6
    assert all(torch.all(m.weight == 1) and torch.all(m.bias == 0) for m in model.modules() if type(m) is nn.LayerNorm)


@pytest.mark.parametrize("stop", [False, True])
def test_stop_grad_conv1(stop):
    model = build("vit_small", image_size=32, stop_grad_conv1=stop, backbone_args=TINY)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    without_gradient = [name for name, p in model.named_parameters() if p.grad is None]
    frozen = ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert without_gradient == (frozen if stop else ["pos_embed"])


def test_conv_stem():
    model = build("vit_conv_small", image_size=64, backbone_args=TINY_CONV)
    kinds = ["Conv2d", "ViewBatchNorm", "ReLU"] * 4 + ["Conv2d"]
    assert [type(layer).__name__ for layer in model.patch_embed.proj] == kinds
    convolutions = [layer for layer in model.patch_embed.proj if isinstance(layer, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [6, 12, 24, 48, 48]
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 2, 1]
    assert [c.kernel_size[0] for c in convolutions] == [3, 3, 3, 3, 1]
    assert [c.bias is not None for c in convolutions] == [False] * 4 + [True]
    images = torch.randn(4, 3, 64, 64)
    assert model.patch_embed(images).equal(model.patch_embed.proj(images).flatten(2).transpose(1, 2))
    features = model(images)
    assert features.shape == (4, 48)
    features.sum().backward()
    assert all(p.grad is not None for p in model.patch_embed.parameters())
    with torch.device("meta"):
        assert len(build("vit_conv_base").blocks) == 11


def test_patch_order_is_row_by_row():
    """The token of row r, column c must carry their position: light one patch and see which token moves."""
    for arch, args in [("vit_small", {**TINY, "patch_size": 16}), ("vit_conv_small", TINY_CONV)]:
        model = build(arch, image_size=64, backbone_args=args).eval()
        image = torch.zeros(1, 3, 64, 64)
        lit = image.clone()
        lit[:, :, 16 * 2, 16 * 1] = 1.0  # row 2, column 1 of 4 x 4; no other token of the conv stem sees this pixel
        change = (model.patch_embed(lit) - model.patch_embed(image)).norm(dim=2)
        assert change.shape == (1, 16) and change.nonzero().tolist() == [[0, 2 * 4 + 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "vit_smal"}, "did you mean 'vit_small'"),
        ({"arch": "vit_small", "stem": "small"}, "^stem is 'small', but vit_small"),
        ({"arch": "vit_conv_small", "stop_grad_conv1": True}, "conv stem is never frozen"),
        ({"arch": "vit_small", "image_size": 100}, r"image_size is 100.*patch_size \(=16\)"),
        ({"arch": "vit_conv_small", "image_size": 40}, r"image_size is 40.*conv stem \(=16\)"),
        ({"arch": "vit_small", "backbone_args": {"dept": 2}}, "'dept'.*did you mean 'depth'"),
        ({"arch": "vit_conv_small", "backbone_args": {"patch_size": 8}}, "'patch_size', which vit_conv_small does not"),
        ({"arch": "vit_small", "backbone_args": {"embed_dim": 100}}, r"embed_dim is 100.*num_heads \(=12\)"),
        ({"arch": "vit_small", "backbone_args": {"embed_dim": 6, "num_heads": 2}}, "embed_dim is 6.*divisible by 4"),
        ({"arch": "vit_conv_small", "backbone_args": {"embed_dim": 12}}, "embed_dim is 12.*divisible by 8"),
        ({"arch": "vit_small", "backbone_args": {"depth": "2"}}, "depth is '2'; it must be a positive integer"),
        ({"arch": "vit_small", "backbone_args": {"mlp_ratio": -1}}, "mlp_ratio is -1; it must be a positive number"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(**arguments)
