"""Defines ResNets with torchvision's blocks and state-dict keys, ViewBatchNorm, a free base width and a stem for small images.

It differs from torchvision.models.ResNet in five ways: the norm is ViewBatchNorm; it applies the ReLU that follows it, and
normalises and adds the shortcut, in its own passes; `fc` is the identity, so the network returns the pooled feature; the last
norm of every residual branch starts at zero, so that a block begins as the identity (as in MoCo v3); and the width of the
first stage is an argument (64 is the published network; 16 trains on a laptop).

Stems: "imagenet" is 7x7 stride 2 followed by a 3x3 max pool of stride 2, as published. On images of 32 to 64 pixels
that would leave a map of 1 to 2 pixels at the end; "small" is 3x3 stride 1 without the pool, the usual one for CIFAR.
"""

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

from crossbatch.models.arguments import check_choice
from crossbatch.models.norm import Deferred, Statistics, ViewBatchNorm, for_two_consumers, recomputed, reuse_batch_stats

STEMS = ("imagenet", "small")
CHECKPOINTS = ("none", "norms", "blocks")


def _shortcut(downsample: nn.Module | None, x: Tensor) -> Tensor | Deferred:
    """Return what a block adds, which the block's last norm normalises together with its own input."""
    if downsample is None:
        return x
    convolution, norm = downsample.children()
    return norm(convolution(x), defer=True)


class BasicBlock(resnet.BasicBlock):
    """Computes torchvision's block with its additions and ReLUs in the passes of its norms."""

    inner_norms = ("bn1",)
    last_norm = "bn2"

    def forward(self, x: Tensor) -> Tensor:
        x, identity = for_two_consumers(x)
        out = self.bn1(self.conv1(x), relu=True)
        with recomputed(out):
            out = self.conv2(out)
        return self.bn2(out, _shortcut(self.downsample, identity), relu=True)


class Bottleneck(resnet.Bottleneck):
    """Computes torchvision's block with its additions and ReLUs in the passes of its norms."""

    inner_norms = ("bn1", "bn2")
    last_norm = "bn3"

    def forward(self, x: Tensor) -> Tensor:
        x, identity = for_two_consumers(x)
        out = self.bn1(self.conv1(x), relu=True)
        with recomputed(out):
            out = self.conv2(out)
        out = self.bn2(out, relu=True)
        with recomputed(out):
            out = self.conv3(out)
        return self.bn3(out, _shortcut(self.downsample, identity), relu=True)


BLOCKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
}


def norms_of_shortcuts(network: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return {a block's last norm: the norm of its shortcut}; the last norm does both, and shares one message for both."""
    blocks = [m for m in network.modules() if isinstance(m, (BasicBlock, Bottleneck)) and m.downsample is not None]
    return {block.get_submodule(block.last_norm): block.get_submodule("downsample.1") for block in blocks}


class ResNet(torchvision.models.ResNet):
    """Turn [n, in_channels, H, W] into [n, num_features]: 8 * width features with basic blocks, 32 * width with bottlenecks."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        num_blocks: list[int],
        width: int = 64,
        stem: str = "imagenet",
        in_channels: int = 3,
    ):
        # Not torchvision's constructor, which fixes the widths; its block builder serves any width.
        nn.Module.__init__(self)
        self._norm_layer = ViewBatchNorm
        self.dilation, self.groups, self.base_width = 1, 1, 64
        self.inplanes, self.in_channels = width, in_channels
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, width, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        elif stem == "small":
            self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            raise ValueError(f"stem is {stem!r}; allowed: {', '.join(STEMS)}")
        self.bn1 = ViewBatchNorm(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(block, width, num_blocks[0])
        self.layer2 = self._make_layer(block, 2 * width, num_blocks[1], stride=2)
        self.layer3 = self._make_layer(block, 4 * width, num_blocks[2], stride=2)
        self.layer4 = self._make_layer(block, 8 * width, num_blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Identity()
        self.num_features = 8 * width * block.expansion
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as torchvision with zero_init_residual=True: He et al. (2015), fan out; last norm of a branch 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.__class__ = _Conv2d  # torchvision's blocks make their own
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_(module.get_parameter(f"{module.last_norm}.weight"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x), relu=True)
        with recomputed(x):
            x = self.maxpool(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))

    def checkpoint_activations(self, what: str) -> None:
        """Keep less for the backward pass from now on, which computes it again; the gradients stay the same bits.

        Args:
            what: "norms": only the input of a norm with its ReLU inside a block, or in the stem, is kept. "blocks": only the
                input of a block is kept, and the backward pass runs the block once more. "none" changes nothing.
        """
        check_choice("checkpoint_activations", what, CHECKPOINTS)
        if what == "norms":
            self.bn1.recomputes_output = True
            for block in self.modules():
                if isinstance(block, (BasicBlock, Bottleneck)):
                    for name in block.inner_norms:
                        getattr(block, name).recomputes_output = True
        if what == "blocks":
            for name in ("layer1", "layer2", "layer3", "layer4"):
                setattr(self, name, _Checkpointed(*self.get_submodule(name).children()))


class _Conv2d(nn.Conv2d):
    """Gives cuDNN the weight in the type and layout of its images, in one copy.

    cuDNN would copy a weight of 3x3 into that layout by itself, in the forward and again in the backward pass, after autocast
    has copied it. The parameter stays contiguous, as the flat buffers of DeepSpeed and FSDP2 are.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.is_cuda and input.is_contiguous(memory_format=torch.channels_last):
            dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
            weight = weight.to(dtype, memory_format=torch.channels_last)
        return super()._conv_forward(input, weight, bias)


class _Checkpointed(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        for block in self:
            statistics: Statistics = {}

            def contexts(block: nn.Module = block, statistics: Statistics = statistics):
                return reuse_batch_stats(block, statistics), reuse_batch_stats(block, statistics)  # of both passes

            input = checkpoint(block, input, use_reentrant=False, context_fn=contexts)  # pyright: ignore
        return input
