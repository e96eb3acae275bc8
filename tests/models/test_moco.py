"""The whole model: counts, what is shared, what trains, what the keys follow."""

import copy

import pytest
import torch
from torch import nn

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


class Small(nn.Module):
    """Stand in for somebody else's backbone, with torch's norms."""

    num_features = 12

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, images):
        return self.body(images)


HEADS = {"projection_dim": 8, "mlp_dim": 16, "temperature": 0.2, "batchformer_loss": "sum", "group_size": 8}


def step_of_a_loop(model, optimizer, call, images, step):
    optimizer.zero_grad()
    out = call(images, step)
    out.loss.backward()
    optimizer.step()
    model.update_momentum(0.9)
    return out.loss.detach()


def trained(images, wrap):
    """Return losses and state of three steps with a backbone that is not ours, in a loop that is not ours."""
    torch.manual_seed(0)
    model = MoCo(Small(), **HEADS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    call = wrap(model)
    losses = [step_of_a_loop(model, optimizer, call, x.flatten(0, 1), step) for step, x in enumerate(images)]
    return torch.stack(losses), {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained_in_ddp(images):
    rank, n = torch.distributed.get_rank(), images.shape[2] // 2

    def wrap(model):
        ddp = nn.parallel.DistributedDataParallel(model)
        return lambda x, step: ddp("loss", x, step, 5)

    return trained(images[:, :, rank * n : (rank + 1) * n], wrap)


def test_a_backbone_of_ones_own_in_ddp_on_two_ranks_equals_one_process(two_ranks):
    """That covers norms, keys, groups of BatchFormer that span the ranks, masks and the moving average."""
    torch.manual_seed(1)
    images = torch.randn(3, 2, 8, 3, 9, 9)
    losses, want = trained(images, lambda model: lambda x, step: model.loss(x, step, 5))
    ranks = two_ranks.run(trained_in_ddp, images)
    torch.testing.assert_close(sum(losses for losses, _ in ranks) / 2, losses, rtol=1e-5, atol=0)
    for _, got in ranks:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert want["momentum.backbone.body.0.weight"].ne(want["online.backbone.body.0.weight"]).any()


def test_the_momentum_encoder_starts_equal_and_follows_exactly():
    model = MoCo(Small(), **{**HEADS, "batchformer_mode": "ema"})
    assert all(torch.equal(online, average) for _, online, average in model.momentum_pairs())
    before = {name: average.clone() for name, _, average in model.momentum_pairs()}
    with torch.no_grad():
        for p in (*model.online.parameters(), *model.predictor.parameters()):
            p.add_(torch.randn_like(p))
    model.update_momentum(0.9)
    for name, online, average in model.momentum_pairs():
        torch.testing.assert_close(average, 0.9 * before[name] + 0.1 * online)
    assert any(name.startswith("batchformer") for name in before)
    assert copy.deepcopy(model).batchformer is not model.batchformer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batchformer_loss": "max"}, "batchformer_loss is 'max'; allowed: none, sum, mean, mean_with_self, joint"),
        ({"batchformer_mode": "frozen"}, "batchformer_mode is 'frozen'; allowed: trained, released, ema"),
        ({"backbone": nn.Linear(3, 4)}, "num_features is not given, and Linear has no attribute num_features"),
        ({"backbone": Small(), "stem": "small"}, "stem is given with a module"),
        ({"backbone": Small(), "heads": "cnn"}, "heads is 'cnn'; allowed: resnet, vit"),
        (
            {"backbone": Small(), "checkpoint_activations": "blocks"},
            "checkpoint_activations is 'blocks', but the backbone has no",
        ),
        ({"num_features": 5}, "num_features is 5, but resnet50 has its own"),
        ({"backbone": "resnet5"}, "^arch is 'resnet5'"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        MoCo(**arguments)


class Twofold(Small):
    """Return a tuple, as backbones for detection do."""

    def forward(self, images):
        return self.body(images), images


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temprature": 0.2}, TypeError, "temprature is not an argument of MoCo; .*did you mean 'temperature'"),
        ({"num_features": 12.0}, TypeError, r"num_features is 12\.0; it must be an integer"),
        ({"num_features": 0}, ValueError, "num_features is 0; it must be at least 1"),
    ],
)
def test_misspelt_arguments_and_numbers_that_are_none(arguments, error, message):
    with pytest.raises(error, match=message):
        MoCo(Small(), **HEADS, **arguments)


@pytest.mark.parametrize(
    ("backbone", "arguments", "message"),
    [
        (
            Small(),
            (torch.zeros(4, 3, 9, 9),),
            "part is a Tensor; allowed: loss, features, embed, contrast; .*'loss', images",
        ),
        (Small(), ("los", torch.zeros(4, 3, 9, 9)), "part is 'los'; allowed: loss"),
        (Small(), ("loss", torch.zeros(3, 3, 9, 9), 0, 0), r"images are \[3, 3, 9, 9\]; they must be \[2n, 3, H, W\]"),
        (Twofold(), ("loss", torch.zeros(4, 3, 9, 9), 0, 0), "backbone returned a tuple for 4 images; it must return"),
        (
            nn.Flatten(),
            ("loss", torch.zeros(4, 3, 9, 9), 0, 0),
            r"backbone returned \[4, 243\] .*num_features\] = \[4, 12\]",
        ),
    ],
)
def test_calls_that_cannot_be(backbone, arguments, message):
    with pytest.raises(ValueError, match=message):
        MoCo(backbone, num_features=12, **HEADS)(*arguments)


def test_parameters_that_are_elsewhere_are_not_averaged_silently():
    model = MoCo(Small(), **HEADS)
    model.online.projector.get_parameter("0.weight").data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(ValueError, match="parameters are sharded"):
        model.update_momentum(0.9)
