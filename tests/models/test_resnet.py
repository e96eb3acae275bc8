"""ResNets against torchvision's, and the checks of `build_backbone` that concern them."""

import math
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from crossbatch.models.backbones import build_backbone, family
from crossbatch.models.collective import Collective
from crossbatch.models.norm import ViewBatchNorm, convert_norms, synchronize_norms

ARCHS = ["resnet18", "resnet34", "resnet50", "resnet101"]


def build(arch, **arguments) -> Any:
    """Return a network as Any, since the tests look deep inside."""
    return build_backbone(arch, **arguments)


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_is_torchvisions_network_without_fc(arch):
    with torch.device("meta"):
        ours, theirs = build(arch), getattr(torchvision.models, arch)()
    assert family(arch) == "resnet"
    assert ours.num_features == theirs.fc.in_features
    assert num_parameters(ours) == num_parameters(theirs) - num_parameters(theirs.fc)
    wanted = {name: tensor.shape for name, tensor in theirs.state_dict().items() if not name.startswith("fc.")}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == wanted


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_loads_into_torchvision_with_the_same_features(arch):
    ours, theirs = build(arch), getattr(torchvision.models, arch)()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # statistics and affines away from their start, the zeros of the residual branches above all
        for module in ours.modules():
            if isinstance(module, ViewBatchNorm):
                for name, tensor in module.state_dict().items():
                    if name != "num_batches_tracked":
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    report = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert report.missing_keys == ["fc.weight", "fc.bias"] and not report.unexpected_keys
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=0, atol=0)


def test_both_views_in_training_equal_one_after_the_other():
    ours = build("resnet18", stem="small", backbone_args={"width": 8})
    views = torch.randn(2, 6, 3, 16, 16)
    views[1] *= 2
    together = ours(views.flatten(0, 1))
    for module in ours.modules():
        if isinstance(module, ViewBatchNorm):
            module.num_views = 1
    apart = torch.cat([ours(view) for view in views])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def trained(model, images, gradient) -> dict[str, torch.Tensor]:
    """Return features, gradients and running statistics of one forward and backward pass."""
    features = model(images)
    features.backward(gradient)
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"features": features.detach(), **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_training_gives_the_bits_of_norm_addition_and_relu_one_after_the_other(arch):
    """On a CPU; converted norms of somebody else's network are followed by torch's additions and ReLUs."""
    ours, theirs = build(arch), convert_norms(getattr(torchvision.models, arch)())
    theirs.fc = nn.Identity()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.endswith(("bn2.weight", "bn3.weight")):
                p.fill_(0.5)  # or the zeros of the residual branches hide them
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    gradient = torch.randn(4, ours.num_features)
    want, got = trained(theirs, images, gradient), trained(ours, images, gradient)
    assert got.keys() == want.keys() and len(got) > 100
    for name, value in got.items():
        assert value.equal(want[name]), name


class Counting(Collective):
    """Counts messages, as one of two ranks with the same images."""

    calls = 0

    @property
    def world_size(self):
        return 2

    def all_gather(self, tensor):
        self.calls += 1
        return torch.stack([tensor, tensor])

    def all_reduce(self, tensor):
        self.calls += 1
        return 2 * tensor


def test_what_is_checkpointed_changes_no_bit_and_no_message():
    images, gradient = torch.randn(4, 3, 32, 32), torch.randn(4, 256)
    results = {}
    for what in ("none", "norms", "blocks"):
        torch.manual_seed(0)
        model, counting = build("resnet50", backbone_args={"width": 8}), Counting()
        model.checkpoint_activations(what)
        synchronize_norms(model, counting)
        results[what] = trained(model, images, gradient)
        assert counting.calls == 2 * (53 - 4)  # those of shortcuts go with another
    for what in ("norms", "blocks"):
        for name, value in results[what].items():
            assert value.equal(results["none"][name]), (what, name)


def test_checkpoints_that_cannot_be():
    with pytest.raises(
        ValueError, match=r"^checkpoint_activations is 'norm'; allowed: none, norms, blocks \(did you mean"
    ):
        build("resnet18", backbone_args={"width": 8}).checkpoint_activations("norm")
    with pytest.raises(ValueError, match=r"^checkpoint_activations is 'norms'; allowed: none, blocks"):
        build("vit_small", backbone_args={"depth": 1}).checkpoint_activations("norms")


def test_initialisation():
    model = build("resnet50")
    for name, module in model.named_modules():
        if isinstance(module, ViewBatchNorm):
            assert torch.all(module.weight == (0 if name.endswith("bn3") else 1)), name
            assert torch.all(module.bias == 0)
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            spread = 5 / math.sqrt(2 * module.weight.numel())  # five standard errors of a standard deviation
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=spread), name
    basic = build("resnet18", backbone_args={"width": 8})
    assert all((m.weight == 0).all() for name, m in basic.named_modules() if name.endswith(".bn2"))


@pytest.mark.parametrize(("arch", "expansion"), [("resnet18", 1), ("resnet50", 4)])
def test_width(arch, expansion):
    model = build(arch, backbone_args={"width": 16})
    assert model.num_features == 128 * expansion
    assert [getattr(model, f"layer{i}")[0].conv1.out_channels for i in (1, 2, 3, 4)] == [16, 32, 64, 128]
    assert model(torch.randn(4, 3, 32, 32)).shape == (4, 128 * expansion)


@pytest.mark.parametrize(("stem", "size"), [("imagenet", 1), ("small", 4)])
def test_stem(stem, size):
    model = build("resnet18", stem=stem, backbone_args={"width": 8}).eval()
    sizes = []
    model.layer4.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[2:])))
    model(torch.randn(1, 3, 32, 32))
    assert sizes == [(size, size)]
    assert model.conv1.kernel_size == ((7, 7) if stem == "imagenet" else (3, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "resnet5"}, "^arch is 'resnet5'.*allowed: resnet18.*did you mean 'resnet50'"),
        ({"arch": "resnet50", "stem": "cifar"}, "^stem is 'cifar'; allowed: imagenet, small"),
        ({"arch": "resnet50", "stop_grad_conv1": True}, "^stop_grad_conv1 is true, but resnet50"),
        ({"arch": "resnet50", "backbone_args": {"widht": 16}}, "'widht'.*allowed: width .did you mean 'width'"),
        ({"arch": "resnet50", "backbone_args": {"embed_dim": 16}}, "'embed_dim', which resnet50 does not take"),
        ({"arch": "resnet50", "backbone_args": {"width": 0}}, "width is 0; it must be a positive integer"),
        ({"arch": "resnet50", "backbone_args": {"width": 16.5}}, "width is 16.5; it must be a positive integer"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(**arguments)
