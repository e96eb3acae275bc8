"""The whole model: counts, what is shared, what trains, what the keys follow."""

import pytest
import torch

from crossbatch.models import MoCo, MoCoOutput
from crossbatch.models.moco import feature_std

TINY = {
    "image_size": 16,
    "stem": "small",
    "backbone_args": {"width": 8},
    "projection_dim": 8,
    "mlp_dim": 16,
    "group_size": 2,
}


def tiny(**overrides) -> MoCo:
    torch.manual_seed(0)
    return MoCo("resnet18", **{**TINY, **overrides})


def train_once(model: MoCo, step: int = 0) -> MoCoOutput:
    torch.manual_seed(1)
    contrast = model.loss(torch.randn(8, 3, 16, 16), step, 0)
    assert isinstance(contrast, MoCoOutput)
    contrast.loss.backward()
    return contrast


@pytest.mark.parametrize(
    ("loss", "mode", "total", "trainable"),
    [
        ("none", "trained", 68_012_160, 35_058_752),
        ("sum", "trained", 93_198_464, 60_245_056),
        ("sum", "released", 93_198_464, 35_058_752),
        ("sum", "ema", 93_198_464 + 25_186_304, 60_245_056),
    ],
)
def test_parameter_counts_of_resnet50(loss, mode, total, trainable):
    with torch.device("meta"):
        model = MoCo("resnet50", batchformer_loss=loss, batchformer_mode=mode)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize("mode", ["trained", "released", "ema"])
def test_batchformer_trains_or_not(mode):
    """The released code freezes BatchFormer by accident; here only mode `released` does."""
    model = tiny(batchformer_loss="sum", batchformer_mode=mode)
    train_once(model)
    assert model.batchformer is not None
    for name, p in model.batchformer.named_parameters():
        if mode == "released":
            assert p.grad is None, name
        else:
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0 or "in_proj_bias" in name, name
    assert all(p.grad is None for p in model.momentum.parameters())
    assert all(p.grad is not None for p in model.online.parameters())
    assert (model.momentum.batchformer is not None) == (mode == "ema")


def test_gradients_reach_the_backbone_through_a_frozen_batchformer():
    gradients = {}
    for loss in ("none", "mean"):
        model = tiny(batchformer_loss=loss, batchformer_mode="released")
        train_once(model)
        gradients[loss] = model.online.backbone.conv1.weight.grad  # pyright: ignore
    assert not torch.allclose(gradients["none"], gradients["mean"])


def test_loss_none_has_no_batchformer_and_momentum_starts_equal():
    model = tiny(batchformer_loss="none")
    assert model.batchformer is None
    assert not any("batchformer" in name for name in model.state_dict())
    for _, online, average in model.momentum_pairs():
        assert torch.equal(online, average)
        assert online is not average


def test_keys_come_from_the_momentum_encoder():
    model = tiny(batchformer_loss="none")
    before = train_once(model).loss.item()
    with torch.no_grad():
        for _, _, average in model.momentum_pairs():
            average.mul_(1 + 0.5 * torch.rand_like(average))
    assert train_once(model).loss.item() != pytest.approx(before)


def test_evaluation_returns_backbone_features():
    model = tiny(batchformer_loss="sum").eval()
    images = torch.randn(3, 3, 16, 16)
    features = model.embed(images)
    assert features.shape == (3, 64)
    torch.testing.assert_close(features[:1], model.embed(images[:1]))


def test_views_keep_separate_statistics():
    """Scaling view 2 changes its own statistics only, so the features of view 1 stay."""
    model = tiny(batchformer_loss="none")
    images = torch.randn(8, 3, 16, 16)
    changed = torch.cat((images[:4], images[4:] * 3 + 1))
    first, second = model.online.backbone(images)[:4], model.online.backbone(changed)[:4]
    torch.testing.assert_close(first, second)


def test_feature_std_reads_0_for_collapse_and_1_for_spread():
    assert feature_std(torch.ones(64, 16)).item() == pytest.approx(0, abs=1e-4)
    torch.manual_seed(0)
    assert feature_std(torch.randn(4096, 16)).item() == pytest.approx(1, abs=0.01)
